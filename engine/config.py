"""The config: a typed tree of frozen dataclasses, read from YAML with dotted overrides on the command line.

Every key is listed here, with its meaning and default. Unknown keys and contradictory values are errors that name the key, what was found,
what was expected and where it was set. Nothing is edited behind the user's back: what `load` returns is what was written, plus defaults.
"""
from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """Bad input by the user: shown on one screen, exit code 2, no traceback."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""                                  # Hugging Face folder or name, or `tandem:tiny` for the model the repo makes itself
    tokenizer: str | None = None                    # default: the model's own
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sdpa"                         # attn_implementation of transformers
    trust_remote_code: bool = False
    system_prompt: str | None = None                # put before every chat prompt; None: the chat template's own default


@dataclass(frozen=True)
class DatasetConfig:
    path: str = ""                                  # .jsonl, .parquet, a Hugging Face dataset name, `reasoning_gym:TASK` or `task:sort`
    split: str = "train"                            # of a Hugging Face dataset
    prompt: str = "prompt"                          # column with the prompt: a string or a list of chat messages
    response: str | None = None                     # column with the expert's response; required for data.experts
    limit: int | None = None                        # use the first so many rows
    options: dict[str, Any] = field(default_factory=dict)   # for generated data: size, seed and task options


@dataclass(frozen=True)
class DataConfig:
    prompts: DatasetConfig | None = None            # prompts to roll out
    experts: DatasetConfig | None = None            # expert demonstrations
    evaluation: DatasetConfig | None = None         # held-out prompts
    chat: bool | None = None                        # apply the chat template; None: if the prompt is a message list
    max_prompt_tokens: int = 1024
    max_expert_tokens: int = 4096                   # a longer demonstration is an error, not a cut
    experts_per_step: int = 0
    shuffle: bool = True


@dataclass(frozen=True)
class RewardConfig:
    functions: tuple[str, ...] = ()                 # exact, math, reasoning_gym, format, length, or my_reward.py:score
    weights: tuple[float, ...] = ()                 # one per function; () = all 1
    options: dict[str, Any] = field(default_factory=dict)   # keyword arguments per function, by its name: {length: {max_tokens: 256}}
    timeout: float = 10.0                           # seconds per call
    workers: int = 1                                # processes
    on_error: Literal["drop", "zero", "fail"] = "drop"
    max_error_rate: float = 0.05                    # over the run; more stops it with the first tracebacks


@dataclass(frozen=True)
class RolloutConfig:
    backend: Literal["auto", "vllm", "hf", "replay"] = "auto"   # auto: vllm with mode=cluster, hf with mode=inline
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    max_tokens: int = 256
    temperature: float = 1.0                        # the learner divides all logits of a step with rollouts by it, expert tokens' too; SFT steps use 1
    top_p: float = 1.0
    staleness: int = 0                              # how many versions old a rollout may be when it is trained on; 0 = on-policy
    over_sample: int = 0                            # groups asked for beyond what a step needs; the last of them to end are aborted. > 0 is not reproducible
    max_model_len: int | None = None                # default: max_prompt_tokens + max_tokens
    max_sequences: int = 64                         # sequences an engine decodes at once
    gpu_memory_utilization: float = 0.85
    kv_cache_gib: float = 1.0                       # CPU engines only
    prefix_caching: bool = True
    sleep: bool = False                             # engines give their GPU memory to the learner while it works (cluster.colocate, staleness 0)
    request_timeout: float = 600.0                  # seconds until an engine that does not answer counts as dead
    max_restarts: int = 3                           # engine restarts per run
    record: str | None = None                       # replay: rollouts.jsonl to read


@dataclass(frozen=True)
class LearnerConfig:
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0                           # linear, counted for each set of optimizer moments from its first step (two stages: two warm-ups)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 1.0                          # global norm; 0 = off
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False                 # optimizer states in CPU memory
    micro_batch_tokens: int = 4096                  # packed tokens per forward and rank; a longer row gets a micro-batch of its own
    updates_per_batch: int = 1                      # optimizer steps per batch of rollouts; > 1 computes old log-probs first. An SFT step is one
    epochs_per_batch: int = 1                       # how often each batch is gone through, in updates_per_batch steps each time
    head_chunk: int = 1024                          # tokens whose logits exist at a time
    gradient_checkpointing: bool = False
    offload_activations: bool = False               # what forward keeps for backward waits in CPU memory (GPU learners)
    liger: bool = False                             # Liger's kernels for norms, rotary embeddings and MLPs (GPU learners; pip install liger-kernel)
    compile: bool = False                           # torch.compile of the decoder layers: faster steps, a slower start; not with ZeRO-3
    entropy: bool = True                            # report token entropy
    max_skipped_steps: int = 3                      # consecutive non-finite gradients until the run stops


@dataclass(frozen=True)
class SyncConfig:
    # auto: ipc where engines and learner share GPUs (cluster.colocate), nccl where they have GPUs of their own, shm on one machine without, else gloo
    transport: Literal["auto", "nccl", "ipc", "shm", "gloo"] = "auto"
    bucket_mib: int = 64
    timeout: float = 300.0
    gate_steps: int = 2                             # first steps on which rollout and learner log-probs are compared before training
    max_gap: float = 1e-4                           # float32: bound on max |rollout logp - learner logp| at the gate, on its mean in every later step
    max_mean_gap: float = 0.08                      # bfloat16: bound on the mean, at the gate and in every step


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None                      # of a running Ray cluster; None: start a local one
    engines: int = 1
    tensor_parallel: int = 1
    engine_cpus: float = 1
    engine_gpus: float = 0                          # per engine; tensor_parallel > 1 on GPUs needs as many
    learner_ranks: int = 1
    learner_cpus: float = 1                         # per rank
    learner_gpus: float = 0
    colocate: bool = False                          # engine i and learner rank i share a place: one node and, with fractions of a GPU, one GPU
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    deadline: float = 120.0                         # seconds to wait for the placement group
    threads: int = 1                                # OpenMP threads per process on CPU
    pin_cores: bool = False                         # so many cores of its own for each engine and learner rank; one machine without GPUs
    port: int | None = None                         # rendezvous of the learner; None: any free one
    object_store_mib: int = 150                     # of a local Ray
    start_timeout: float = 600.0                    # seconds until engines and learner must be up


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0                                  # steps; 0 = only before and after
    temperature: float = 0.0
    samples: int = 1
    max_tokens: int | None = None                   # default: rollout.max_tokens
    limit: int | None = None                        # prompts
    before: bool = True


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    dir: str = "runs"                               # the run folder is dir/name
    steps: int = 10
    token_budget: int | None = None                 # end the run after so many generated + trained tokens, for comparisons at equal cost
    seed: int = 0
    checkpoint_every: int = 0                       # steps; 0 = only at the end
    keep_checkpoints: int = 2
    resume: bool = False                            # continue from the newest complete checkpoint of the run folder
    save_model: bool = True                         # a plain Hugging Face folder at the end
    wandb: str | None = None                        # project name
    tensorboard: bool = False
    fake_reward: bool = False                       # random rewards, for plumbing
    rollout_only: bool = False                      # generate and score, never train


@dataclass(frozen=True)
class Config:
    mode: Literal["cluster", "inline"] = "cluster"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: dict[str, Any] = field(default_factory=dict)    # name and the method's own options
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


def closest(word: str, known) -> str:
    """' (did you mean ...?)', or '' if nothing is close."""
    match = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: plain YAML takes the last one without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML config, apply `key.sub=value` overrides, build and validate the tree. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {str(path)!r}: {'a folder, expected a YAML file' if path.is_dir() else 'there is no such file'}{closest(path.name, [p.name for p in path.parent.glob('*.yaml')] if path.parent.is_dir() else [])}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from None
    origin = set()
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: expected a mapping of sections at the top, found {type(tree).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, e.g. run.steps=100")
        try:
            value = yaml.load(text, UniqueKeys)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML (in the shell, quotes go around a word with spaces: 'method={{name: sft}}'): {error}") from None
        node, parts = tree, key.split(".")
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {part!r} is a value in {path}, not a section")
        node[parts[-1]] = value
        origin.add(key)
    config = build(Config, tree, "", str(path), origin)
    try:
        validate(config)
    except ConfigError as error:
        named = sorted(key for key in origin if key in str(error))
        raise ConfigError(f"{error} (config {path}{', on the command line ' + ', '.join(named) if named else ''})") from error.__cause__
    return config


def build(cls: type, tree: dict, prefix: str, path: str, origin: set[str]):
    """A dataclass from a mapping, checking key names and value types all the way down."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: expected a section (a mapping), found {tree!r}, set {source(prefix.rstrip('.'), path, origin)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        where = source(prefix + str(key), path, origin)
        if key not in hints:
            nested = [f"{section}.{key}" for section, hint in hints.items() if dataclasses.is_dataclass(hint) and key in typing.get_type_hints(hint)]
            raise ConfigError(f"unknown key {prefix + str(key)!r}{closest(key, nested or hints)}, set {where}; known keys here: {', '.join(hints)}")
        values[key] = coerce(hints[key], value, prefix + key, where, path, origin)
    return cls(**values)


