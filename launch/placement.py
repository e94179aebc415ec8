"""Placement: where engines and learner ranks run, from the config's `cluster:` block.

    bundle 0 .. E-1         one per rollout engine   {CPU: engine_cpus, GPU: engine_gpus}
    bundle E .. E+R-1       one per learner rank     {CPU: learner_cpus, GPU: learner_gpus}

With `cluster.colocate` bundle i holds engine i and learner rank i, and the resources of both: a
bundle lies on one node, and takes its GPU share from one GPU. With `cluster.pin_cores` processes
are numbered like that, engines first, and process p has cores p x threads and the `threads` - 1
after it.

`preflight` refuses, before anything starts, what this machine cannot hold. `start` starts a local
Ray or attaches to `cluster.address`, reserves all bundles at once, says what it asked for and what
it got, and gives up at `cluster.deadline` with an error that names both.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.process import MALLOC
from tandem.launch.machine import (
    GIB,
    available_memory,
    cpu_count,
    gpu_count,
    memory_plan,
    port_is_free,
)
from tandem.launch.variables import raise_file_limit, ray_folder, socket_env


@dataclass(frozen=True)
class Plan:
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

    def describe(self) -> str:
        if self.colocated:
            sides = " and ".join(
                name
                for name, count in (("engine", self.engines), ("learner rank", self.ranks))
                if count
            )
            return (
                f"{len(self.bundles)} place(s) of {show(self.bundles[0])}, each with {sides} "
                f"(cluster.colocate), strategy {self.strategy}"
            )
        parts = []
        if self.engines:
            parts.append(f"{self.engines} engine(s) of {show(self.bundles[0])}")
        if self.ranks:
            parts.append(f"{self.ranks} learner rank(s) of {show(self.bundles[-1])}")
        return f"{', '.join(parts)}, strategy {self.strategy}"


@dataclass(frozen=True)
class Placement:
    """Reserved places.

    Actors go to `group` with the bundle index given here and the environment of their side.
    """

    group: Any  # ray.util.placement_group.PlacementGroup
    plan: Plan
    engine_env: dict[str, str]
    learner_env: dict[str, str]

    def engine_bundle(self, engine: int) -> int:
        return self.plan.engine_bundle(engine)

    def learner_bundle(self, rank: int) -> int:
        return self.plan.learner_bundle(rank)

    def close(self) -> None:
        """Give the places back and leave Ray; a local Ray ends with it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if ray.is_initialized():
            remove_placement_group(self.group)
            ray.shutdown()


def plan(config: Config) -> Plan:
    """The bundles of a config.

    Replayed rollouts need no engine, rollout-only runs no learner; a colocated pair's place stays
    whole without one of them.
    """
    c = config.cluster
    engines = config.engine_count
    ranks = 0 if config.run.rollout_only else c.learner_ranks

    # rounded: 0.6 + 0.3 is 0.8999 to Ray, in which both would not fit
    def bundle(cpus, gpus):
        return {name: round(float(n), 4) for name, n in (("CPU", cpus), ("GPU", gpus)) if n}

    if c.colocate:
        return Plan(
            engines,
            ranks,
            (bundle(c.engine_cpus + c.learner_cpus, c.engine_gpus + c.learner_gpus),)
            * max(engines, ranks),
            c.strategy,
            colocated=True,
        )
    bundles = (bundle(c.engine_cpus, c.engine_gpus),) * engines + (
        bundle(c.learner_cpus, c.learner_gpus),
    ) * ranks
    return Plan(engines, ranks, bundles, c.strategy)


