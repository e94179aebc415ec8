"""Reward functions: finding them, telling their signature by parameter names, and calling them.

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
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.engine.config.options import typed
from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.foreign import message
from tandem.engine.core.loading import load_object
from tandem.engine.core.text import closest
from tandem.engine.core.types import RewardError
from tandem.rollout.rewards import values
from tandem.rollout.rewards.values import describe

TRACEBACK_CHARACTERS = 8_000
AT_THE_KEYBOARD = (KeyboardInterrupt, bdb.BdbQuit)  # raised by a person, in inline mode

BUILTIN: dict[str, str] = {
    "exact": "tandem.rollout.rewards.builtin:exact",
    "format": "tandem.rollout.rewards.builtin:matches_format",
    "length": "tandem.rollout.rewards.builtin:length",
    "math": "tandem.rollout.rewards.mathematics:equal",
    "reasoning_gym": "tandem.rollout.rewards.gym:score",
    "fake": "tandem.rollout.rewards.builtin:fake",
}
TELLTALE = {
    "tandem": {"completion"},
    "trl": {"completions", "prompts", "completion_ids", "completions_ids"},
    "verl": {"solution_str"},
}
GIVEN = {
    "tandem": {
        "prompt",
        "completion",
        "completion_ids",
        "prompt_id",
        "sample_index",
        "run_seed",
        "ground_truth",
    },
    "trl": {"prompts", "completions", "completion_ids", "completions_ids"},
    "verl": {"data_source", "solution_str", "ground_truth", "extra_info"},
}
NOT_COLUMNS = {
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "completions_ids",
}
ONLY_IN_TRL = {"trainer_state", "log_extra", "log_metric", "environments"}


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
            found = (
                ground_truth(columns) if name == "ground_truth" and self.kind != "trl" else columns
            )
            if name not in found:
                wanted = (
                    "one of the dataset columns reward_model.ground_truth, ground_truth, answer"
                    if found is not columns
                    else f"the dataset column {name!r}"
                )
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
        returned, trace = "", ""
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
            found = (values.Failure("exception", message(values.one_line(error))),) * samples
        entries = tuple(
            self.error(entry) if isinstance(entry, values.Failure) else entry for entry in found
        )
        return Reply(entries, returned, time.perf_counter() - start, trace)

    def values(self, result: Any, samples: int) -> tuple[float | values.Failure | None, ...]:
        """The function's result as one checked entry per text."""
        if self.signature.per_group:
            return values.of_group(result, samples)
        if self.signature.kind == "verl":
            return (values.of_verl(result),)
        return (values.of_sample(result),)

    def error(self, failure: values.Failure) -> RewardError:
        return RewardError(failure.kind, failure.message, self.signature.name)

    def arguments(self, call: Call) -> dict[str, Any]:
        """Keyword arguments for one call: what Tandem gives, then the columns the function names
        (all of them for **kwargs), then its options.
        """
        kind, columns = self.signature.kind, call.columns
        if missing := self.signature.missing(columns):
            raise LookupError(missing)
        if kind == "verl":
            given = {
                "data_source": columns.get("data_source", ""),
                "solution_str": call.texts[0],
                "extra_info": columns.get("extra_info", {}),
                **ground_truth(columns),
            }
        elif kind == "trl":
            n = len(call.texts)
            chat = not isinstance(call.prompt, str)
            ids = [i.tolist() for i in call.completion_ids]
            given = {
                "prompts": [call.prompt] * n,
                "completions": [
                    [{"role": "assistant", "content": t}] if chat else t for t in call.texts
                ],
                "completion_ids": ids,
                "completions_ids": ids,
            }
            given = {
                **{name: [value] * n for name, value in columns.items() if name not in NOT_COLUMNS},
                **given,
            }
        else:
            settable = {name for name, p in self.parameters.items() if p.kind is not p.KEYWORD_ONLY}
            given = {
                name: value
                for name, value in columns.items()
                if name not in NOT_COLUMNS and (name in settable or name not in self.parameters)
            }
            given |= ground_truth(columns) | {
                "prompt": call.prompt,
                "completion": call.texts[0],
                "completion_ids": call.completion_ids[0].tolist(),
                "prompt_id": call.prompt_id,
                "sample_index": call.first,
                "run_seed": self.seed,
            }
        return {
            **{
                name: value
                for name, value in given.items()
                if name in self.parameters or self.takes_any
            },
            **self.options,
        }

    @property
    def takes_any(self) -> bool:
        return any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())


