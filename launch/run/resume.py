"""Whether a run may go on with a config that is not the one its checkpoint was written with.

The manifest of a checkpoint has the config and digests of what was read. Values are compared by
meaning: paths by where they lead, data, models and code by content, a method with its defaults
filled in. Of what differs

    FREE keys       are allowed and told: they change how fast, where and how long the run computes,
                    or what it reports
    FIXED keys      are refused: the checkpoint does not fit
    all others      are refused unless run.resume_changes names them, or a section around them: the
                    run would not be the one
                    that was begun
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tandem.algorithms.given import is_given
from tandem.algorithms.registry import configured
from tandem.engine.config.options import key_of, option_fields
from tandem.engine.config.parse import to_dict
from tandem.engine.config.paths import OBJECT_IN_FILE
from tandem.engine.config.schema import Config, DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.loop.checkpoint import manifest_facts
from tandem.launch.run.content import code_digests

FIXED = (
    "mode",
    "method.name",
    "model.dtype",
    "learner.zero_stage",
    "learner.offload_optimizer",
    "scope.kind",
    "scope.rank",
    "scope.targets",
    "scope.train",
    "cluster.learner_ranks",
)
UNTOLD = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.resume_changes",
    "run.beside_files",
    "run.fake_reward",  # of version 0.1.0
)
FREE = (
    *UNTOLD,
    "run.steps",
    "run.token_budget",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.save_model",
    "run.wandb",
    "run.tensorboard",
    "run.rollout_only",
    "eval",
    "data.evaluation",
    "sync",
    "cluster",
    "model.trust_remote_code",
    "reward.workers",
    "reward.timeout",
    "reward.max_error_rate",
    "reward.memory_gib",
    "reward.check_answers",
    "rollout.request_timeout",
    "rollout.max_restarts",
    "rollout.max_sequences",
    "rollout.max_model_len",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gib",
    "rollout.prefix_caching",
    "rollout.sleep",
    "learner.max_skipped_steps",
    "learner.gradient_checkpointing",
    "learner.offload_activations",
    "learner.offload_models",
    "scope.export",
)
PATHS = (
    "model.path",
    "model.tokenizer",
    "rollout.record",
)
DATASET = ("path", "split", "limit", "options", "scores")
ABSENT = object()


def read_keys(key: str) -> tuple[str, ...]:
    """The keys that a digest of content stands for; `key` is a dataset's or a path's."""
    if key.startswith("data."):
        return tuple(f"{key}.{name}" for name in DATASET)
    return (key,)


def is_path(key: str) -> bool:
    if key in PATHS:
        return True
    return key.startswith(("data.", "models.")) and key.endswith(".path")


@dataclass
class Facts:
    """What a part of a run was started with, as it stands in its checkpoints' manifests."""

    config: dict[str, Any]  # nested, without secrets
    content: dict[str, str] = field(default_factory=dict)  # digests by config key
    code: dict[str, str] = field(default_factory=dict)  # {FILE.py:NAME: digest of the file}


def facts_of(config: Config, content: Mapping[str, str] | None = None) -> Facts:
    tree = to_dict(config)
    code = [tree["method"], tree["reward"]["functions"], tree["rollout"]["backend"]]
    return Facts(tree, dict(content or {}), code_digests(code))


def facts_before(checkpoint: Path, run_folder: Path) -> Facts:
    """Those of a checkpoint; of a version that did not write them, what config.yaml says.

    Raises ConfigError.
    """
    found = manifest_facts(checkpoint)
    if found is not None and isinstance(found.get("config"), dict):
        content = found.get("content") or {}
        code = found.get("code") or {}
        return Facts(found["config"], content, code)
    path = run_folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"run.resume: {checkpoint} does not say what config it was written with (an "
            f"older version wrote it), and {path} "
            f"cannot be read: {error}; put the run's config there"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"run.resume: {checkpoint} does not say what config it was written with (an "
            f"older version wrote it), and {path} "
            "is damaged, no mapping of sections; put the run's config there"
        )
    return Facts(tree)


@dataclass(frozen=True)
class Comparison:
    """The config of the checkpoint and that of now, as {dotted key: value} in one spelling."""

    old: dict[str, Any]
    new: dict[str, Any]

    @classmethod
    def of(cls, before: Facts, now: Facts) -> Comparison:
        old = completed(before.config, to_dict(Config()))
        moved = moved_code(before.code, now.code)
        new = renamed(now.config, moved)
        return cls(spelled(old), spelled(new))

    def every_key(self) -> list[str]:
        return sorted(self.old.keys() | self.new.keys())

    def differs(self, key: str) -> bool:
        old = self.old.get(key, ABSENT)
        new = self.new.get(key, ABSENT)
        return differs(old, new)

    def line(self, key: str) -> str:
        old = self.old.get(key, ABSENT)
        new = self.new.get(key, ABSENT)
        return f"  {key}: {value_text(old)} -> {value_text(new)}"

    def drop(self, keys: Iterable[str]) -> None:
        """Leave out these keys and the sections they name."""
        for tree in (self.old, self.new):
            for key in list(tree):
                if allowed(key, keys):
                    del tree[key]


def check_fixed(config: Config, before: Facts, done: int) -> None:
    """Raise ConfigError for what no key allows. Cheap: before anything is opened."""
    if done > config.run.steps:
        raise ConfigError(
            f"run.steps is {config.run.steps}, but the checkpoint to resume from has done "
            f"{done}; raise run.steps"
        )
    both = Comparison.of(before, facts_of(config))
    changed = [both.line(key) for key in FIXED if both.differs(key)]
    if changed:
        raise ConfigError(
            "run.resume: the checkpoint does not fit this config (former value -> value now):\n"
            + "\n".join(changed)
            + "\nresume with the former values, or start a new run under another run.name"
        )


