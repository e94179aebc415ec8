"""The carriers: every arrow between two stages of a training step is one of these frozen
dataclasses.

    PromptSource -Prompt-> Producer -GenRequest-> rollout pool -Trajectory-> rewards -ScoredGroup-+
    ExpertSource -Trajectory (source EXPERT)------------------------------------------------------+
                                                                                                  v
                      Method.rows -Row-> packer -StepPlan-> learner -StepReport-> telemetry

Invariants:
  * A sequence is flat: no padding and no prompt/response halves. All streams of a sequence have its
    length `T`.
  * A stream value at position t belongs to token t, so log-prob t is log pi(token_t | token_<t);
    position 0 has none.
  * Text stops at the reward. Nothing is re-tokenised after `Trajectory`.
  * Only a weight version and numbers travel back from the learner to the rollout side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from numbers import Real
from typing import Any, Protocol

import numpy as np

from tandem.engine.core.arrays import at_every_token, check_lengths, length
from tandem.engine.core.errors import CarrierError

NO_VERSION = -2  # a weight version that no token has; -1 stands at tokens that no engine sampled


class Source(IntEnum):
    """Where a token came from."""

    PROMPT = 0  # given by the dataset, never trained
    POLICY = 1  # sampled from our own policy by a rollout engine
    EXPERT = 2  # written by the expert, in a demonstration
    PREFIX = 3  # expert tokens that a rollout was made to start from (Prefix-RFT)
    HINT = 4  # expert tokens shown to the whole group (UFT)
    TOOL = 5  # returned by an environment, never trained


class Finish(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end-of-sequence token (it belongs to the response)
    LENGTH = "length"  # cut at max_tokens: there is no end-of-sequence token
    ABORT = "abort"  # the engine gave up; never trained on


@dataclass(frozen=True, eq=False)
class Prompt:
    """One dataset row, tokenised once."""

    id: str
    tokens: np.ndarray  # int32 [T_prompt]
    content: Any  # str or chat messages, as rewards see it
    columns: Mapping[str, Any] = field(default_factory=dict)  # the dataset row, unchanged
    # int32 [T_demo] response ids with end-of-sequence, if the row has one
    demonstration: np.ndarray | None = None


class Codec(Protocol):
    """From words to ids and back, for methods that write prompts: engine/data/codec.py."""

    def encode(self, content: Any) -> np.ndarray | None:
        """int32 [T] of plain text or chat messages, without tools; None if that is longer than the
        run allows. Raises ConfigError for a control token spelled out in it.
        """
        ...

    def decode(self, response: np.ndarray) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    The behaviour policy is the temperature-scaled distribution; the learner divides its logits by
    the same temperature.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class GenRequest:
    """Ask for `samples` continuations of one prompt; all of them go to the same engine."""

    group: int  # ordinal, unique in a run, also after a resume
    prompt: Prompt
    samples: int
    sampling: Sampling
    # forced first response ids per sample; () = none has any
    prefixes: tuple[np.ndarray, ...] = ()
    prefix_source: Source = Source.PREFIX
    attempt: int = 0  # how often this group was re-issued after an engine died
    wave: int = 0  # how often the method asked again for the group: see Method.again


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sequence: prompt and response in one, with what is known about each token."""

    prompt_id: str
    tokens: np.ndarray  # int32 [T]
    source: np.ndarray  # int8 [T], values of Source
    finish: Finish
    # float32 [T], NaN where no rollout engine sampled the token
    behaviour_logp: np.ndarray | None = None
    # int32 [T], weight version that sampled the token, -1 elsewhere
    version: np.ndarray | None = None
    group: int = -1  # of rollouts, and of the two answers of a pair
    wave: int = 0  # that of the request it answers
    dataset: str = ""  # of a demonstration: the name of its source, "experts" or of data.sources
    columns: Mapping[str, Any] = field(default_factory=dict)  # its dataset row, unchanged
    role: str = ""  # what tells it apart, from a column; of a pair "chosen" or "rejected"

    def __post_init__(self):
        check_lengths(
            "Trajectory",
            len(self.tokens),
            source=self.source,
            behaviour_logp=self.behaviour_logp,
            version=self.version,
        )

    @property
    def response(self) -> np.ndarray:
        """int32: every token that is not context."""
        return self.tokens[self.source != Source.PROMPT]


@dataclass(frozen=True)
class RewardError:
    """A reward that failed; never a silent zero."""

    kind: str  # timeout | exception | not_finite | arity | crash
    message: str
    function: str