def load_functions(config: RewardConfig, seed: int) -> tuple[RewardFunction, ...]:
    """Every function of `reward.functions`.

    Raises ConfigError for names, signatures and options that do not fit.
    """
    if not config.functions:
        raise ConfigError(
            f"reward.functions is empty: name {', '.join(BUILTIN)} or a path my_reward.py:score"
        )
    for name in config.options:
        if name not in config.functions:
            raise ConfigError(
                f"reward.options has a section {name!r}{closest(name, config.functions)}, "
                f"which is none of reward.functions: {', '.join(config.functions)}"
            )
    if len(set(config.functions)) < len(config.functions):
        raise ConfigError(
            f"reward.functions names a function twice: {', '.join(config.functions)}; give "
            "it one larger weight instead"
        )
    return tuple(
        load_function(name, config.options.get(name) or {}, seed) for name in config.functions
    )


def load_function(name: str, options: Mapping[str, Any], seed: int) -> RewardFunction:
    if name not in BUILTIN and ":" not in name:
        raise ConfigError(
            f"reward.functions: unknown reward {name!r}{closest(name, BUILTIN)}; known: "
            f"{', '.join(BUILTIN)}, or a path my_reward.py:score"
        )
    try:
        function = load_object(BUILTIN.get(name, name), "reward")
    except ValueError as error:
        raise ConfigError(f"reward.functions: {error}") from error
    parameters = parameters_of(name, function)
    kind = kind_of(name, parameters)
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"reward.options: {name!r} is {options!r}, expected a section of keyword arguments"
        )
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    free = [
        p
        for p, parameter in parameters.items()
        if p not in GIVEN[kind]
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    for option in options:
        if option in GIVEN[kind] or (option not in free and not any_name):
            raise ConfigError(
                f"reward {name!r} has no option {option!r}{closest(option, free)}, set in "
                f"reward.options; its options: {', '.join(free) or 'none'}"
            )
    if name in BUILTIN:
        options = typed_options(name, function, options)
    needed = [
        p for p in free if parameters[p].default is inspect.Parameter.empty and p not in options
    ]
    for p in needed:
        if p in ONLY_IN_TRL:
            raise ConfigError(
                f"reward {name!r} needs {p!r}, which only TRL's own trainer has; give it a default"
            )
        if kind == "verl" or (
            kind == "tandem" and parameters[p].kind is inspect.Parameter.KEYWORD_ONLY
        ):
            raise ConfigError(
                f"reward {name!r} needs the option {p!r}: set reward.options: {{{name}: "
                f"{{{p}: ...}}}}"
            )
    if (
        kind != "trl"
        and "ground_truth" in parameters
        and parameters["ground_truth"].default is inspect.Parameter.empty
    ):
        needed.append("ground_truth")
    return RewardFunction(
        Signature(name, kind, tuple(needed)), function, parameters, dict(options), seed
    )


def typed_options(name: str, function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a built-in function, held to its annotations. Raises ConfigError."""
    hints = typing.get_type_hints(function)
    found = {}
    for option, value in options.items():
        try:
            found[option] = typed(hints[option], value, f"reward.options.{name}.{option}")
        except ValueError as error:
            raise ConfigError(f"{error}, set in reward.options") from error
    return found


def parameters_of(name: str, function: Any) -> Mapping[str, inspect.Parameter]:
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"reward {name!r} is {describe(function)}, expected a function")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        raise ConfigError(
            f"reward {name!r}: Python cannot tell its parameters; wrap it in a function of your own"
        ) from None
    return parameters


def kind_of(name: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """tandem | trl | verl, or a ConfigError that lists all three."""
    named = {
        p
        for p, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    kinds = [kind for kind, telltale in TELLTALE.items() if named & telltale]
    if kinds == ["tandem", "trl"] and named & TELLTALE["trl"] == {"completion_ids"}:
        kinds = ["tandem"]  # completion_ids beside completion: those of the one sample
    if len(kinds) != 1:
        raise ConfigError(
            (
                f"reward {name!r} has the parameters "
                f"({', '.join(map(str, parameters.values()))}), which "
            )
            + (f"mix the signatures {' and '.join(kinds)}" if kinds else "fit no known signature")
            + "; expected one of: score(prompt, completion, **columns) -> float; TRL's "
            "score(completions, prompts, **columns) -> list of floats; "
            "verl's score(data_source, solution_str, ground_truth, extra_info) -> float"
        )
    return kinds[0]


def ground_truth(columns: Mapping[str, Any]) -> dict[str, Any]:
    """{"ground_truth": expected answer}: reward_model.ground_truth (verl's data format), else the
    column ground_truth or answer; {} without any.
    """
    model = columns.get("reward_model")
    for place, name in (
        (model if isinstance(model, Mapping) else {}, "ground_truth"),
        (columns, "ground_truth"),
        (columns, "answer"),
    ):
        if name in place:
            return {"ground_truth": place[name]}
    return {}
