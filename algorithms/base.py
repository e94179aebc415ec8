"""What a method is: which rows a step trains on (`rows`), with which objectives and coefficients (`terms`), and a little state.

A method is a dataclass that inherits `Method`; its fields are the keys allowed under `method:` in a config. It never sees the learner:
rows and terms are all it hands over. A user's method is a file of its own, named by path: `method: {name: my_method.py:MyMethod}`.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tandem.algorithms.objectives import RolloutCorrection
from tandem.algorithms.options import build
from tandem.algorithms.reductions import Reduction
from tandem.engine.loading import load_object
from tandem.engine.types import Finish, GenRequest, Prompt, Row, Sampling, ScoredGroup, Source, Trajectory


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `coefficient * sum_rows sum_t weight * scale * objective / Z`.

    `name` is the key into `Row.weights`. `needs` names the streams the objective cannot do without (entropy, value) or that the loop has to fill in
    before `Method.credit` (old_logp, ref_logp, old_value). Any other name is one of the extra streams of a custom forward.
    """

    name: str
    objective: Callable
    reduction: Reduction = Reduction()
    coefficient: float = 1.0
    correction: RolloutCorrection | None = None
    needs: frozenset[str] = frozenset()
    together: bool = False              # all rows of a group stand in one micro-batch


@dataclass(frozen=True)
class Budget:
    """What the config allows per step; a method may ask for less."""

    prompts: int        # prompts to roll out
    samples: int        # rollouts per prompt
    experts: int        # demonstrations
    steps: int          # optimizer steps of the whole run
    seed: int = 0       # of the run, for draws that a method makes itself


@dataclass(frozen=True)
class Demand:
    """What one step needs. `optimizer` names the set of moments (a new name starts from zero); `learning_rate` None: the config's."""

    prompts: int = 0
    experts: int = 0
    kind: str = "mixed"                     # mixed | rl | sft, for reports
    learning_rate: float | None = None
    optimizer: str = "main"
    set_reference: bool = False             # the weights this step starts from are the reference from now on


@dataclass(frozen=True, eq=False)
class Batch:
    """Everything a method may look at when it makes the rows of one step."""

    step: int
    groups: tuple[ScoredGroup, ...]
    experts: tuple[Trajectory, ...]
    signals: Mapping[str, float] = field(default_factory=dict)     # each metric as last measured, in the step before if it did
    off_policy: bool = False                                       # rollouts may be older than the learner: correct for it


@dataclass
class Method:
    """Base of all methods. Subclasses are dataclasses and override `rows` and `terms`, and `demand` where not every step is alike."""

    title: ClassVar[str] = ""               # one line for `tandem methods`
    paper: ClassVar[str] = ""               # arXiv id, or "" where the method has no single paper
    uses_experts: ClassVar[bool] = False    # a config without `data.experts` is then an error
    uses_rollouts: ClassVar[bool] = True    # a config without rewards is then an error

    aligned: ClassVar[bool] = False                 # demonstrations come with their prompts: `experts` of the step's prompts are drawn from data.experts
    scores_demonstrations: ClassVar[bool] = False   # the reward functions also score each prompt's demonstration
    needs_groups: ClassVar[bool] = True             # False: rollouts train something without an advantage too (UFT's hints), so one sample per prompt is a warning only
    policy: ClassVar[Any] = None                    # the RL half, algorithms.policy.PolicyLoss, where the method has one (then a field, set in __post_init__)

    # Experimental, for methods whose log-probs are not those of the tokens' own context, or that need more than log-probs (IFT, CARFT): what the learner calls
    # in the place of Policy.forward in every step, a picklable callable
    #   forward(policy, tokens, positions, index, target, temperature, chunk, entropy, tags) -> (logp [n], entropy [n] | None, value [n] | None, {name: [n]})
    # with the arguments of Policy.forward and tags {segment, group, source: [n]}; the extra streams are `tokens.extra` of every objective.
    # A row's last trained token is a target, but not among the tokens (see MicroBatch): behind its position another row begins.
    # It runs on the policy's modules (trunk, head, critic), all of them in the same order on every rank, and every parameter takes part, if only times zero:
    # ZeRO-3 would keep the last step's gradient of one that does not. Log-probs from before the update remain the ordinary ones.
    forward: ClassVar[Callable | None] = None
    embedding: ClassVar[int] = 0                    # dimensions of the critic's hidden layer, 0: a linear critic

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        """What step `step` needs. Called when its rollouts are requested, up to `staleness` steps ahead."""
        return Demand(prompts=budget.prompts if self.uses_rollouts else 0, experts=budget.experts if self.uses_experts else 0)

    def request(self, group: int, prompt: Prompt, sampling: Sampling, step: int, budget: Budget) -> GenRequest:
        """The rollout request for one prompt; override to force a response prefix (Prefix-RFT, UFT)."""
        return GenRequest(group=group, prompt=prompt, samples=budget.samples, sampling=sampling)

    def accept(self, group: ScoredGroup) -> bool:
        """Whether a scored group counts towards the batch; False draws another prompt in its place (DAPO's dynamic sampling)."""
        return True

    def rows(self, batch: Batch) -> list[Row]:
        raise NotImplementedError

    def terms(self, batch: Batch) -> list[Term]:
        raise NotImplementedError

    @property
    def critic(self) -> bool:
        """Whether the learner gets a value head."""
        return self.policy is not None and self.policy.advantage == "gae"

    def credit(self, rows: Sequence[Row], batch: Batch) -> Sequence[Row]:
        """From rewards to advantages, where that takes more than rewards: called with the rows of `rows`, after the loop has filled in the streams that
        terms need: old_logp and old_value (one forward of the learner, before the update), ref_logp (of the reference). Returns rows in the same order."""
        return self.policy.credit(rows, batch) if self.critic else rows

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every optimizer step with its metrics (grad_norm, entropy, loss/TERM, reward/mean, ...), for methods that react to them."""

    def metrics(self, step: int) -> dict[str, float]:
        """Numbers of the method's own for the step's report, e.g. mu."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Picklable state that must survive a resume; most methods have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)} for it")


