"""What this machine has (CPUs, memory, GPUs, ports), and what a run will need of its memory.

Fast: nothing heavier than file reads.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.context import engine_length, rollout_context
from tandem.engine.model.resolve import read_config, resolve_model
from tandem.engine.model.same_tokens import check_other_models
from tandem.engine.model.weight_files import tensor_shapes

GIB = 1 << 30
ENGINE_RUNTIME = 1.5 * GIB  # vLLM on CPU without weights and KV cache: 0.7 to 1.2 GiB seen
LEARNER_RUNTIME = 1.0 * GIB  # torch and DeepSpeed in one rank
DRIVER_RUNTIME = 1.0 * GIB  # the driver, Ray's own processes and the reward processes


def cpu_count() -> int:
    """CPUs this process may use: affinity and the container's quota count."""
    count = len(os.sched_getaffinity(0))
    quota = read_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        whole = int(quota[0]) // int(quota[1])
        count = min(count, max(1, whole))
    return count


def available_memory() -> int:
    """Bytes that new processes can take: free memory and cache of the machine, within the
    container's limit.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    kib, _ = fields["MemAvailable"].split()
    available = int(kib) * 1024
    limit = read_words("/sys/fs/cgroup/memory.max")
    used = read_words("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0] != "max":
        left = int(limit[0]) - int(used[0])
        available = min(available, left)
    return available


def gpu_names() -> list[str]:
    """NVIDIA GPUs of this machine, less those that CUDA_VISIBLE_DEVICES hides."""
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if listed.returncode != 0:
        return []
    names = []
    for line in listed.stdout.splitlines():
        name = line.strip()
        if name:
            names.append(name)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    chosen = 0
    for number in visible.split(","):
        if number.strip() not in ("", "-1"):
            chosen += 1
    return names[:chosen]


def gpu_count() -> int:
    return len(gpu_names())


def port_is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return False
    return True


def read_words(path: str) -> list[str]:
    file = Path(path)
    if not file.is_file():
        return []
    return file.read_text().split()


@dataclass(frozen=True)
class MemoryNeed:
    """Estimated bytes of host memory. Activations are not counted: they grow with
    learner.micro_batch_tokens.
    """

    parameters: int
    engine: float  # each
    engines: int
    rank: float  # each
    ranks: int
    shared: float

    @property
    def total(self) -> float:
        engines = self.engine * self.engines
        ranks = self.rank * self.ranks
        return engines + ranks + self.shared

    def describe(self) -> str:
        return (
            f"a model of {self.parameters / 1e6:.1f}M parameters needs about "
            f"{self.total / GIB:.1f} GiB ({self.engines} engine(s) x {self.engine / GIB:.1f}, "
            f"{self.ranks} learner rank(s) x {self.rank / GIB:.1f}, "
            f"driver and Ray {self.shared / GIB:.1f}; activations not counted)"
        )


def memory_need(config: Config, model_path: str | Path) -> MemoryNeed | None:
    """Host memory of a run with engines and ranks on this machine; None if the model's size cannot
    be read from its folder.

    A learner rank holds the weights, their gradients, and in float32 the two Adam moments, plus
    master weights if the model itself is bfloat16; ZeRO 1 splits the optimizer's part over the
    ranks, 2 also the gradients, 3 also the weights. What does not train (`scope`, `models`) has
    weights only.
    What lives on a GPU is not host memory.
    """
    parameters = parameter_count(Path(model_path))
    if parameters is None:
        return None
    trained = trained_count(config, str(model_path), parameters)
    cluster = config.cluster
    return MemoryNeed(
        parameters=parameters,
        engine=engine_memory(config, parameters),
        engines=engine_count(config),
        rank=rank_memory(config, parameters, trained),
        ranks=0 if config.run.rollout_only else cluster.learner_ranks,
        shared=DRIVER_RUNTIME + (cluster.object_store_mib << 20),
    )


def number_bytes(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def engine_memory(config: Config, parameters: int) -> float:
    weights = parameters * number_bytes(config)
    if not config.cluster.engine_gpus:
        return ENGINE_RUNTIME + weights + config.rollout.kv_cache_gib * GIB
    if config.rollout.sleep:  # its weights wait on the host
        return ENGINE_RUNTIME + weights
    return ENGINE_RUNTIME


def trained_count(config: Config, model_path: str, parameters: int) -> int:
    """How many of a model's parameters a run trains, adapters in their place."""
    if config.scope.kind == "full":
        return parameters
    from tandem.engine.model.scope import check_scope  # imports transformers

    trained = check_scope(config, model_path)
    return parameters if trained is None else trained