def check_changes(config: Config, before: Facts, now: Facts) -> list[str]:
    """Raise ConfigError that lists all that differs and is not allowed.

    Returns lines about what differs and is.
    """
    both = Comparison.of(before, now)
    changed: dict[str, str] = {}  # {key: a line about it}
    for key in read_otherwise(both, before, now):
        changed[key] = f"  {key}: the content differs{read_from(key, both)}"
        both.drop(read_keys(key))
    for key in both.every_key():
        if both.differs(key) and not allowed(key, UNTOLD):
            changed[key] = both.line(key)
    free = (*FREE, *config.run.resume_changes)
    refused = [key for key in changed if not allowed(key, free)]
    if refused:
        lines = "\n".join(changed[key] for key in refused)
        raise ConfigError(
            "run.resume: this config is not the one the checkpoint was written with (former "
            f"value -> value now):\n{lines}\n"
            "resume with the former values, or allow the change with "
            f"'run.resume_changes=[{', '.join(refused)}]', or start a new run "
            "under another run.name"
        )
    notes = [f"resumed with a change: {text.strip()}" for text in changed.values()]
    return notes + warnings(config, before, now, both)


def warnings(config: Config, before: Facts, now: Facts, both: Comparison) -> list[str]:
    """About what is allowed, and may surprise."""
    found = []
    former_steps = both.old.get("run.steps")
    other_steps = former_steps != both.new.get("run.steps")
    if other_steps and config.learner.schedule != "constant":
        found.append(
            f"warning: learner.schedule is {config.learner.schedule}, so the learning rate "
            "of the steps to come is that of a run "
            f"of {config.run.steps} steps, not {former_steps}"
        )
    for spec, digest in now.code.items():
        if before.code.get(spec, digest) != digest:
            file = spec.rpartition(":")[0]
            found.append(f"warning: {file} was edited since the checkpoint was written")
    return found


def spelled(tree: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a whole config."""
    tree = {**tree, "method": method_options(tree["method"])}
    found = flat(tree)
    for key, value in found.items():
        if is_path(key) and isinstance(value, str) and os.path.exists(value):
            found[key] = os.path.realpath(value)
    if found["rollout.backend"] == "auto":
        found["rollout.backend"] = "vllm" if found["mode"] == "cluster" else "hf"
    if not found["reward.weights"]:
        found["reward.weights"] = [1.0] * len(found["reward.functions"] or [])
    return found


def method_options(block: dict[str, Any]) -> dict[str, Any]:
    """The options with their defaults, as far as they are plain; as they stand if the method cannot
    be made any more, or was made in Python.
    """
    if is_given(block["name"]):
        return {key: value for key, value in block.items() if key != "object"}
    try:
        return {"name": block["name"], **plain(configured(block))}
    except Exception:  # code of a user's that has gone, or another version's options
        return dict(block)


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {key_of(f): plain(getattr(value, f.name)) for f in option_fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def completed(tree: Any, default: Any) -> Any:
    """A config of another version with the defaults of this one where it has no such key."""
    if not isinstance(default, dict) or not isinstance(tree, dict):
        return tree
    found = {**tree}
    for key, value in default.items():
        found[key] = completed(tree[key], value) if key in tree else value
    for key in ("prompts", "experts", "evaluation"):
        if key in found:
            found[key] = dataset_completed(found[key])
    if isinstance(found.get("sources"), dict):
        sources = {}
        for name, source in found["sources"].items():
            sources[name] = dataset_completed(source)
        found["sources"] = sources
    return found


def dataset_completed(tree: Any) -> Any:
    if isinstance(tree, dict) and "path" in tree:
        return {**dataclasses.asdict(DatasetConfig()), **tree}
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def moved_code(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """{FILE.py:NAME now: before} for code that only lies elsewhere now."""
    found = {}
    for spec, digest in new.items():
        if spec in old:
            continue
        name = spec.rpartition(":")[2]
        for other, former in old.items():
            if former == digest and other.rpartition(":")[2] == name:
                found[spec] = other
    return found


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [renamed(entry, names) for entry in value]
    if isinstance(value, str) and OBJECT_IN_FILE.fullmatch(value):
        return names.get(value, value)
    return value


def read_otherwise(both: Comparison, before: Facts, now: Facts) -> list[str]:
    """Keys of what has another content now.

    Where the content is the same, how it is named no longer counts.
    """
    changed = []
    for key in now.content:
        if key not in before.content:
            continue
        if before.content[key] == now.content[key]:
            both.drop(read_keys(key))
        else:
            changed.append(key)
    return changed


def read_from(key: str, both: Comparison) -> str:
    name = read_keys(key)[0]
    present = brief(both.new.get(name))
    if both.differs(name):
        return f" ({brief(both.old.get(name))} -> {present})"
    return f" ({present} was edited, or its options, limit or split changed)"


def allowed(key: str, keys: Iterable[str]) -> bool:
    """Whether `keys` names the key or a section around it."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def differs(old: Any, new: Any) -> bool:
    """None and an empty section say the same as no key."""
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return list(old) != list(new)
    if says_nothing(old) or says_nothing(new):
        return says_nothing(old) != says_nothing(new)
    return bool(old != new)


def says_nothing(value: Any) -> bool:
    return value is ABSENT or value is None or value == {}


def value_text(value: Any) -> str:
    return "not set" if value is ABSENT or value is None else brief(value)