def source(key: str, path: str, origin) -> str:
    """Where a key was set: on the command line if it, a key in it, or a section around it was given there."""
    overridden = any(key == o or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in origin)
    return "on the command line" if overridden else f"in {path}"


def coerce(hint, value, key: str, where: str, path: str, origin):
    """`value` as `hint` wants it, or a ConfigError. YAML's `1e-6` is a string to YAML 1.1, so numbers are read from strings too."""
    wrong = ConfigError(f"{key}: found {value!r}, expected {describe(hint)}, set {where}")
    base, args = typing.get_origin(hint), typing.get_args(hint)
    if base in (types.UnionType, typing.Union):
        if value is None:
            return None
        return coerce(next(a for a in args if a is not type(None)), value, key, where, path, origin)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key + ".", path, origin)
    if base is Literal:
        if value not in args or isinstance(value, bool):
            raise ConfigError(f"{key}: found {value!r}{closest(value, args)}, expected one of {', '.join(map(str, args))}, set {where}")
        return value
    if base is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise wrong
        if Ellipsis not in args and len(value) != len(args):
            raise wrong
        return tuple(coerce(args[0], v, f"{key}[{i}]", where, path, origin) for i, v in enumerate(value))
    if base is dict:
        if not isinstance(value, dict):
            raise wrong
        return value
    if hint in (int, float):
        if isinstance(value, bool) or value is None:
            raise wrong
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if not math.isfinite(number):
            raise wrong
        if hint is float:
            return number
        if not number.is_integer():
            raise wrong
        return int(number)
    if not isinstance(value, hint):
        raise wrong
    return value


