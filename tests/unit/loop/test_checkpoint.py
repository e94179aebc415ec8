"""Writing, pruning and reading checkpoints, and the state of a run in them."""

import os
import pickle
import random
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from tandem.engine.core.errors import CheckpointError
from tandem.engine.core.types import (
    Finish,
    GenRequest,
    Prompt,
    RewardOutcome,
    Sampling,
    ScoredGroup,
    Trajectory,
)
from tandem.engine.loop.checkpoint import Checkpoints
from tandem.engine.loop.state import (
    COMPONENTS,
    FILE,
    RunState,
    read_state,
    rng_state,
    set_rng_state,
    write_state,
)
from tandem.engine.loop.tickets import RolloutCounts


def put(checkpoints: Checkpoints, step: int, content: str = "") -> None:
    with checkpoints.write(step) as folder:
        (folder / "file").write_text(content or f"step {step}")


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "made on first use", keep=2)
    assert checkpoints.latest() is None
    for step in (9, 10, 11, 100):  # by number, not by name
        put(checkpoints, step)
    assert sorted(os.listdir(checkpoints.folder)) == ["step_100", "step_11"]
    assert checkpoints.latest() == (100, checkpoints.folder / "step_100")


def test_the_same_step_again_replaces(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    put(checkpoints, 3, "first")
    put(checkpoints, 3, "second")
    assert os.listdir(tmp_path) == ["step_3"]
    assert (checkpoints.latest()[1] / "file").read_text() == "second"


def test_a_failed_block_leaves_no_trace_and_its_error_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    put(checkpoints, 1)
    with pytest.raises(KeyboardInterrupt), checkpoints.write(2) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["step_1"] and checkpoints.latest()[0] == 1


def test_a_reader_leaves_a_writer_alone(tmp_path):
    writer, reader = Checkpoints(tmp_path, keep=1), Checkpoints(tmp_path, keep=1)
    put(writer, 1)
    with writer.write(2) as folder:
        (folder / "file").write_text("in progress")
        assert reader.latest()[0] == 1
    assert reader.latest()[0] == 2


def test_after_a_damaged_later_checkpoint_the_new_one_survives_pruning(tmp_path):
    """Resumed from 5 because 9 was damaged: keep=1 must not drop the new 6 for the damaged 9."""
    checkpoints = Checkpoints(tmp_path, keep=2, report=lambda line: None)
    put(checkpoints, 5)
    put(checkpoints, 9)
    (tmp_path / "step_9" / "file").unlink()
    resumed = Checkpoints(tmp_path, keep=1, report=lambda line: None)
    assert resumed.latest()[0] == 5
    put(resumed, 6)
    assert resumed.latest()[0] == 6
    put(resumed, 7)
    assert resumed.latest()[0] == 7
    put(resumed, 9, "whole again")
    assert resumed.latest()[0] == 9 and sorted(os.listdir(tmp_path)) == ["step_9"]


def test_run_state_comes_back_exactly(tmp_path):
    prompt = Prompt(
        "p", np.array([5, 6], np.int32), [{"role": "user", "content": "hi"}], {"answer": {1, 2}}
    )
    trajectory = Trajectory(
        "p",
        np.array([5, 6, 7], np.int32),
        np.array([0, 0, 1], np.int8),
        Finish.LENGTH,
        np.array([np.nan, np.nan, -0.1], np.float32),
        np.array([-1, -1, 3], np.int32),
        group=4,
    )
    group = ScoredGroup(
        4,
        prompt,
        (trajectory,),
        np.array([0.5], np.float32),
        (RewardOutcome(0.5, {"exact": 0.5}),),
        ("text",),
    )
    request = GenRequest(5, prompt, 8, Sampling(32, seed=9))
    state = RunState(
        step=4,
        signals={"entropy": 1.5, "grad_norm": float("inf")},
        gated=2,
        tokens=77,
        optimizer_steps={"main": 3, "sft": 1},
        version=4,
    )
    components = {
        "producer": {"tickets": [(4, [(request, group), (request, None)])]},
        "cursors": {"prompts": {"epoch": 1, "at": 17}},
        "method": {"mu": 0.25},
        "rng": {},
    }
    write_state(tmp_path, {**state.capture(), **components})
    saved = read_state(tmp_path)
    back = RunState(version=9)
    back.restore(saved)
    assert back == replace(state, version=None), "the engines have to be given the weights"
    assert saved["cursors"] == components["cursors"] and saved["method"] == components["method"]
    ((_, ((request_back, group_back), (_, nothing))),) = saved["producer"]["tickets"]
    assert (
        nothing is None
        and request_back.sampling == request.sampling
        and request_back.prompt.columns == prompt.columns
    )
    for name in ("tokens", "source", "behaviour_logp", "version"):
        found, expected = getattr(group_back.trajectories[0], name), getattr(trajectory, name)
        assert found.dtype == expected.dtype and np.array_equal(
            found, expected, equal_nan=name == "behaviour_logp"
        )
    assert (
        group_back.trajectories[0].finish is Finish.LENGTH
        and group_back.rewards.tolist() == [0.5]
        and group_back.outcomes == group.outcomes
    )


def test_state_of_another_version_is_refused_by_name(tmp_path):
    (tmp_path / FILE).write_bytes(pickle.dumps({"step": 1, "momentum": 2}))
    with pytest.raises(CheckpointError, match=r"lacks \['cursors'.*unknown \['momentum'\]"):
        read_state(tmp_path)


def test_classes_of_version_0_1_0_are_found_where_they_are_now(tmp_path):
    """Pickled with the module names of that version; one that has gone is told."""

    def pickled_as(module, name, attributes):
        kind = type(name, (), {"__module__": module})
        one = kind()
        one.__dict__.update(attributes)
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, kind)
        try:
            return pickle.dumps({**RunState().capture(), **dict.fromkeys(COMPONENTS), "rng": one})
        finally:
            del sys.modules[module]

    books = {"requested": 3, "accepted": 1, "filtered": 1, "failed": 0, "aborted": 1, "tokens": 8}
    (tmp_path / FILE).write_bytes(
        pickled_as("tandem.engine.producer", "Books", {**books, "reissued": 2})
    )
    assert RolloutCounts.of_state(read_state(tmp_path)["rng"]) == RolloutCounts(**books)
    (tmp_path / FILE).write_bytes(pickled_as("tandem.engine.gone", "Thing", {}))
    with pytest.raises(CheckpointError, match=r"another version of Tandem.*tandem\.engine\.gone"):
        read_state(tmp_path)


def test_random_generators_go_on_where_they_were():
    def draw():
        return (random.random(), float(np.random.rand()), float(torch.rand(())))

    before = rng_state()
    try:
        draw()
        state = pickle.loads(pickle.dumps(rng_state()))
        first = draw()
        assert draw() != first
        set_rng_state(state)
        assert draw() == first
    finally:
        set_rng_state(before)