def rank_memory(config: Config, parameters: int, trained: int) -> float:
    size = number_bytes(config)
    on_gpu = config.cluster.learner_gpus > 0

    def split(since: int) -> float:
        """Share of a rank in what ZeRO splits from this stage on."""
        if config.learner.zero_stage < since:
            return 1.0
        return 1.0 / config.cluster.learner_ranks

    need = LEARNER_RUNTIME
    if not on_gpu:
        need += parameters * size * split(3)  # weights
        need += trained * size * split(2)  # gradients
    if not on_gpu or config.learner.offload_models:
        need += other_models_memory(config, parameters)
    if not on_gpu or config.learner.offload_optimizer:
        states = 8 if size == 4 else 12
        need += trained * states * split(1)
    return need


def other_models_memory(config: Config, parameters: int) -> int:
    """Of the models beside the policy: each rank has a whole copy, and averages in float32."""
    size = number_bytes(config)
    total = 0
    for other in config.models.values():
        if other.kind == "policy":
            continue
        count = parameters
        if other.path:
            count = parameter_count(Path(other.path)) or parameters
        total += count * size
        if other.kind == "ema" and size < 4:
            total += count * 4
    return total


def parameter_count(folder: Path) -> int | None:
    """Numbers in the weight files of a model folder, from their headers alone; None where there are
    none. Raises ConfigError for a file that is damaged.
    """
    shapes = tensor_shapes(folder) if folder.is_dir() else {}
    count = sum(map(math.prod, shapes.values()))
    return count or None


def check_weights(path: str) -> None:
    """Raise ConfigError if a local model folder holds no weights, or damaged ones."""
    folder = Path(path)
    if folder.is_dir() and parameter_count(folder) is None:
        raise ConfigError(
            f"model folder {folder} has no weights: expected *.safetensors or "
            "pytorch_model*.bin beside its config.json"
        )


def check_model(config: Config, path: str) -> None:
    """Raise ConfigError if a local model folder holds no weights or damaged ones, or if the model
    has less context than the run needs.

    The weights of a hub name are left to transformers and vLLM. vLLM wants room for the longest
    prompt allowed, in-process engines for the prompts there are.
    """
    check_weights(path)
    context = rollout_context(read_config(config.model, path))
    if context is None or not generates(config):
        return
    need = engine_length(config)
    if config.mode == "inline":
        longest_response = max(config.rollout.max_tokens, config.eval.max_tokens or 0)
        need = config.rollout.max_model_len or 1 + longest_response
    if need > context:
        key = "data.max_prompt_tokens + rollout.max_tokens (or eval.max_tokens)"
        if config.rollout.max_model_len:
            key = "rollout.max_model_len"
        raise ConfigError(
            f"{key} asks for {need} tokens, but the model {config.model.path!r} has a context of "
            f"{context} (max_position_embeddings of its config.json, or what it calls that); "
            "lower them"
        )


def check_models_beside(config: Config, tokenizer: Any) -> None:
    """The same for the models that the policy is compared with, and that they read its ids."""
    check_other_models(config, tokenizer)
    for other in config.models.values():
        if other.path:
            model = replace(config.model, path=other.path)
            check_model(replace(config, model=model), resolve_model(model))


def engine_count(config: Config) -> int:
    """Rollout engines that a run with mode=cluster has."""
    return config.cluster.engines if generates(config) else 0


def generates(config: Config) -> bool:
    """Whether a run, or a command without a method, samples from the model."""
    from tandem.algorithms.registry import configured  # imports torch

    if config.rollout.backend == "replay":
        return False
    if not config.method or config.data.evaluation is not None:
        return True
    return configured(config.method).uses_rollouts