def describe(hint) -> str:
    base, args = typing.get_origin(hint), typing.get_args(hint)
    if base in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(describe(a) for a in args))
    if base is Literal:
        return f"one of {', '.join(map(str, args))}"
    if base is tuple:
        return f"a list of {describe(args[0])}" + ("" if Ellipsis in args else f" with {len(args)} entries")
    if dataclasses.is_dataclass(hint) or dict in (base, hint):
        return "a section"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}.get(hint, str(hint))


def setting(config: Config, key: str):
    """The value of a dotted key; None below a section that is not set."""
    value = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def validate(c: Config) -> None:
    """Every rule that spans keys. Raises ConfigError naming both values and what to change; never edits."""
    from tandem.algorithms.base import configured, method_class
    require(bool(c.model.path), "model.path is not set: name a Hugging Face folder or model, or tandem:tiny")
    require(isinstance(c.method.get("name"), str), f"method.name is {c.method.get('name', 'not set')}: choose one of `tandem methods`, or a path my_method.py:MyMethod")
    try:
        method = method_class(c.method["name"])
        configured(c.method)
    except Exception as error:      # a user's own method may raise anything when it is made
        raise ConfigError(f"{'' if str(error).startswith('method') else 'method: '}{error}" if isinstance(error, ValueError) else f"method {c.method['name']!r} raised {type(error).__name__}: {error}") from error
    for key, low in (("rollout.prompts_per_step", 1), ("rollout.samples_per_prompt", 1), ("rollout.max_tokens", 1), ("rollout.staleness", 0),
                     ("rollout.over_sample", 0), ("rollout.max_sequences", 1), ("data.max_prompt_tokens", 1), ("data.max_expert_tokens", 1), ("data.experts_per_step", 0),
                     ("reward.workers", 1), ("learner.micro_batch_tokens", 1), ("learner.updates_per_batch", 1), ("learner.epochs_per_batch", 1), ("learner.head_chunk", 1),
                     ("learner.warmup_steps", 0), ("cluster.engines", 1), ("cluster.tensor_parallel", 1), ("cluster.learner_ranks", 1), ("cluster.threads", 1),
                     ("eval.every", 0), ("eval.samples", 1), ("run.steps", 1), ("run.checkpoint_every", 0), ("run.keep_checkpoints", 1), ("run.seed", 0),
                     ("run.token_budget", 1), ("rollout.max_restarts", 0), ("reward.max_error_rate", 0), ("learner.grad_clip", 0), ("learner.weight_decay", 0),
                     ("learner.max_skipped_steps", 0), ("sync.gate_steps", 0), ("sync.max_gap", 0), ("sync.max_mean_gap", 0), ("sync.bucket_mib", 1),
                     ("cluster.engine_cpus", 0), ("cluster.engine_gpus", 0), ("cluster.learner_cpus", 0), ("cluster.learner_gpus", 0), ("cluster.port", 1),
                     ("cluster.object_store_mib", 1), ("eval.temperature", 0), ("eval.limit", 1), ("eval.max_tokens", 1)):
        value = setting(c, key)
        require(value is None or value >= low, f"{key} is {value}, must be at least {low}")
    for key in ("reward.timeout", "rollout.kv_cache_gib", "rollout.request_timeout", "sync.timeout", "cluster.deadline", "cluster.start_timeout"):
        require(setting(c, key) > 0, f"{key} is {setting(c, key)}, must be > 0")
    for key, high in (("reward.max_error_rate", 1), ("cluster.port", 65535)):
        require((setting(c, key) or 0) <= high, f"{key} is {setting(c, key)}, must be at most {high}")
    for key in ("rollout.top_p", "rollout.gpu_memory_utilization"):
        require(0 < setting(c, key) <= 1, f"{key} is {setting(c, key)}, must be in (0, 1]")
    require(all(0 <= beta < 1 for beta in c.learner.betas), f"learner.betas is {list(c.learner.betas)}, both must be in [0, 1)")
    require(bool(c.run.name.strip()), "run.name is empty: it names the run's folder in run.dir")
    require(c.rollout.temperature > 0, f"rollout.temperature is {c.rollout.temperature}, must be > 0: greedy samples have no log-prob to train on (eval.temperature may be 0)")
    require(c.rollout.top_p == 1 or c.sync.gate_steps == 0,
            f"rollout.top_p is {c.rollout.top_p}, so engines sample from a truncated distribution, which the learner's log-probs are not of: the comparison of both would stop "
            "the run at once; set rollout.top_p=1, or give that check up with sync.gate_steps=0")
    require(c.learner.learning_rate > 0, f"learner.learning_rate is {c.learner.learning_rate}, must be > 0")
    require(len(c.reward.weights) in (0, len(c.reward.functions)),
            f"reward.weights has {len(c.reward.weights)} entries for {len(c.reward.functions)} reward.functions; give one weight per function or none")
    require(c.mode == "inline" or c.learner.zero_stage < 3 or not c.learner.compile,
            "learner.compile is true with learner.zero_stage 3, whose parameters come and go inside the layers; use zero_stage 2 or less, or set learner.compile=false")
    for key in ("learner.liger", "learner.offload_activations"):
        require(not setting(c, key) or c.cluster.learner_gpus > 0, f"{key} is true, which is for learners on GPUs, but cluster.learner_gpus is 0; set {key}=false")
    require(c.learner.zero_stage > 0 or not c.learner.offload_optimizer,
            "learner.offload_optimizer is true with learner.zero_stage 0, which has nothing to offload; use zero_stage 1, 2 or 3, or switch it off")
    if method.uses_experts:
        require(c.data.experts is not None, f"method {c.method['name']!r} trains on demonstrations, but data.experts is not set")
        require(c.data.experts.response is not None or c.data.experts.path.startswith(("task:", "reasoning_gym:")),
                "data.experts.response is not set: name the column that holds the expert's response")
        require(c.data.experts_per_step > 0, f"method {c.method['name']!r} trains on demonstrations, but data.experts_per_step is 0")
    if method.uses_rollouts:
        require(c.data.prompts is not None or c.rollout.backend == "replay", f"method {c.method['name']!r} trains on rollouts, but data.prompts is not set")
        require(bool(c.reward.functions) or c.run.fake_reward, f"method {c.method['name']!r} trains on rewards, but reward.functions is empty")
    require(c.rollout.backend != "replay" or c.rollout.record is not None, "rollout.backend is replay, but rollout.record names no rollouts.jsonl")
    require(c.rollout.backend != "replay" or c.data.evaluation is None,
            "rollout.backend is replay, which cannot answer new prompts, but data.evaluation is set; set data.evaluation=null and evaluate the saved model")
    require(c.rollout.over_sample == 0 or (c.mode == "cluster" and c.rollout.backend != "replay"),
            f"rollout.over_sample is {c.rollout.over_sample}, but {'rollout.backend is replay' if c.rollout.backend == 'replay' else 'mode is inline'}, "
            "where the groups of a step end together and none can be aborted; set rollout.over_sample=0, or use mode=cluster with vLLM")
    require(c.rollout.over_sample == 0 or not method.aligned or c.data.experts_per_step < c.rollout.prompts_per_step,
            f"rollout.over_sample is {c.rollout.over_sample}, but with method {c.method['name']!r} all rollout.prompts_per_step={c.rollout.prompts_per_step} groups have a "
            f"demonstration (data.experts_per_step={c.data.experts_per_step}), and those are never aborted; set rollout.over_sample=0 or fewer data.experts_per_step")
    require(not (c.mode == "cluster" and c.rollout.backend == "hf"), "rollout.backend hf runs in one process, but mode is cluster; use mode=inline or backend vllm")
    require(not (c.mode == "inline" and c.rollout.backend == "vllm"), "mode=inline runs without vLLM, but rollout.backend is vllm; use mode=cluster or backend hf")
    require(not (c.mode == "inline" and c.cluster.learner_ranks > 1), f"mode=inline is one process, but cluster.learner_ranks is {c.cluster.learner_ranks}; use mode=cluster or learner_ranks=1")
    check_sharing(c)
    require(c.cluster.colocate or c.cluster.engine_gpus == 0 or c.cluster.engine_gpus >= c.cluster.tensor_parallel,
            f"cluster.engine_gpus is {c.cluster.engine_gpus} for tensor_parallel {c.cluster.tensor_parallel}; an engine needs one GPU per tensor-parallel rank")
    require((c.cluster.engine_gpus > 0) == (c.cluster.learner_gpus > 0) or c.sync.transport in ("shm", "gloo"),
            f"cluster.engine_gpus is {c.cluster.engine_gpus} and cluster.learner_gpus is {c.cluster.learner_gpus}; with GPUs on one side only set sync.transport=shm "
            "(one machine) or gloo")
    require(c.sync.transport != "nccl" or (c.cluster.engine_gpus > 0 and c.cluster.learner_gpus > 0),
            f"sync.transport is nccl, which needs GPUs on both sides, but cluster.engine_gpus is {c.cluster.engine_gpus} and cluster.learner_gpus {c.cluster.learner_gpus}; use auto or gloo")
    require(c.sync.transport != "ipc" or (c.cluster.colocate and c.cluster.engine_gpus > 0 and c.cluster.learner_gpus > 0),
            "sync.transport is ipc, which needs engines and learner on the same GPUs, but cluster.colocate is "
            f"{str(c.cluster.colocate).lower()}, cluster.engine_gpus {c.cluster.engine_gpus} and cluster.learner_gpus {c.cluster.learner_gpus}; use auto")
    require(not (c.run.rollout_only and not method.uses_rollouts), f"run.rollout_only with method {c.method['name']!r}, which makes no rollouts")
    need = c.data.max_prompt_tokens + max(c.rollout.max_tokens, c.eval.max_tokens or 0)
    require(c.rollout.max_model_len is None or c.rollout.max_model_len >= need,
            f"rollout.max_model_len is {c.rollout.max_model_len}, but data.max_prompt_tokens + rollout.max_tokens (or eval.max_tokens, if larger) is {need}; raise it or lower them")