def preflight(config: Config, model_path: str | Path | None = None) -> None:
    """Refuse what cannot work here, before Ray starts.

    With `cluster.address` only the port is looked at: Ray knows the other nodes.

    `model_path`: a local model folder, for the memory estimate; without it memory is not checked.
    """
    c, wanted = config.cluster, plan(config)
    needed = {"ray": True, "vllm": wanted.engines > 0, "deepspeed": wanted.ranks > 0}
    if missing := [
        name for name, used in needed.items() if used and importlib.util.find_spec(name) is None
    ]:
        raise ConfigError(
            f"mode=cluster needs {', '.join(missing)}, not installed for {sys.executable}; "
            "run launch/setup.sh (`make setup`), "
            "or use mode=inline, which does without"
        )
    for side, bundle, count in (
        ("engine", (c.engine_cpus, c.engine_gpus), wanted.engines),
        ("learner", (c.learner_cpus, c.learner_gpus), wanted.ranks),
    ):
        if count and not any(bundle):
            raise ConfigError(
                f"cluster.{side}_cpus and cluster.{side}_gpus are both 0; give at least one, "
                "a fraction such as 0.5 will do"
            )
    if c.port is not None and not port_is_free(c.port):
        raise ConfigError(
            f"cluster.port is {c.port}, which is in use on {socket.gethostname()}; choose "
            "another, or leave it out to take any free port"
        )
    if c.address is not None:
        return

    def asked(engine, rank):
        return (
            f"{len(wanted.bundles)} colocated pair(s) x {engine:g} + {rank:g}"
            if wanted.colocated
            else f"engines {wanted.engines} x {engine:g}, learner {wanted.ranks} x {rank:g}"
        )

    if (gpus := wanted.total("GPU")) > gpu_count():
        raise ConfigError(
            f"the cluster section asks for {gpus:g} GPU(s) "
            f"({asked(c.engine_gpus, c.learner_gpus)}), "
            f"but {gpu_count()} can be used here; lower cluster.engine_gpus and "
            "cluster.learner_gpus, or set cluster.address to a cluster that has them"
        )
    if (cpus := wanted.total("CPU")) > cpu_count():
        raise ConfigError(
            f"the cluster section asks for {cpus:g} CPUs ({asked(c.engine_cpus, c.learner_cpus)}), "
            f"this machine has {cpu_count()}; to share cores give fractions, e.g. "
            "cluster.learner_cpus=0.5, or ask for fewer processes"
        )
    if c.pin_cores and (processes := wanted.engines + wanted.ranks) * c.threads > (
        cores := len(os.sched_getaffinity(0))
    ):
        raise ConfigError(
            f"cluster.pin_cores gives each of {wanted.engines} engine(s) and {wanted.ranks} "
            f"learner rank(s) cluster.threads={c.threads} core(s) "
            f"of its own, {processes * c.threads} in all, but this process may use {cores}; "
            "lower cluster.threads, ask for fewer processes, or set "
            "cluster.pin_cores=false"
        )
    if c.strategy == "STRICT_SPREAD" and len(wanted.bundles) > 1:
        raise ConfigError(
            "cluster.strategy is STRICT_SPREAD, which puts each of the "
            f"{len(wanted.bundles)} bundles on a node of its own, but without "
            "cluster.address there is one node; use SPREAD or PACK, or set cluster.address"
        )
    memory = memory_plan(config, model_path) if model_path is not None else None
    if memory is not None and memory.total > available_memory():
        raise ConfigError(
            f"not enough memory: {memory.describe()}; {available_memory() / GIB:.1f} GiB are "
            "available here. Lower rollout.kv_cache_gib or "
            "cluster.engines, use model.dtype=bfloat16 or a smaller model, or raise "
            "learner.zero_stage with more machines"
        )


