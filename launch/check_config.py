"""A config as every command reads it: its keys, and then what only its method can tell.

`engine/config` knows the keys and no method; here the method is made once from its options and
asked what it needs, before anything heavy starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.engine.config.config_file import read_tree
from tandem.engine.config.names import ALWAYS_THERE, source_key
from tandem.engine.config.parse import checked
from tandem.engine.config.paths import process_kept
from tandem.engine.config.rules import gpus, require
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest
from tandem.rollout.backend import backend_class

if TYPE_CHECKING:
    from tandem.algorithms.base import Method

GENERATED = ("task:", "reasoning_gym:")  # datasets that come with a response


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    redacted: bool = False,
    method: Method | None = None,
) -> Config:
    """Read a YAML config, apply `key.sub=value` overrides, and check all of it, the method and
    a rollout backend of the user's own too. `method`, one made in Python, takes the place of the
    config's.

    Raises ConfigError, and TypeError unless `path` is a path and `overrides` a list of texts.

    Paths are absolute in the result. `redacted` admits a config with secrets
    that were not written down, one that is only to be looked at.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"tandem.load takes the path of a config, not {brief(path)}")
    if isinstance(overrides, str):
        raise TypeError(f"overrides are a list of key=value texts, e.g. [{overrides!r}]")
    overrides = list(overrides)
    tree = read_tree(path, overrides)
    block = None
    if method is not None:
        from tandem.algorithms.given import give

        refuse_options(overrides)
        block = give(method)
        tree.values["method"] = {"name": block["name"]}
    config = checked(tree, redacted)
    if block is not None:
        config = replace(config, method=block)
    with tree.told_where("method"), process_kept():
        check_method(config)
    with tree.told_where("rollout"), process_kept():
        if ":" in config.rollout.backend or config.rollout.backend_options:
            backend_class(config)
    return config


def refuse_options(overrides: Iterable[str]) -> None:
    for text in overrides:
        if text.partition("=")[0].partition(".")[0] == "method":
            raise ConfigError(
                f"{text!r} sets an option of the config's method, whose place an object takes: set "
                "it on the object"
            )


def check_method(config: Config) -> None:
    """That the method can be made, and that the config gives it what it needs.

    Raises ConfigError naming both values and what to change.
    """
    method = make(config.method)
    check_models(config, method)
    if method.uses_experts:
        check_demonstrations(config, method)
    if method.uses_rollouts:
        check_rollouts(config, method)
    check_evaluation(config)
    if method.uses_rollouts or config.data.evaluation is not None:
        check_devices(config)
    name = config.method["name"]
    require(
        config.scope.dropout == 0 or not method.uses_rollouts,
        f"scope.dropout is {config.scope.dropout}, but method {name!r} trains on rollouts, which "
        "are sampled without it: the policy that is trained must be the one that sampled; set "
        "scope.dropout=0",
    )
    require(
        method.uses_rollouts or not config.run.rollout_only,
        f"run.rollout_only with method {name!r}, which makes no rollouts",
    )
    if method.prompts_from_experts:
        check_spare_groups(config)


def make(block: Mapping[str, Any]) -> Method:
    """The method of a `method:` block. A user's own may raise anything."""
    # methods bring torch along: a mistake in a key is told without it
    from tandem.algorithms.registry import configured

    try:
        return configured(block)
    except ValueError as error:
        words = str(error)
        if not words.startswith("method"):
            words = f"method: {words}"
        raise ConfigError(words) from error
    except Exception as error:
        raise ConfigError(
            f"method {block['name']!r} raised {type(error).__name__}: {error}"
        ) from error


def check_models(config: Config, method: Method) -> None:
    for name in method.compares_with:
        require(
            name in config.models or name in ALWAYS_THERE,
            f"method {config.method['name']!r} compares the policy with the model {name!r}"
            f"{closest(name, (*ALWAYS_THERE, *config.models))}, but models.{name} is not set; add "
            f"models: {{{name}: {{path: FOLDER}}}}, or a moving average of the policy, "
            f"{{{name}: {{kind: ema}}}}",
        )