def check_sharing(c: Config) -> None:
    """Who shares what: colocated engines and ranks, engines that sleep, processes with cores of their own. Raises ConfigError."""
    k, gpus = c.cluster, f"cluster.engine_gpus is {c.cluster.engine_gpus:g} and cluster.learner_gpus is {c.cluster.learner_gpus:g}"
    if k.colocate:
        require(c.mode == "cluster", "cluster.colocate is true, but mode=inline is one process anyway; set cluster.colocate=false")
        require(k.engines == k.learner_ranks,
                f"cluster.colocate pairs each engine with a learner rank, but cluster.engines is {k.engines} and cluster.learner_ranks {k.learner_ranks}; make them equal")
        require(k.tensor_parallel == 1,
                f"cluster.colocate gives an engine the one GPU of its learner rank, but cluster.tensor_parallel is {k.tensor_parallel}; set it to 1")
        require(k.engine_gpus + k.learner_gpus == 0 or 0.5 < k.engine_gpus + k.learner_gpus <= 1,
                f"{gpus}; with cluster.colocate they are shares of one GPU: together at most 1, and more than 0.5, or two pairs could get the same GPU; "
                "0.5 each will do")
        require(c.sync.transport != "nccl", "sync.transport is nccl, which cannot connect two processes on one GPU, but cluster.colocate is true; use auto")
    if c.rollout.sleep:
        require(k.colocate and k.engine_gpus > 0 and k.learner_gpus > 0,
                "rollout.sleep is true: an engine gives its GPU memory to the learner rank on the same GPU, but cluster.colocate is "
                f"{str(k.colocate).lower()}, {gpus}; set cluster.colocate=true and 0.5 GPUs for each, or rollout.sleep=false")
        require(c.rollout.staleness == 0,
                f"rollout.sleep is true, but rollout.staleness is {c.rollout.staleness}, with which engines generate while the learner works; set it to 0, "
                "or rollout.sleep=false")
    if k.pin_cores:
        fix = "set cluster.pin_cores=false"
        require(c.mode == "cluster", f"cluster.pin_cores is true, but mode=inline is one process; {fix}")
        require(k.address is None, f"cluster.pin_cores is true, but cluster.address is {k.address!r}: the cores of other nodes are not known here; {fix}")
        require(k.engine_gpus == 0 and k.learner_gpus == 0, f"cluster.pin_cores is true, which is for machines without GPUs, but {gpus}; {fix}")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, for the run folder and for --dry-run."""
    return yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
