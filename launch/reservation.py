"""What a config's `cluster:` block asks Ray for, and whether this machine can hold it.

    bundle 0 .. E-1         one per rollout engine   {CPU: engine_cpus, GPU: engine_gpus}
    bundle E .. E+R-1       one per learner rank     {CPU: learner_cpus, GPU: learner_gpus}

With `cluster.colocate` bundle i holds engine i and learner rank i, and the resources of both: a
bundle lies on one node, and takes its GPU share from one GPU. With `cluster.pin_cores` processes
are numbered like that, engines first, and process p has cores p x threads and the `threads` - 1
after it.

`preflight` refuses, before anything starts, what this machine cannot hold.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.launch.machine import (
    GIB,
    available_memory,
    cpu_count,
    engine_count,
    gpu_count,
    memory_need,
    port_is_free,
)


@dataclass(frozen=True)
class Reservation:
    """What a config asks Ray for."""

    engines: int
    ranks: int
    bundles: tuple[dict[str, float], ...]
    strategy: str
    colocated: bool = False

    def engine_bundle(self, engine: int) -> int:
        return engine

    def learner_bundle(self, rank: int) -> int:
        return rank if self.colocated else self.engines + rank

    def total(self, resource: str) -> float:
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)

    def sides(self, engine: float, rank: float) -> str:
        """How many of what engines and ranks ask for each."""
        if self.colocated:
            return f"{len(self.bundles)} colocated pair(s) x {engine:g} + {rank:g}"
        return f"engines {self.engines} x {engine:g}, learner {self.ranks} x {rank:g}"

    def describe(self) -> str:
        if self.colocated:
            sides = []
            if self.engines:
                sides.append("engine")
            if self.ranks:
                sides.append("learner rank")
            return (
                f"{len(self.bundles)} place(s) of {show(self.bundles[0])}, each with "
                f"{' and '.join(sides)} (cluster.colocate), strategy {self.strategy}"
            )
        parts = []
        if self.engines:
            parts.append(f"{self.engines} engine(s) of {show(self.bundles[0])}")
        if self.ranks:
            parts.append(f"{self.ranks} learner rank(s) of {show(self.bundles[-1])}")
        return f"{', '.join(parts)}, strategy {self.strategy}"


def reservation(config: Config) -> Reservation:
    """A run that never generates needs no engine, rollout-only runs no learner; the place of a
    colocated pair stays whole without one of them.
    """
    c = config.cluster
    engines = engine_count(config)
    ranks = 0 if config.run.rollout_only else c.learner_ranks
    if c.colocate:
        cpus = c.engine_cpus + c.learner_cpus
        gpus = c.engine_gpus + c.learner_gpus
        pair = bundle(cpus, gpus)
        bundles = (pair,) * max(engines, ranks)
    else:
        engine = bundle(c.engine_cpus, c.engine_gpus)
        learner = bundle(c.learner_cpus, c.learner_gpus)
        bundles = (engine,) * engines + (learner,) * ranks
    return Reservation(engines, ranks, bundles, c.strategy, colocated=c.colocate)


def bundle(cpus: float, gpus: float) -> dict[str, float]:
    """Rounded: 0.6 + 0.3 is 0.8999 to Ray, in which both would not fit."""
    asked = {
        "CPU": round(float(cpus), 4),
        "GPU": round(float(gpus), 4),
    }
    return {name: amount for name, amount in asked.items() if amount}


def preflight(config: Config, model_path: str | Path | None = None) -> None:
    """Refuse what cannot work here, before Ray starts.

    With `cluster.address` only packages and the port are looked at: Ray knows the other nodes.

    `model_path`: a local model folder, for the memory estimate; without it memory is not checked.
    """
    wanted = reservation(config)
    refuse_missing_packages(wanted)
    refuse_empty_bundles(config, wanted)
    port = config.cluster.port
    if port is not None and not port_is_free(port):
        raise ConfigError(
            f"cluster.port is {port}, which is in use on {socket.gethostname()}; choose "
            "another, or leave it out to take any free port"
        )
    if config.cluster.address is not None:
        return
    refuse_too_many(config, wanted)
    if config.cluster.pin_cores:
        refuse_too_few_cores(config, wanted)
    if config.cluster.strategy == "STRICT_SPREAD" and len(wanted.bundles) > 1:
        raise ConfigError(
            "cluster.strategy is STRICT_SPREAD, which puts each of the "
            f"{len(wanted.bundles)} bundles on a node of its own, but without "
            "cluster.address there is one node; use SPREAD or PACK, or set cluster.address"
        )
    if model_path is None:
        return
    memory = memory_need(config, model_path)
    available = available_memory()
    if memory is not None and memory.total > available:
        raise ConfigError(
            f"not enough memory: {memory.describe()}; {available / GIB:.1f} GiB are "
            "available here. Lower rollout.kv_cache_gib or cluster.engines, use "
            "model.dtype=bfloat16 or a smaller model, or raise learner.zero_stage with more "
            "machines"
        )


def refuse_missing_packages(wanted: Reservation) -> None:
    needed = ["ray"]
    if wanted.engines:
        needed.append("vllm")
    if wanted.ranks:
        needed.append("deepspeed")
    missing = []
    for name in needed:
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"mode=cluster needs {', '.join(missing)}, not installed for {sys.executable}; run "
            "launch/setup.sh (`make setup`), or use mode=inline, which does without"
        )


def refuse_empty_bundles(config: Config, wanted: Reservation) -> None:
    c = config.cluster
    for side, cpus, gpus, count in (
        ("engine", c.engine_cpus, c.engine_gpus, wanted.engines),
        ("learner", c.learner_cpus, c.learner_gpus, wanted.ranks),
    ):
        if count and not cpus and not gpus:
            raise ConfigError(
                f"cluster.{side}_cpus and cluster.{side}_gpus are both 0; give at least one, "
                "a fraction such as 0.5 will do"
            )


def refuse_too_many(config: Config, wanted: Reservation) -> None:
    """Raise ConfigError if more GPUs or CPUs are asked for than this machine has."""
    c = config.cluster
    gpus = wanted.total("GPU")
    cpus = wanted.total("CPU")
    if gpus > gpu_count():
        raise ConfigError(
            f"the cluster section asks for {gpus:g} GPU(s) "
            f"({wanted.sides(c.engine_gpus, c.learner_gpus)}), "
            f"but {gpu_count()} can be used here; lower cluster.engine_gpus and "
            "cluster.learner_gpus, or set cluster.address to a cluster that has them"
        )
    if cpus > cpu_count():
        raise ConfigError(
            f"the cluster section asks for {cpus:g} CPUs "
            f"({wanted.sides(c.engine_cpus, c.learner_cpus)}), "
            f"this machine has {cpu_count()}; to share cores give fractions, e.g. "
            "cluster.learner_cpus=0.5, or ask for fewer processes"
        )


def refuse_too_few_cores(config: Config, wanted: Reservation) -> None:
    threads = config.cluster.threads
    asked = (wanted.engines + wanted.ranks) * threads
    cores = len(os.sched_getaffinity(0))
    if asked > cores:
        raise ConfigError(
            f"cluster.pin_cores gives each of {wanted.engines} engine(s) and {wanted.ranks} "
            f"learner rank(s) cluster.threads={threads} core(s) of its own, {asked} in all, but "
            f"this process may use {cores}; lower cluster.threads, ask for fewer processes, or "
            "set cluster.pin_cores=false"
        )


def show(resources: Mapping[str, float]) -> str:
    """{CPU 4, GPU 0.5}; Ray's other resources are left out."""
    amounts = []
    for name in ("CPU", "GPU"):
        amount = resources.get(name)
        if amount:
            amounts.append(f"{name} {amount:g}")
    return f"{{{', '.join(amounts)}}}"
