"""Placement: Ray is started, and the places of engines and learner ranks are reserved.

`start` starts a local Ray or attaches to `cluster.address`, reserves all bundles at once, says what
it asked for and what it got, and gives up at `cluster.deadline` with an error that names both.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.process import MALLOC
from tandem.engine.core.text import first_line
from tandem.launch.machine import cpu_count
from tandem.launch.reservation import Reservation, reservation, show
from tandem.launch.variables import raise_file_limit, ray_folder, socket_env

# for every process of Ray's
RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Placement:
    """Reserved places: actors go to `group` with the bundle index given here and the environment of
    their side.
    """

    group: Any  # ray.util.placement_group.PlacementGroup
    reservation: Reservation
    engine_env: dict[str, str]
    learner_env: dict[str, str]

    def engine_bundle(self, engine: int) -> int:
        return self.reservation.engine_bundle(engine)

    def learner_bundle(self, rank: int) -> int:
        return self.reservation.learner_bundle(rank)

    def close(self) -> None:
        """Give the places back and leave Ray; a local Ray ends with it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if ray.is_initialized():
            remove_placement_group(self.group)
            ray.shutdown()


def start(config: Config, run_dir: str | Path, say: Callable[[str], None] = print) -> Placement:
    """Start or join Ray and reserve every bundle; `say` gets a line about what was asked for, the
    waiting, and what was got.

    Raises ConfigError if the cluster cannot be reached or has no room within the deadline.
    """
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    import ray

    c = config.cluster
    wanted = reservation(config)
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
    got = ", ".join(places(group, wanted))
    say(f"placement: got {got}")
    return Placement(
        group=group,
        reservation=wanted,
        engine_env=worker_env(config, c.engine_gpus),
        learner_env=worker_env(config, c.learner_gpus),
    )


def places(group: Any, wanted: Reservation) -> list[str]:
    """Which process got a place on which node."""
    import ray

    table = ray.util.placement_group_table(group)
    nodes = table["bundles_to_node_id"]
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    bundles = {}
    for engine in range(wanted.engines):
        bundles[f"engine {engine}"] = wanted.engine_bundle(engine)
    for rank in range(wanted.ranks):
        bundles[f"learner rank {rank}"] = wanted.learner_bundle(rank)
    found = []
    for who, index in bundles.items():
        node = nodes[index]
        found.append(f"{who} on {names[node]} ({node[:6]})")
    return found


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
            connection = socket.create_connection((host, int(port)), timeout=10)
            connection.close()
        with stop.keeping():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:  # ConnectionError, what Ray raises for auto, is one too
        raise ConfigError(
            f"cluster.address is {address!r}, but no Ray cluster answers there "
            f"({first_line(error)}); "
            "start one with `ray start --head`, or leave the address out for a local Ray"
        ) from None


def reserve(wanted: Reservation, deadline: float, say: Callable[[str], None]) -> Any:
    """A ready placement group, or ConfigError after `deadline` seconds.

    Says every 10 s that it waits.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(wanted.bundles), strategy=wanted.strategy)
    end = time.monotonic() + deadline
    left = deadline
    while not group.wait(max(0.1, min(10.0, left))):
        left = end - time.monotonic()
        if left <= 0:
            free = show(ray.available_resources())
            remove_placement_group(group)
            raise ConfigError(
                f"no place after {deadline:g} s (cluster.deadline)\n"
                f"  asked: {wanted.describe()}\n"
                f"  the cluster has:\n{node_table()}\n"
                f"  free now: {free}\n"
                "ask for less (cluster.engines, engine_cpus, engine_gpus, learner_ranks, "
                "learner_cpus, learner_gpus), use another cluster.strategy, or add nodes"
            )
        say(f"placement: waiting for resources, giving up in {left:.0f} s")
    return group


def node_table() -> str:
    import ray

    lines = []
    for node in ray.nodes():
        if node["Alive"]:
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            lines.append(f"    {name}: {show(node['Resources'])}")
    return "\n".join(lines)


def link_logs(run_dir: Path) -> None:
    """`ray_session` in the run folder points to Ray's own log folder, which must live under a short
    path of its own.
    """
    import ray

    worker = ray.get_runtime_context().worker
    session = worker.node.get_session_dir_path()
    link = run_dir / "ray_session"
    run_dir.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(session))


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
        defaults = {"GOMP_SPINCOUNT": 10_000, **MALLOC}
        for key, value in defaults.items():
            if key not in os.environ:
                env[key] = str(value)
    if config.cluster.address is None and "GLOO_SOCKET_IFNAME" not in os.environ:
        # one machine: gloo need not find out which address its host name stands for
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env