@dataclass(frozen=True)
class RewardOutcome:
    """What the reward functions said about one trajectory."""

    value: float | None  # weighted sum, None when `error` is set
    parts: Mapping[str, float] = field(default_factory=dict)
    error: RewardError | None = None


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """All trajectories of one prompt with their rewards, ready for a method."""

    group: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    rewards: np.ndarray  # float32 [n], finite
    outcomes: tuple[RewardOutcome, ...] = ()
    texts: tuple[str, ...] = ()
    # of prompt.demonstration, if the method asked for it to be scored
    demonstration_reward: float | None = None
    earlier: tuple[ScoredGroup, ...] = ()  # waves that this one took the place of, oldest first
    waves: int = 0  # how often the method had asked again for it, also in vain
    unscored: tuple[Trajectory, ...] = ()  # of waves without a usable reward, which are left out
    # the prompt of each trajectory once a wave joined, which may have another; else ()
    prompts: tuple[Prompt, ...] = ()

    def __post_init__(self):
        check_lengths("ScoredGroup", len(self.trajectories), rewards=self.rewards)

    def prompt_of(self, sample: int) -> Prompt:
        """What trajectory `sample` was sampled behind."""
        return self.prompts[sample] if self.prompts else self.prompt


@dataclass(frozen=True, eq=False)
class Row:
    """One training sequence, as a method hands it to the packer.

    `weights[term][t]` is the factor on token t's loss in that term; zero means the token is not
    part of the term and is not counted in its denominator. A token that must be counted but not
    pushed gets advantage 0 instead.

    `streams[name][t]` is what is known about token t: float32 [T], NaN where it is not known. A
    single number stands for the same at every token, None for a stream that the row does not have.
    A method may add names of its own. Those that the engine knows:

        advantage        what the objectives of RL push by
        behaviour_logp   log-prob under the policy that sampled the token, at its temperature
        old_logp         log-prob of the present policy before the update; absent: that of the
                         update's own forward
        ref_logp         log-prob of the reference policy
        logp:NAME        log-prob of the model NAME; logp:NAME@VIEW behind that other prompt
        old_value        the critic's value of the state in which the token was chosen, before the
                         update
        returns          what that value should have been

    `views` are other prompts by name, in the place of the tokens that `source` calls PROMPT at the
    row's beginning: a model can be asked for the response behind one of them. Its ids stay as they
    are.
    """

    tokens: np.ndarray  # int32 [T]
    source: np.ndarray  # int8 [T]
    weights: Mapping[str, np.ndarray]  # {term: float32 [T]}
    streams: Mapping[str, Any] = field(default_factory=dict)  # {name: float32 [T]}
    version: np.ndarray | None = None  # int32 [T]: weight version that sampled the token
    group: int = -1
    prompt_id: str = ""
    role: str = ""  # what tells it apart in its group, for objectives on whole rows
    views: Mapping[str, np.ndarray] = field(default_factory=dict)  # {name: int32 [T of a prompt]}

    def __post_init__(self):
        if not isinstance(self.streams, Mapping):
            raise CarrierError(
                f"Row.streams is {self.streams!r}, "
                "expected a mapping {name: one number per token}"
            )
        if not isinstance(self.weights, Mapping):
            raise CarrierError(
                f"Row.weights is {self.weights!r}, "
                "expected a mapping {term: one number per token}"
            )
        size = length("Row.tokens", self.tokens)
        streams = {}
        for name, stream in self.streams.items():
            if isinstance(stream, Real):
                stream = at_every_token(f"Row.streams[{name!r}]", stream, size)
            if stream is not None:
                streams[name] = stream
        object.__setattr__(self, "streams", streams)  # the dataclass is frozen
        named = {f"weights[{name!r}]": weight for name, weight in self.weights.items()}
        numbers = {f"streams[{name!r}]": stream for name, stream in streams.items()}
        check_lengths("Row", size, source=self.source, version=self.version, **named, **numbers)
        for name, weight in named.items():
            if weight is None or len(weight) == 0:
                raise CarrierError(
                    f"Row.{name} is {weight!r}, expected one number per token of a row that "
                    "has at least two tokens"
                )
            if np.any(weight[0] != 0):
                raise CarrierError(
                    f"Row.{name}[0] is {weight[0]}, must be 0: the first token has no "
                    "log-prob, so it cannot be trained"
                )

    @property
    def trained(self) -> np.ndarray:
        """bool [T]: tokens that some term uses."""
        mask = np.zeros(len(self.tokens), bool)
        for weight in self.weights.values():
            mask |= weight != 0
        return mask

    @property
    def response_start(self) -> int:
        """The first token that is not of the prompt."""
        outside = self.source != Source.PROMPT
        return int(outside.argmax()) if outside.any() else len(self.source)

    def at_view(self, name: str) -> Row:
        """The response behind another prompt: the same tokens are trained, without streams.

        Raises CarrierError if the row has no such view, or trains a token of its own prompt.
        """
        if name not in self.views:
            known = ", ".join(self.views) or "none"
            raise CarrierError(f"the row has no view {name!r}; its views: {known}")
        start = self.response_start
        if self.trained[:start].any():
            raise CarrierError(
                f"a token of the prompt is trained, which the view {name!r} does not have"
            )
        prompt = self.views[name]
        source = np.full(len(prompt), Source.PROMPT, self.source.dtype)
        untrained = np.zeros(len(prompt), np.float32)
        weights = {}
        for term, weight in self.weights.items():
            weights[term] = np.concatenate([untrained, weight[start:]])
        return Row(
            tokens=np.concatenate([prompt, self.tokens[start:]]).astype(self.tokens.dtype),
            source=np.concatenate([source, self.source[start:]]),
            weights=weights,
            group=self.group,
            prompt_id=self.prompt_id,
            role=self.role,
        )

    def with_term(self, term: str, weight: np.ndarray) -> Row:
        """The row with `weight` (float32 [T]) in `term`, in the place of what it had there.

        Raises CarrierError as any row does.
        """
        return replace(self, weights={**self.weights, term: weight})

    def with_streams(self, **streams: Any) -> Row:
        """The row with these streams (float32 [T], a number, or None to drop it), in the place of
        those of the same name.

        Raises CarrierError as any row does.
        """
        return replace(self, streams={**self.streams, **streams})


