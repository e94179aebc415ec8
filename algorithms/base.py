"""What a method is: which rows a step trains on (`rows`), with which objectives and coefficients
(`terms`), and a little state.

A method is a dataclass that inherits `Method`; its fields are the keys allowed under `method:` in a
config. It never sees the learner: rows and terms are all it hands over. A user's method is a file
of its own, named by path: `method: {name: my_method.py:MyMethod}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tandem.algorithms.parts.diagnostics import critic_diagnostics
from tandem.algorithms.parts.objectives.correction import RolloutCorrection
from tandem.algorithms.parts.reductions import Reduction
from tandem.engine.config.names import DEFAULT_SOURCE, split_view
from tandem.engine.core.types import (
    Codec,
    GenRequest,
    Prompt,
    Row,
    Sampling,
    ScoredGroup,
    Trajectory,
)
from tandem.engine.model.quantities import Quantity

TOKEN_MEAN = Reduction()  # where a term is given none


@dataclass(frozen=True)
class Term:
    """One summand of the loss, over all rows of one optimizer update:

        coefficient * ( sum_rows sum_t weight * scale * correction * objective ) / Z

    `weight` is the row's, `scale` and Z are the reduction's (see parts/reductions.py), `correction`
    is 1 unless given.

    `name` is the key into `Row.weights`. `needs` names the streams the objective cannot do without
    (entropy, value) or that the loop has to fill in before `Method.credit` (old_logp, ref_logp,
    old_value, logp_of(MODEL)), or that rows bring. `quantities` are what else the objective asks of
    the full distribution at its tokens, by the names under which it reads them: see
    engine/model/quantities.py. Each is differentiable, and is made for all terms in one pass.

    `unit` is what the objective says one number of: "token", "row" or "group". For rows it is
    called with `Units`, for groups with `Groups` (parts/objectives/units.py), the sums above are
    over units, and Z counts them. A unit's weight is that of its tokens, which must have the same.
    A group is never split over micro-batches.
    """

    name: str
    objective: Callable
    reduction: Reduction = TOKEN_MEAN  # not given: unit_mean, where the unit is no token
    coefficient: float = 1.0
    correction: RolloutCorrection | None = None
    needs: frozenset[str] = frozenset()
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    together: bool = False  # all rows of a group stand in one micro-batch
    unit: str = "token"

    def __post_init__(self):
        if self.unit == "group":
            object.__setattr__(self, "together", True)  # the dataclass is frozen
        if self.unit != "token" and self.reduction is TOKEN_MEAN:
            object.__setattr__(self, "reduction", Reduction("unit_mean"))


def quantities_of(terms: Sequence[Term]) -> dict[str, Quantity]:
    """All that the terms ask for. Two may share a name if they mean the same by it."""
    found: dict[str, Quantity] = {}
    for term in terms:
        found.update(term.quantities)
    return found


def views_of(terms: Sequence[Term]) -> list[str]:
    """The views that quantities of the terms look from."""
    found = set()
    for quantity in quantities_of(terms).values():
        found |= {split_view(model)[1] for model in quantity.models}
    return sorted(found - {""})


@dataclass(frozen=True)
class Budget:
    """What the config allows per step; a method may ask for less."""

    prompts: int  # prompts to roll out
    samples: int  # rollouts per prompt
    experts: int  # demonstrations
    steps: int  # training steps of the whole run; one may take several optimizer updates
    seed: int = 0  # of the run, for draws that a method makes itself
    model: str = ""  # folder of the model that the run starts from
    # for methods that write prompts of their own; None where no dataset is read
    codec: Codec | None = None
    max_prompt_tokens: int | None = None  # data.max_prompt_tokens; None: not known
    vocabulary: int | None = None  # token ids of the model are below it; None: not known
    # rows, or pairs, in an epoch of each source of demonstrations, "experts" being data.experts
    sources: Mapping[str, int] = field(default_factory=dict)
    models: tuple[str, ...] = ()  # names of those that terms may ask; (): not known


@dataclass(frozen=True)
class Demand:
    """What one step needs.

    `experts` are demonstrations of data.experts, or {source: how many} of several, "experts" being
    data.experts and the others those of data.sources; a pair counts as one.

    `optimizer` names the set of moments (a new name starts from zero); `learning_rate` None: the
    config's.

    `updates` are the optimizer steps on this step's batch, each on its own part of the rows (whole
    groups stay together), also without rollouts; more than 1 gives every row the `old_logp` of
    before the first. None is learner.updates_per_batch, epochs_per_batch times, and 1 without
    rollouts.

    `stop` is the reason why the run ends with this step. If the step asks for neither prompts nor
    demonstrations, the run ends instead of it. Either way it ends as after run.steps: evaluation,
    checkpoint, model. The next steps are asked for no more, nor are they after a resume.
    """

    prompts: int = 0
    experts: int | Mapping[str, int] = 0
    learning_rate: float | None = None
    optimizer: str = "main"
    updates: int | None = None
    stop: str = ""
    # the weights this step starts from are the reference from now on
    set_reference: bool = False

    @property
    def by_source(self) -> dict[str, int]:
        """{source: demonstrations} of those that are asked for any."""
        if isinstance(self.experts, Mapping):
            return {name: count for name, count in self.experts.items() if count}
        return {DEFAULT_SOURCE: self.experts} if self.experts else {}

    @property
    def ends_before(self) -> bool:
        """Whether the run ends instead of this step."""
        return bool(self.stop) and not self.prompts and not self.by_source


@dataclass(frozen=True, eq=False)
class Batch:
    """Everything a method may look at when it makes the rows of one step."""

    step: int
    groups: tuple[ScoredGroup, ...]
    # as the demand names their sources; the two answers of a pair are neighbours of one `group`
    experts: tuple[Trajectory, ...]
    # each metric as last measured, in the step before if it did, and eval/... of the latest
    # evaluation
    signals: Mapping[str, float] = field(default_factory=dict)
    # rollouts may be older than the learner: correct for it
    off_policy: bool = False
    budget: Budget = Budget(0, 0, 0, 0)  # what the config allows


@dataclass
class Method:
    """Base of all methods.

    Subclasses are dataclasses and override `rows` and `terms`, and `demand` where not every step is
    alike.
    """

    title: ClassVar[str] = ""  # one line for `tandem methods`
    paper: ClassVar[str] = ""  # arXiv id, or "" where the method has no single paper
    uses_experts: ClassVar[bool] = False  # a config without demonstrations is then an error
    # a source of pairs (chosen, rejected) is then wanted; without, it is an error
    uses_pairs: ClassVar[bool] = False
    takes_pairs: ClassVar[bool] = False  # such a source is no error, and none is wanted
    uses_rollouts: ClassVar[bool] = True  # a config without prompts is then an error
    # False: it has rewards of its own or needs none; a rollout that no function scores has reward 0
    uses_rewards: ClassVar[bool] = True

    # `experts` of the step's prompts are drawn from data.experts, with their demonstrations
    prompts_from_experts: ClassVar[bool] = False
    # the reward functions also score each prompt's demonstration
    scores_demonstrations: ClassVar[bool] = False
    # what `again` asks for joins the group's trajectories; False: it takes their place, and they
    # are ScoredGroup.earlier
    waves_join: ClassVar[bool] = False
    # False: rollouts train something without an advantage too (UFT's hints), so one sample per
    # prompt is a warning only
    needs_groups: ClassVar[bool] = True
    # the PolicyLoss of a method with an RL half: see algorithms/rl_method.py
    policy: ClassVar[Any] = None
    # the DemoLoss of a method with an SFT half, and the term it makes: see parts/demos.py
    demos: ClassVar[Any] = None
    demos_term: ClassVar[str] = "expert"

    # Experimental, for methods whose log-probs are not those of the tokens' own context, or that
    # need more than log-probs (IFT, CARFT): what the learner calls in the place of Policy.forward
    # in every step, a picklable callable
    #   forward(policy: Policy, view: View) -> {name: float32 [n]}
    # with what Policy.forward returns and more, which are streams of every objective's tokens. It
    # runs on the policy's modules (trunk, head, critic), all of them in the same order on every
    # rank, and every parameter takes part, if only times zero: ZeRO-3 would keep the last step's
    # gradient of one that does not. Log-probs from before the update remain the ordinary ones.
    forward: ClassVar[Callable | None] = None
    # dimensions of the critic's hidden layer, 0: a linear critic
    embedding: ClassVar[int] = 0

    @property
    def compares_with(self) -> tuple[str, ...]:
        """Names of the models that the config must have beside the policy, such as a teacher."""
        return () if self.demos is None else self.demos.compares_with

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        """What step `step` needs. `signals` are those of Batch.

        A pure function of its arguments and of the method's state: it is also asked for steps that
        are only looked at, as often as the run likes. What has to be remembered goes into `commit`.
        """
        return Demand(
            prompts=budget.prompts if self.uses_rollouts else 0,
            experts=budget.experts if self.uses_experts else 0,
        )

    def commit(self, step: int, demand: Demand, signals: Mapping[str, float]) -> None:
        """The run will do `demand` in `step`. Called once per step, in order, up to `staleness`
        steps ahead, before the requests of the step are made.
        """

    def request(
        self, group: int, prompt: Prompt, sampling: Sampling, step: int, budget: Budget
    ) -> GenRequest:
        """The rollout request for one prompt; override to force a response prefix (Prefix-RFT,
        UFT).
        """
        return GenRequest(group=group, prompt=prompt, samples=budget.samples, sampling=sampling)

    def again(
        self, group: ScoredGroup, wave: int, request: GenRequest, budget: Budget
    ) -> GenRequest | None:
        """The request to ask once more for a group that was scored: with a hint, feedback, a forced
        prefix, `dataclasses.replace(request, ...)`. None: the group is as it is to be.

        `request` is what the group answers, `wave` the number of the wave to come, from 1. What
        comes back takes the group's place, or joins it (`waves_join`); then it is asked again. A
        pure function of its arguments, which a resumed run asks anew.
        """
        return None

    def accept(self, group: ScoredGroup) -> bool:
        """Whether a scored group counts towards the batch; False draws another prompt in its place
        (DAPO's dynamic sampling).
        """
        return True

    def score(self, batch: Batch) -> Batch:
        """The batch with rewards of the method's own in its groups, where a reward takes more than
        one prompt (all documents of a query) or is learnt; called before `rows`, and what the run
        reports as rewards is what it returns. Groups and trajectories stay as they are.
        """
        return batch

    def rows(self, batch: Batch) -> list[Row]:
        raise NotImplementedError

    def terms(self, batch: Batch) -> list[Term]:
        raise NotImplementedError

    @property
    def critic(self) -> bool:
        """Whether the learner gets a value head."""
        return self.policy is not None and self.policy.advantage == "gae"

    def probes(self, batch: Batch) -> Mapping[str, Quantity]:
        """What `credit` wants to know of the present policy at the trained tokens of all rows,
        before the update: quantities by the names of the streams that they become. In one forward
        without gradient, with `old_logp` where a term needs that.
        """
        return {}

    def credit(self, rows: Sequence[Row], batch: Batch) -> Sequence[Row]:
        """From rewards to advantages, where that takes more than rewards: called with the rows of
        `rows`, after the loop has filled in the streams that terms need: old_logp and old_value
        (one forward of the learner, before the update), ref_logp (of the reference), each in the
        rows that do not bring it. Returns rows in the same order.
        """
        if self.demos is not None:
            rows = self.demos.credit(rows, self.demos_term, batch)
        return self.policy.credit(rows, batch) if self.critic else rows

    def diagnostics(self, rows: Sequence[Row]) -> dict[str, float]:
        """Numbers about the rows of a step, as `credit` returned them, for its report."""
        return critic_diagnostics(rows)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every optimizer step with its metrics (grad_norm, entropy, loss/TERM,
        reward/mean, ...) and eval/... of the latest evaluation, for methods that react to them.
        """

    def metrics(self, step: int) -> dict[str, float]:
        """Numbers of the method's own for the step's report, e.g. mu."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Picklable state that must survive a resume; most methods have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state, but the checkpoint holds "
                f"{sorted(state)} for it"
            )