def check_demonstrations(config: Config, method: Method) -> None:
    data, name = config.data, config.method["name"]
    if not data.demonstrations or (method.prompts_from_experts and data.experts is None):
        raise ConfigError(f"method {name!r} trains on demonstrations, but data.experts is not set")
    for source, dataset in data.demonstrations.items():
        key = source_key(source)
        pairs = dataset.chosen is not None
        require(
            dataset.response is not None or pairs or dataset.path.startswith(GENERATED),
            f"{key}.response is not set: name the column that holds the expert's response",
        )
        require(
            method.uses_pairs or method.takes_pairs or not pairs,
            f"{key} gives pairs (chosen and rejected), which method {name!r} does not tell apart: "
            "it would train on both; for the chosen answers alone write "
            f"{key}.response={dataset.chosen} in their place",
        )
    pairs = [name for name, dataset in data.demonstrations.items() if dataset.chosen]
    require(
        bool(pairs) or not method.uses_pairs,
        f"method {name!r} trains on pairs, but no source gives any: set data.experts.chosen and "
        "data.experts.rejected to the columns of the better and the worse answer",
    )
    if method.prompts_from_experts and data.experts is not None:
        require(
            data.experts.chosen is None and data.experts.train_on == "last",
            f"method {name!r} takes its prompts from data.experts, where chosen and "
            f"train_on={data.experts.train_on} have no meaning: a prompt has one demonstration",
        )
    require(
        data.experts_per_step > 0,
        f"method {name!r} trains on demonstrations, but data.experts_per_step is 0",
    )


def check_rollouts(config: Config, method: Method) -> None:
    name = config.method["name"]
    require(
        config.data.prompts is not None or config.rollout.backend == "replay",
        f"method {name!r} trains on rollouts, but data.prompts is not set",
    )
    require(
        bool(config.reward.functions) or not method.uses_rewards,
        f"method {name!r} trains on rewards, but reward.functions is empty",
    )
    require(
        not (has_own_rewards(method) and getattr(method.policy, "dynamic_sampling", False)),
        f"method.policy.dynamic_sampling is true, but method {name!r} has rewards of its own, "
        "which it makes once a step has all its groups (`score`): groups would be drawn anew by "
        "rewards that are not those it trains on; set method.policy.dynamic_sampling=false",
    )


def has_own_rewards(method: Method) -> bool:
    from tandem.algorithms.base import Method  # brings torch along: see `make`

    return type(method).score is not Method.score


def check_evaluation(config: Config) -> None:
    """The first function is the verifier, whatever the method."""
    require(
        config.data.evaluation is None or bool(config.reward.functions),
        "data.evaluation is set, but reward.functions is empty, so that no answer could be judged; "
        "name a function, or set data.evaluation=null",
    )


def check_devices(config: Config) -> None:
    """Where weights travel from the learner to engines."""
    cluster, transport = config.cluster, config.sync.transport
    require(
        (cluster.engine_gpus > 0) == (cluster.learner_gpus > 0) or transport in ("shm", "gloo"),
        f"{gpus(cluster)}; with GPUs on one side only set sync.transport=shm (one machine) or gloo",
    )


def check_spare_groups(config: Config) -> None:
    """Groups with a demonstration are never aborted, so some must be without one."""
    rollout, experts = config.rollout, config.data.experts_per_step
    require(
        rollout.over_sample == 0 or experts < rollout.prompts_per_step,
        f"rollout.over_sample is {rollout.over_sample}, but with method "
        f"{config.method['name']!r} all rollout.prompts_per_step={rollout.prompts_per_step} "
        f"groups have a demonstration (data.experts_per_step={experts}), and those are "
        "never aborted; set rollout.over_sample=0 or fewer data.experts_per_step",
    )
