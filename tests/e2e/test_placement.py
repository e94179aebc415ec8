"""Placement on real Ray: two raylets on this machine stand for two nodes."""

import os
import time

import psutil
import pytest
from learner_cases import SPEC, make_plan, make_rows

from tandem.engine.config.schema import (
    ClusterConfig,
    Config,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
)
from tandem.engine.core.errors import ConfigError
from tandem.launch import placement

pytestmark = pytest.mark.stack


def ray_processes() -> list[tuple[int, str]]:
    return [
        (p.pid, p.name())
        for p in psutil.Process().children(recursive=True)
        if p.name() in ("raylet", "gcs_server") or "ray::" in p.name()
    ]


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a Ray cluster of two nodes with one CPU each; Ray is told that the first has
    two GPUs, which it only hands out.
    """
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=1, object_store_memory=100 << 20, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_gpus": 2})
    cluster.add_node(**{k: v for k, v in node.items() if k != "include_dashboard"})
    yield cluster.address
    cluster.shutdown()
    assert ray_processes() == []


def config(**cluster) -> Config:
    """Two learner ranks and no engine: rollouts are replayed."""
    return Config(
        model=ModelConfig(path="tandem:tiny"),
        rollout=RolloutConfig(backend="replay", record="unused"),
        learner=LearnerConfig(zero_stage=2),
        cluster=ClusterConfig(
            **{"learner_ranks": 2, "strategy": "STRICT_SPREAD", "deadline": 60, **cluster}
        ),
    )


def test_learner_ranks_of_two_nodes_train_together(two_nodes, in_tmp):
    import ray

    from tandem.engine.learner.inline import InlineLearner
    from tandem.engine.learner.ray import RayLearner
    from tandem.engine.model.resolve import resolve_model

    cfg, said = config(address=two_nodes), []
    model_path = resolve_model(cfg.model)
    places = placement.start(cfg, in_tmp / "run", said.append)
    try:
        learner = RayLearner.start(cfg, model_path, SPEC, places, in_tmp / "run")
        try:
            nodes = ray.get(
                [
                    actor.__ray_call__.remote(
                        lambda self: __import__("ray").get_runtime_context().get_node_id()
                    )
                    for actor in learner.actors
                ]
            )
            report = learner.step(make_plan(make_rows(), ranks=2))
        finally:
            learner.close()
    finally:
        places.close()
    assert len(set(nodes)) == 2
    assert any(
        "asked for 2 learner rank(s) of {CPU 1}, strategy STRICT_SPREAD" in line for line in said
    )
    assert all(
        f"learner rank {rank} on " in said[-1] and node[:6] in said[-1]
        for rank, node in enumerate(nodes)
    )
    alone = InlineLearner.start(cfg, model_path, SPEC).step(make_plan(make_rows()))
    assert report.metrics["grad_norm"] == pytest.approx(alone.metrics["grad_norm"], rel=1e-4)


def actors_of(cfg: Config, places, run_dir) -> tuple[list, list]:
    """The actors of all engines and learner ranks, made as a run makes them, but not started: where
    they are shows without vLLM and DeepSpeed.
    """
    from tandem.engine.learner import ray as ray_learner
    from tandem.rollout.pool import EnginePool

    pool = EnginePool(cfg, "unused", places, run_dir)
    return [pool.actor(i, stale=False) for i in range(cfg.cluster.engines)], ray_learner.actors(
        cfg, "unused", SPEC, places, run_dir
    )


# a node each
@pytest.mark.parametrize(
    "cluster",
    [
        dict(strategy="STRICT_SPREAD", engine_cpus=0.5, learner_cpus=0.5),
        # a GPU of one node each
        dict(
            strategy="STRICT_PACK",
            engine_cpus=0.25,
            learner_cpus=0.25,
            engine_gpus=0.5,
            learner_gpus=0.5,
        ),
    ],
)
def test_a_colocated_engine_is_where_its_learner_rank_is_and_nobody_else(
    two_nodes, in_tmp, cluster
):
    import ray

    cfg, said = (
        Config(
            cluster=ClusterConfig(
                address=two_nodes, engines=2, learner_ranks=2, colocate=True, deadline=60, **cluster
            )
        ),
        [],
    )
    places = placement.start(cfg, in_tmp / "run", said.append)
    try:
        engines, ranks = actors_of(cfg, places, in_tmp / "run")

        def where(actor):
            return (
                __import__("ray").get_runtime_context().get_node_id(),
                __import__("ray").get_gpu_ids(),
            )

        found = ray.get(
            [actor.__ray_call__.remote(where) for actor in (*engines, *ranks)], timeout=120
        )
    finally:
        places.close()
    assert found[:2] == found[2:] and found[0] != found[1], found
    if "engine_gpus" in cluster:
        assert sorted(gpus for _, gpus in found[:2]) == [[0], [1]] and found[0][0] == found[1][0]
    assert (
        "asked for 2 place(s) of {CPU" in said[0] and "each with engine and learner rank" in said[0]
    )
    assert all(f"{who} {i} on " in said[-1] for who in ("engine", "learner rank") for i in (0, 1))


def test_what_no_cluster_can_hold_ends_at_the_deadline(two_nodes, in_tmp):
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        placement.start(
            config(address=two_nodes, learner_ranks=3, deadline=3),
            in_tmp / "run",
            lambda line: None,
        )
    assert time.monotonic() - began < 60
    message = str(caught.value)
    assert (
        "no place after 3 s (cluster.deadline)" in message
        and "asked: 3 learner rank(s) of {CPU 1}, strategy STRICT_SPREAD" in message
    )
    # what each of the two nodes has
    assert message.count(": {CPU 1}\n") == 1 and message.count(": {CPU 1, GPU 2}\n") == 1, message

    # the failed request left nothing reserved
    places = placement.start(config(address=two_nodes), in_tmp / "run", lambda line: None)
    places.close()


def test_local_ray_gives_engines_and_ranks_their_places_and_ends(in_tmp):
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cfg = Config(
        cluster=ClusterConfig(
            engines=2, engine_cpus=0.25, learner_ranks=2, learner_cpus=0.5, threads=3
        )
    )
    before = set(ray_processes())  # of the other tests' cluster
    places = placement.start(cfg, in_tmp / "run", lambda line: None)
    assert any(name == "raylet" for _, name in set(ray_processes()) - before)
    try:

        @ray.remote
        def probe():
            import os

            import ray

            return (
                ray.get_runtime_context().get_assigned_resources(),
                os.environ["OMP_NUM_THREADS"],
                os.environ["DS_ACCELERATOR"],
            )

        def at(bundle, cpus, env):
            return probe.options(
                num_cpus=cpus,
                runtime_env={"env_vars": env},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    places.group, placement_group_bundle_index=bundle
                ),
            ).remote()

        bundles = [
            places.engine_bundle(0),
            places.engine_bundle(1),
            places.learner_bundle(0),
            places.learner_bundle(1),
        ]
        assert bundles == [0, 1, 2, 3] and [b["CPU"] for b in places.group.bundle_specs] == [
            0.25,
            0.25,
            0.5,
            0.5,
        ]
        resources, threads, accelerator = ray.get(
            at(places.learner_bundle(1), 0.5, places.learner_env), timeout=120
        )
        assert (resources, threads, accelerator) == ({"CPU": 0.5}, "3", "cpu")
        assert (in_tmp / "run" / "ray_session" / "logs").is_dir()
    finally:
        places.close()
    assert set(ray_processes()) <= before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_pinned_engine_and_rank_have_a_core_each_with_all_their_threads(in_tmp):
    """Those of vLLM's own process: tests/faults/test_engine_death.py."""
    import ray

    cfg, cores = (
        Config(cluster=ClusterConfig(engine_cpus=0.5, learner_cpus=0.5, pin_cores=True)),
        sorted(os.sched_getaffinity(0)),
    )
    places = placement.start(cfg, in_tmp / "run", lambda line: None)
    try:
        engines, ranks = actors_of(cfg, places, in_tmp / "run")

        def threads(actor):
            return [
                sorted(__import__("os").sched_getaffinity(int(t)))
                for t in __import__("os").listdir("/proc/self/task")
            ]

        engine, rank = ray.get(
            [actor.__ray_call__.remote(threads) for actor in (*engines, *ranks)], timeout=120
        )
    finally:
        places.close()
    assert len(engine) > 1 and engine == [cores[:1]] * len(engine), engine
    assert len(rank) > 1 and rank == [cores[1:2]] * len(rank), rank
    assert sorted(os.sched_getaffinity(0)) == cores, "the driver stays free"


@pytest.mark.parametrize(
    "address, said",
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT"),
        ("head", "expected HOST:PORT"),
    ],
)
def test_address_without_a_cluster_is_the_users_mistake(in_tmp, address, said):
    with pytest.raises(ConfigError, match=f"cluster.address is '{address}'.* {said}"):
        placement.start(config(address=address), in_tmp / "run", lambda line: None)