def start(config: Config, run_dir: str | Path, say: Callable[[str], None] = print) -> Placement:
    """Start or join Ray and reserve every bundle; `say` gets a line about what was asked for, the
    waiting, and what was got.

    Raises ConfigError if the cluster cannot be reached or cannot hold the plan within the deadline.
    """
    for key, value in {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(key, value)
    import ray

    wanted, c = plan(config), config.cluster
    raise_file_limit()
    say(f"placement: asked for {wanted.describe()}")
    if c.address is None:
        with stop.keeping():
            ray.init(
                address="local",
                num_cpus=cpu_count(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=c.object_store_mib << 20,
                _temp_dir=ray_folder(),
            )
    else:
        attach(c.address)
    try:
        link_logs(Path(run_dir))
        group = reserve(wanted, c.deadline, say)
    except BaseException:
        ray.shutdown()
        raise
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    everyone = [
        *((f"engine {i}", wanted.engine_bundle(i)) for i in range(wanted.engines)),
        *((f"learner rank {r}", wanted.learner_bundle(r)) for r in range(wanted.ranks)),
    ]
    got = [f"{who} on {names[nodes[bundle]]} ({nodes[bundle][:6]})" for who, bundle in everyone]
    say(f"placement: got {', '.join(got)}")
    return Placement(
        group, wanted, worker_env(config, c.engine_gpus), worker_env(config, c.learner_gpus)
    )


def attach(address: str) -> None:
    """Join a running Ray cluster.

    Ray itself would wait for minutes for a head that is not there, so its port is tried first.
    """
    import ray

    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            if "//" in host or not host or not port.isdigit():
                raise ConfigError(
                    f"cluster.address is {address!r}, expected HOST:PORT of the cluster's "
                    "head (port 6379 unless chosen otherwise) or auto; "
                    "ray:// addresses are not supported: start tandem on a node of the cluster"
                )
            socket.create_connection((host, int(port)), timeout=10).close()
        with stop.keeping():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:  # ConnectionError, what Ray raises for auto, is one too
        raise ConfigError(
            f"cluster.address is {address!r}, but no Ray cluster answers there "
            f"({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or leave the address out for a local Ray"
        ) from None


def reserve(wanted: Plan, deadline: float, say: Callable[[str], None]):
    """A ready placement group, or ConfigError after `deadline` seconds.

    Says every 10 s that it waits.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(wanted.bundles), strategy=wanted.strategy)
    end = time.monotonic() + deadline
    while not group.wait(max(0.1, min(10.0, end - time.monotonic()))):
        left = end - time.monotonic()
        if left <= 0:
            free = ray.available_resources()
            remove_placement_group(group)
            raise ConfigError(
                f"no place after {deadline:g} s (cluster.deadline)\n  asked: "
                f"{wanted.describe()}\n  the cluster has:\n{node_table()}\n"
                f"  free now: {show({k: free.get(k, 0.0) for k in ('CPU', 'GPU')})}\n"
                "ask for less (cluster.engines, engine_cpus, engine_gpus, learner_ranks, "
                "learner_cpus, learner_gpus), use another "
                "cluster.strategy, or add nodes"
            )
        say(f"placement: waiting for resources, giving up in {left:.0f} s")
    return group


def node_table() -> str:
    import ray

    return "\n".join(
        (
            f"    {node['NodeManagerAddress']} ({node['NodeID'][:6]}): "
            f"{show({k: node['Resources'].get(k, 0.0) for k in ('CPU', 'GPU')})}"
        )
        for node in ray.nodes()
        if node["Alive"]
    )


def link_logs(run_dir: Path) -> None:
    """`ray_session` in the run folder points to Ray's own log folder, which must live under a short
    path of its own.
    """
    import ray

    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    link = run_dir / "ray_session"
    run_dir.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(session)


def worker_env(config: Config, gpus: float) -> dict[str, str]:
    """Environment of an actor with so many GPUs, on top of its node's own.

    What vLLM and DeepSpeed want beyond it, their own files set.
    """
    env = {
        "OMP_NUM_THREADS": str(config.cluster.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    env |= socket_env()
    if not gpus:
        env["DS_ACCELERATOR"] = "cpu"
        # OpenMP's own 300,000 starve other processes on the same cores; none at all (PASSIVE) cost
        # an engine a tenth
        defaults = {"GOMP_SPINCOUNT": "10000", **{key: str(value) for key, value in MALLOC.items()}}
        env |= {key: value for key, value in defaults.items() if key not in os.environ}
    if config.cluster.address is None and "GLOO_SOCKET_IFNAME" not in os.environ:
        # one machine: gloo need not find out which address its host name stands for
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def show(resources: dict[str, float]) -> str:
    return "{" + ", ".join(f"{k} {v:g}" for k, v in resources.items() if v) + "}"