@dataclass(frozen=True, eq=False)
class Bins:
    """The rows of a micro-batch behind other prompts, each alone, with the same n trained tokens
    in the same order; fields as in MicroBatch.
    """

    tokens: np.ndarray
    positions: np.ndarray
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank runs in one forward: rows packed into `B` bins of length `L`, and the streams
    of the `n` trained tokens.

    The hidden state at flat position `index[i]` of the bins predicts trained token i. The last
    trained token of a row, and what follows it, predicts nothing and is not in the bins. Where rows
    share a prompt, all of them are predicted from the one copy of it, and each row's own tokens are
    a block that sees this copy and itself.
    """

    tokens: np.ndarray  # int64 [B, L], padded with 0
    positions: np.ndarray  # int64 [B, L], position in the row; padding is a row of its own
    index: np.ndarray  # int64 [n]
    target: np.ndarray  # int64 [n] token ids
    weights: Mapping[str, np.ndarray]  # {term: float32 [n]}
    # {term: float32 [n]} reduction factor of the row, before the division by Z
    scale: Mapping[str, np.ndarray]
    segment: np.ndarray  # int64 [n] row number within this micro-batch, 0-based
    group: np.ndarray  # int64 [n]
    source: np.ndarray  # int8 [n]
    # {name: float32 [n]}: the streams that at least one row of the step has, NaN for other rows
    streams: Mapping[str, np.ndarray]
    fresh: np.ndarray  # bool [n]: sampled by a rollout engine with the learner's present weights
    rows: tuple[int, ...]  # positions in the step's row list
    real_tokens: int  # all tokens of the rows, prompts counted with each
    # int64 [2, B, L]: block of each token, and block of its prompt; None: no row shares its prompt
    prompt_blocks: np.ndarray | None = None
    roles: tuple[str, ...] = ()  # of each row, in the order of `rows`
    # {view: the rows behind it} of views that quantities look from; a row without stands as it is
    views: Mapping[str, Bins] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One optimizer step, complete: every rank gets its own list of micro-batches, all ranks
    equally many.
    """

    terms: tuple[Any, ...]  # algorithms.base.Term
    denominators: Mapping[str, float]  # {term: Z}, counted over the whole global batch
    micro_batches: tuple[tuple[MicroBatch, ...], ...]  # [rank][k]
    learning_rate: float
    optimizer: str = "main"  # which set of optimizer moments this step uses
    temperature: float = 1.0
    entropy: bool = False  # whether the head also computes token entropies
    # {name: engine.model.quantities.Quantity} that terms ask for
    quantities: Mapping[str, Any] = field(default_factory=dict)
    forward: Any = None  # Method.forward, in the place of Policy.forward
    step: int = 0  # of the run: what of the model trains may change over time


@dataclass(frozen=True)
class StepReport:
    """What the learner says of one optimizer step; every number is over the whole global batch."""

    # loss/TERM, grad_norm, gap/max, gap/mean, entropy, ...
    metrics: Mapping[str, float]
    skipped: bool = False  # non-finite gradient: the weights were left alone
    seconds: float = 0.0
