"""A reward function, ready to be called, in any of three signatures.

    tandem   def score(prompt, completion, **columns) -> float                              one call
             per sample
    trl      def score(completions, prompts, **columns) -> list[float | None]               one call
             per group
    verl     def score(data_source, solution_str, ground_truth, extra_info) -> float | dict  one
             call per sample

A call never raises: what goes wrong comes back as a RewardError in the place of the value. Light
imports only, as worker processes load this.
"""

from __future__ import annotations

import asyncio
import bdb
import inspect
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.engine.core.foreign import message
from tandem.engine.core.types import RewardError
from tandem.rollout.rewards import values

TRACEBACK_CHARACTERS = 8_000
AT_THE_KEYBOARD = (KeyboardInterrupt, bdb.BdbQuit)  # raised by a person, in inline mode
# a dataset's columns of these names are not handed on: the function is given others
NOT_COLUMNS = {
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "completions_ids",
}


@dataclass(frozen=True, eq=False)
class Call:
    """What there is to score: all samples of a group, or (for functions that take one sample) one
    of them.
    """

    prompt_id: str
    prompt: Any  # str or chat messages
    columns: Mapping[str, Any]  # the dataset row
    texts: tuple[str, ...]
    completion_ids: tuple[np.ndarray, ...]  # int32 [T_response] each
    first: int = 0  # number of texts[0] within the group


@dataclass(frozen=True)
class Reply:
    """One entry per text: the value, None where the function does not apply (TRL), or what went
    wrong.
    """

    values: tuple[float | RewardError | None, ...]
    returned: str = ""  # type that the function returned, for people
    seconds: float = 0.0
    traceback: str = ""


@dataclass(frozen=True)
class Signature:
    """What the runner must know of a function; travels between processes."""

    name: str  # as written in reward.functions
    kind: str  # tandem | trl | verl
    columns: tuple[str, ...]  # dataset columns it cannot do without

    @property
    def per_group(self) -> bool:
        return self.kind == "trl"

    def missing(self, columns: Mapping[str, Any]) -> str:
        """What is wrong with a dataset row for this function, or ''."""
        for name in self.columns:
            found = columns
            wanted = f"the dataset column {name!r}"
            if name == "ground_truth" and self.kind != "trl":
                found = ground_truth(columns)
                wanted = (
                    "one of the dataset columns reward_model.ground_truth, ground_truth, answer"
                )
            if name not in found:
                return (
                    f"reward {self.name!r} needs {wanted}; the row has "
                    f"{', '.join(columns) or 'none'}"
                )
        return ""


@dataclass(frozen=True)
class RewardFunction:
    """A user's or built-in function, ready to be called with a `Call`."""

    signature: Signature
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    options: Mapping[str, Any]
    seed: int

    def __call__(
        self, call: Call, passes: tuple[type[BaseException], ...] = AT_THE_KEYBOARD
    ) -> Reply:
        """Score a call. `passes`: what is not taken for a failure of the reward, but raised."""
        start = time.perf_counter()
        samples = len(call.texts)
        returned = ""
        trace = ""
        try:
            result = self.function(**self.arguments(call))
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
            returned = message(type(result).__name__, 60)
            if inspect.isasyncgen(result):
                result = asyncio.run(values.collect(result, samples))
            found = self.values(result, samples)
        except passes:
            raise
        except BaseException as error:  # a SystemExit in a reward must not end the run either
            trace = message(traceback.format_exc(), TRACEBACK_CHARACTERS)
            words = message(values.one_line(error))
            found = (values.Failure("exception", words),) * samples
        entries = []
        for entry in found:
            if isinstance(entry, values.Failure):
                entry = RewardError(entry.kind, entry.message, self.signature.name)
            entries.append(entry)
        seconds = time.perf_counter() - start
        return Reply(tuple(entries), returned, seconds, trace)

    def values(self, result: Any, samples: int) -> tuple[float | values.Failure | None, ...]:
        """The function's result as one checked entry per text."""
        if self.signature.per_group:
            return values.of_group(result, samples)
        if self.signature.kind == "verl":
            return (values.of_verl(result),)
        return (values.of_sample(result),)

    def arguments(self, call: Call) -> dict[str, Any]:
        """Keyword arguments for one call: what Tandem gives, then the columns the function names
        (all of them for **kwargs), then its options.
        """
        missing = self.signature.missing(call.columns)
        if missing:
            raise LookupError(missing)
        if self.signature.kind == "trl":
            given = given_trl(call)
        elif self.signature.kind == "verl":
            given = given_verl(call)
        else:
            given = self.given(call)
        if not takes_any(self.parameters):
            given = {name: given[name] for name in given if name in self.parameters}
        return {**given, **self.options}

    def given(self, call: Call) -> dict[str, Any]:
        """For Tandem's own signature. A column is never given for an option (after `*`)."""
        columns = own_columns(call)
        for name, parameter in self.parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                columns.pop(name, None)
        return {
            **columns,
            **ground_truth(call.columns),
            "prompt": call.prompt,
            "completion": call.texts[0],
            "completion_ids": call.completion_ids[0].tolist(),
            "prompt_id": call.prompt_id,
            "sample_index": call.first,
            "run_seed": self.seed,
        }


def own_columns(call: Call) -> dict[str, Any]:
    """The row without columns that have the name of something else that a function is given."""
    return {name: value for name, value in call.columns.items() if name not in NOT_COLUMNS}


def given_trl(call: Call) -> dict[str, Any]:
    """Lists with an entry per sample of the group."""
    samples = len(call.texts)
    completions: list[Any] = list(call.texts)
    if not isinstance(call.prompt, str):
        completions = [[{"role": "assistant", "content": text}] for text in call.texts]
    ids = [one.tolist() for one in call.completion_ids]
    columns = {name: [value] * samples for name, value in own_columns(call).items()}
    return {
        **columns,
        "prompts": [call.prompt] * samples,
        "completions": completions,
        "completion_ids": ids,
        "completions_ids": ids,
    }


def given_verl(call: Call) -> dict[str, Any]:
    return {
        "data_source": call.columns.get("data_source", ""),
        "solution_str": call.texts[0],
        "extra_info": call.columns.get("extra_info", {}),
        **ground_truth(call.columns),
    }


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def ground_truth(columns: Mapping[str, Any]) -> dict[str, Any]:
    """{"ground_truth": expected answer}: reward_model.ground_truth (verl's data format), else the
    column ground_truth or answer; {} without any.
    """
    model = columns.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        return {"ground_truth": model["ground_truth"]}
    for name in ("ground_truth", "answer"):
        if name in columns:
            return {"ground_truth": columns[name]}
    return {}