def policy_row(trajectory: Trajectory, advantage: float, term: str) -> Row:
    """A rollout as a training row: every sampled token gets the sequence's advantage and weight 1 in `term`."""
    mask = (trajectory.source == Source.POLICY).astype(np.float32)
    return Row(tokens=trajectory.tokens, source=trajectory.source, weights={term: mask}, advantage=mask * np.float32(advantage),
               behaviour_logp=trajectory.behaviour_logp, version=trajectory.version, group=trajectory.group, prompt_id=trajectory.prompt_id)


def expert_row(trajectory: Trajectory, term: str) -> Row:
    """A demonstration as a training row: every expert token gets weight 1 in `term`."""
    mask = (trajectory.source == Source.EXPERT).astype(np.float32)
    return Row(tokens=trajectory.tokens, source=trajectory.source, weights={term: mask}, prompt_id=trajectory.prompt_id)


def demonstration(group: ScoredGroup) -> Trajectory:
    """A prompt's demonstration as a trajectory of the group."""
    prompt, response = group.prompt.tokens, group.prompt.demonstration
    source = np.repeat(np.array([Source.PROMPT, Source.EXPERT], np.int8), [len(prompt), len(response)])
    return Trajectory(group.prompt.id, np.concatenate([prompt, response]).astype(np.int32), source, Finish.STOP, group=group.group)


def with_demonstration(group: ScoredGroup, reward: float | None) -> ScoredGroup:
    """The group with its prompt's demonstration as one more trajectory, last; unchanged where there is none or it has no reward."""
    if group.prompt.demonstration is None or reward is None:
        return group
    return dataclasses.replace(group, trajectories=(*group.trajectories, demonstration(group)), rewards=np.append(np.asarray(group.rewards, np.float64), reward))


# name -> "module:Class"; imported on use, so that listing methods costs nothing and one broken file breaks one method
METHODS: dict[str, str] = {
    "sft": "tandem.algorithms.sft:SFT",
    "grpo": "tandem.algorithms.grpo:GRPO",
    "sft_rl": "tandem.algorithms.sft_rl:SFTThenRL",
    "static_mix": "tandem.algorithms.static_mix:StaticMix",
    "rl_with_sft": "tandem.algorithms.rl_with_sft:RLWithSFT",
    "alternating": "tandem.algorithms.alternating:Alternating",
    "chord_mu": "tandem.algorithms.chord:ChordMu",
    "chord_phi": "tandem.algorithms.chord:ChordPhi",
    "sft_is": "tandem.algorithms.chord:SFTIS",
    "luffy": "tandem.algorithms.luffy:LUFFY",
    "srft": "tandem.algorithms.srft:SRFT",
    "prefix_rft": "tandem.algorithms.prefix_rft:PrefixRFT",
    "uft": "tandem.algorithms.uft:UFT",
    "hpt": "tandem.algorithms.hpt:HPT",
    "visurf": "tandem.algorithms.visurf:ViSurf",
    "relift": "tandem.algorithms.relift:ReLIFT",
    "sasr": "tandem.algorithms.sasr:SASR",
    "ppo": "tandem.algorithms.ppo:PPO",
    "reft": "tandem.algorithms.reft:ReFT",
    "ift": "tandem.algorithms.ift:IFT",
    "carft": "tandem.algorithms.carft:CARFT",
}


def method_class(name: str) -> type[Method]:
    """The class of a registered method, or of a user's `file.py:Class`. Raises ValueError for anything else."""
    if name not in METHODS and ":" not in name:
        from tandem.engine.config import closest
        raise ValueError(f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}, or a path my_method.py:MyMethod")
    cls = load_object(METHODS.get(name, name), "method")
    if not (isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"method {name!r} is {cls!r}; expected a dataclass that inherits tandem.algorithms.base.Method")
    options = [field for field, kind in cls.__dict__.get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
    if options and "__dataclass_fields__" not in cls.__dict__:
        raise ValueError(f"method {name!r}: {cls.__name__} declares {', '.join(options)} but is no dataclass of its own, so they would be ignored; put @dataclass above it")
    return cls


def configured(block: Mapping[str, Any]) -> Method:
    """The method of a config's `method:` block, `name` and options."""
    return make_method(block["name"], {key: value for key, value in block.items() if key != "name"})


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build a method from the config's `method:` block; unknown options and values of the wrong type are a ValueError that names the key."""
    return build(method_class(name), options, "method", f"method {name!r}")
