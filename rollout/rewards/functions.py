"""Finding reward functions, telling their signature by parameter names, checking their options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from tandem.engine.config.options import typed
from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.loading import load_object
from tandem.engine.core.text import closest
from tandem.rollout.rewards.api import RewardFunction, Signature, takes_any
from tandem.rollout.rewards.values import describe

BUILTIN: dict[str, str] = {
    "exact": "tandem.rollout.rewards.builtin:exact",
    "format": "tandem.rollout.rewards.builtin:matches_format",
    "length": "tandem.rollout.rewards.builtin:length",
    "math": "tandem.rollout.rewards.mathematics:equal",
    "reasoning_gym": "tandem.rollout.rewards.gym:score",
    "fake": "tandem.rollout.rewards.builtin:fake",
}
# parameters by which each signature is told
TELLTALE = {
    "tandem": {"completion"},
    "trl": {"completions", "prompts", "completion_ids", "completions_ids"},
    "verl": {"solution_str"},
}
# what is given to each, and so no option
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
ONLY_IN_TRL = {"trainer_state", "log_extra", "log_metric", "environments"}


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
    functions = []
    for name in config.functions:
        options = config.options.get(name) or {}
        functions.append(load_function(name, options, seed))
    return tuple(functions)


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
    free = [p for p in named(parameters) if p not in GIVEN[kind]]
    check_options(name, options, free, kind, takes_any(parameters))
    if name in BUILTIN:
        options = typed_options(name, function, options)
    needed = []
    for p in free:
        if required(parameters[p]) and p not in options:
            check_column(name, kind, parameters[p])
            needed.append(p)
    answer = parameters.get("ground_truth")
    if kind != "trl" and answer is not None and required(answer):
        needed.append("ground_truth")
    signature = Signature(name, kind, tuple(needed))
    return RewardFunction(signature, function, parameters, dict(options), seed)


def check_options(
    name: str,
    options: Mapping[str, Any],
    free: list[str],
    kind: str,
    any_name: bool,
) -> None:
    """Raise ConfigError for an option that the function does not take; `free`: those it names."""
    for option in options:
        unknown = option not in free and not any_name
        if unknown or option in GIVEN[kind]:
            raise ConfigError(
                f"reward {name!r} has no option {option!r}{closest(option, free)}, set in "
                f"reward.options; its options: {', '.join(free) or 'none'}"
            )


def typed_options(name: str, function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a built-in function, held to its annotations. Raises ConfigError."""
    hints = typing.get_type_hints(function)
    found = {}
    for option, value in options.items():
        key = f"reward.options.{name}.{option}"
        try:
            found[option] = typed(hints[option], value, key)
        except ValueError as error:
            raise ConfigError(f"{error}, set in reward.options") from error
    return found


def check_column(name: str, kind: str, parameter: inspect.Parameter) -> None:
    """Raise ConfigError if a parameter that the function needs can be no dataset column."""
    needed = parameter.name
    if needed in ONLY_IN_TRL:
        raise ConfigError(
            f"reward {name!r} needs {needed!r}, which only TRL's own trainer has; give it a default"
        )
    keyword_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    if kind == "verl" or (kind == "tandem" and keyword_only):
        raise ConfigError(
            f"reward {name!r} needs the option {needed!r}: set reward.options: {{{name}: "
            f"{{{needed}: ...}}}}"
        )


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


def named(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """All but *args and **kwargs."""
    names = []
    for p in parameters.values():
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            names.append(p.name)
    return names


def required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def kind_of(name: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """tandem | trl | verl, or a ConfigError that lists all three."""
    by_name = set()
    for p in parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            by_name.add(p.name)
    kinds = [kind for kind, telltale in TELLTALE.items() if by_name & telltale]
    told_trl = by_name & TELLTALE["trl"]
    if kinds == ["tandem", "trl"] and told_trl == {"completion_ids"}:
        kinds = ["tandem"]  # completion_ids beside completion: those of the one sample
    if len(kinds) != 1:
        fault = "fit no known signature"
        if kinds:
            fault = f"mix the signatures {' and '.join(kinds)}"
        raise ConfigError(
            f"reward {name!r} has the parameters ({', '.join(map(str, parameters.values()))}), "
            f"which {fault}; expected one of: score(prompt, completion, **columns) -> float; "
            "TRL's score(completions, prompts, **columns) -> list of floats; "
            "verl's score(data_source, solution_str, ground_truth, extra_info) -> float"
        )
    return kinds[0]
