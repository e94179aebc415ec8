"""What this machine has (CPUs, memory, GPUs, ports), and what a run will need of its memory.

Fast: nothing heavier than file reads.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.context import engine_length, rollout_context
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
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def available_memory() -> int:
    """Bytes that new processes can take: free memory and cache of the machine, within the
    container's limit.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (
        read_words("/sys/fs/cgroup/memory.max"),
        read_words("/sys/fs/cgroup/memory.current"),
    )
    if limit and used and limit[0] != "max":
        available = min(available, int(limit[0]) - int(used[0]))
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
    names = (
        [line.strip() for line in listed.stdout.splitlines() if line.strip()]
        if listed.returncode == 0
        else []
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        names
        if visible is None
        else names[: len([v for v in visible.split(",") if v.strip() not in ("", "-1")])]
    )


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
    return Path(path).read_text().split() if Path(path).is_file() else []


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes of host memory.

    Activations are not counted: they grow with learner.micro_batch_tokens.
    """

    parameters: int
    engine: float  # each
    engines: int
    rank: float  # each
    ranks: int
    shared: float

    @property
    def total(self) -> float:
        return self.engine * self.engines + self.rank * self.ranks + self.shared

    def describe(self) -> str:
        return (
            f"a model of {self.parameters / 1e6:.1f}M parameters needs about "
            f"{self.total / GIB:.1f} GiB ({self.engines} engine(s) x "
            f"{self.engine / GIB:.1f}, {self.ranks} learner rank(s) x {self.rank / GIB:.1f}, "
            f"driver and Ray {self.shared / GIB:.1f}; activations not counted)"
        )


def memory_plan(config: Config, model_path: str | Path) -> MemoryPlan | None:
    """Host memory of a run with engines and ranks on this machine; None if the model's size cannot
    be read from its folder.

    A learner rank holds the weights, their gradients, and in float32 the two Adam moments, plus
    master weights if the model itself is bfloat16; ZeRO 1 splits the optimizer's part over the
    ranks, 2 also the gradients, 3 also the weights. What lives on a GPU is not host memory.
    """
    parameters = parameter_count(Path(model_path))
    if parameters is None:
        return None
    c, size = config.cluster, 4 if config.model.dtype == "float32" else 2
    optimizer, stage = (8 if size == 4 else 12), config.learner.zero_stage

    def share(since):
        return 1.0 / c.learner_ranks if stage >= since else 1.0

    # the weights of an engine that sleeps
    waiting = parameters * size if config.rollout.sleep else 0
    engine = ENGINE_RUNTIME + (
        waiting if c.engine_gpus else parameters * size + config.rollout.kv_cache_gib * GIB
    )

    def on_host(held):
        return held if not c.learner_gpus else 0.0

    rank = LEARNER_RUNTIME + parameters * (
        on_host(size * share(3))
        + on_host(size * share(2))
        + optimizer * share(1) * (not c.learner_gpus or config.learner.offload_optimizer)
    )
    return MemoryPlan(
        parameters,
        engine,
        0 if config.rollout.backend == "replay" else c.engines,
        rank,
        0 if config.run.rollout_only else c.learner_ranks,
        DRIVER_RUNTIME + (c.object_store_mib << 20),
    )


def parameter_count(folder: Path) -> int | None:
    """Numbers in the weight files of a model folder, from their headers alone; None where there are
    none. Raises ConfigError for a file that is damaged.
    """
    shapes = tensor_shapes(folder) if folder.is_dir() else {}
    return sum(math.prod(shape) for shape in shapes.values()) or None


def check_model(config: Config, path: str) -> None:
    """Raise ConfigError if a local model folder holds no weights or damaged ones, or if the model
    has less context than the run needs.

    The weights of a hub name are left to transformers and vLLM. vLLM wants room for the longest
    prompt allowed, in-process engines for the prompts there are.
    """
    folder = Path(path)
    if folder.is_dir() and parameter_count(folder) is None:
        raise ConfigError(
            f"model folder {folder} has no weights: expected *.safetensors or "
            "pytorch_model*.bin beside its config.json"
        )
    from tandem.algorithms.registry import configured  # these two import torch
    from tandem.engine.model.resolve import read_config

    context = rollout_context(read_config(config.model, path))
    generates = (
        not config.method
        or configured(config.method).uses_rollouts
        or config.data.evaluation is not None
    )
    if context is None or not generates or config.rollout.backend == "replay":
        return
    if config.mode == "cluster":
        need = engine_length(config)
    else:
        need = config.rollout.max_model_len or 1 + max(
            config.rollout.max_tokens, config.eval.max_tokens or 0
        )
    if need > context:
        key = "data.max_prompt_tokens + rollout.max_tokens (or eval.max_tokens)"
        if config.rollout.max_model_len:
            key = "rollout.max_model_len"
        raise ConfigError(
            f"{key} asks for {need} tokens, but the model {config.model.path!r} has a "
            f"context of {context} "
            "(max_position_embeddings of its config.json, or what it calls that); lower them"
        )
