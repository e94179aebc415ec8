"""Engines and learner ranks that share a place, engines that sleep meanwhile, and processes with
cores of their own: what is asked of Ray, and what is refused.
"""

import os
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tandem.engine.config.schema import ClusterConfig, Config, RunConfig
from tandem.engine.core import process as core_process
from tandem.engine.core.errors import ConfigError
from tandem.launch import machine, reservation
from tandem.launch.check_config import load

TREE = {
    "model": {"path": "tandem:tiny"},
    "data": {"prompts": {"path": "task:sort"}},
    "method": {"name": "grpo"},
    "reward": {"functions": ["exact"]},
    "cluster": {"engines": 2, "learner_ranks": 2, "engine_cpus": 0.25, "learner_cpus": 0.25},
}
HALVES = ["cluster.colocate=true", "cluster.engine_gpus=0.5", "cluster.learner_gpus=0.5"]


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TREE))
    return tmp_path / "c.yaml"


def test_a_colocated_pair_has_one_bundle_with_the_resources_of_both(tree):
    asked = reservation.reservation(
        load(
            tree,
            [*HALVES, "cluster.engine_gpus=0.6", "cluster.learner_gpus=0.3", "rollout.sleep=true"],
        )
    )
    assert asked.bundles == ({"CPU": 0.5, "GPU": 0.9},) * 2
    assert (
        [asked.engine_bundle(i) for i in (0, 1)]
        == [asked.learner_bundle(r) for r in (0, 1)]
        == [0, 1]
    )
    assert (
        "2 place(s) of {CPU 0.5, GPU 0.9}, each with engine and learner rank (cluster.colocate)"
        in asked.describe()
    )
    apart = reservation.reservation(load(tree, []))
    assert len(apart.bundles) == 4 and [apart.learner_bundle(r) for r in (0, 1)] == [2, 3]


def test_the_place_of_a_pair_stays_whole_where_one_side_is_missing():
    """Else two engines with half a GPU each, made for a GPU of their own beside a learner, would
    get the same one in an evaluation.
    """
    cluster = ClusterConfig(
        engines=2, learner_ranks=2, colocate=True, engine_gpus=0.5, learner_gpus=0.5
    )
    asked = reservation.reservation(Config(cluster=cluster, run=RunConfig(rollout_only=True)))
    assert [b["GPU"] for b in asked.bundles] == [1.0, 1.0] and asked.ranks == 0


def test_the_weights_of_a_sleeping_engine_are_counted_as_host_memory(tree, tmp_path):
    save_file({"w": torch.zeros(1000)}, tmp_path / "model.safetensors")

    def engine(*more):
        return (
            machine.memory_need(load(tree, [*HALVES, *more]), tmp_path).engine
            - machine.ENGINE_RUNTIME
        )

    assert engine() == 0 and engine("rollout.sleep=true") == 4000


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["cluster.colocate=true", "cluster.engines=3"],
            ["cluster.engines is 3", "cluster.learner_ranks 2"],
        ),
        (
            ["cluster.colocate=true", "cluster.tensor_parallel=2"],
            ["cluster.colocate", "cluster.tensor_parallel is 2"],
        ),
        (
            ["cluster.colocate=true", "cluster.engine_gpus=1", "cluster.learner_gpus=1"],
            ["cluster.engine_gpus is 1", "cluster.learner_gpus is 1", "together at most 1"],
        ),
        (
            ["cluster.colocate=true", "cluster.engine_gpus=0.2", "cluster.learner_gpus=0.2"],
            ["more than 0.5"],
        ),
        ([*HALVES, "sync.transport=nccl"], ["sync.transport is nccl", "cluster.colocate"]),
        (
            [
                "cluster.colocate=true",
                "mode=inline",
                "cluster.learner_ranks=1",
                "cluster.engines=1",
            ],
            ["cluster.colocate", "mode=inline"],
        ),
        (
            ["rollout.sleep=true"],
            ["rollout.sleep", "cluster.colocate is false", "cluster.engine_gpus is 0"],
        ),
        (
            ["rollout.sleep=true", "cluster.colocate=true"],
            ["rollout.sleep", "cluster.engine_gpus is 0"],
        ),
        (
            [*HALVES, "rollout.sleep=true", "rollout.staleness=1"],
            ["rollout.sleep", "rollout.staleness is 1"],
        ),
        (
            ["cluster.pin_cores=true", "cluster.address=auto"],
            ["cluster.pin_cores", "cluster.address is 'auto'"],
        ),
        (["cluster.pin_cores=true", *HALVES], ["cluster.pin_cores", "cluster.engine_gpus is 0.5"]),
        (
            ["cluster.pin_cores=true", "mode=inline", "cluster.learner_ranks=1"],
            ["cluster.pin_cores", "mode=inline"],
        ),
    ],
)
def test_each_contradiction_names_both_keys(tree, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(tree, overrides)
    assert all(word in str(caught.value) for word in words), caught.value


def test_more_pinned_threads_than_cores_are_refused_before_anything_starts(tree):
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(
        ConfigError,
        match=(
            rf"2 engine\(s\) and 2 learner rank\(s\) cluster.threads={cores} .* {4 * cores} in "
            rf"all, but this process may use {cores}"
        ),
    ):
        reservation.preflight(load(tree, ["cluster.pin_cores=true", f"cluster.threads={cores}"]))


@pytest.mark.parametrize("process, own", [(0, [2, 3]), (1, [5, 7]), (2, [8, 9])])
def test_processes_are_numbered_over_the_cores_there_are(monkeypatch, process, own):
    """The cores of a container may have gaps."""
    moved = {}
    monkeypatch.setattr(
        core_process,
        "os",
        SimpleNamespace(
            sched_getaffinity=lambda pid: {9, 2, 3, 5, 7, 8},
            listdir=lambda path: ["11", "12"],
            sched_setaffinity=lambda thread, cores: moved.update({thread: cores}),
        ),
    )
    core_process.pin_cores(threads=2, process=process)
    assert moved == {11: own, 12: own}
    with pytest.raises(ConfigError, match="finds 0 core"):
        core_process.pin_cores(threads=2, process=3)
