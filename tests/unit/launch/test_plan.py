"""launch/estimate.py: its predictions of small steps against measured ones, sums by hand, and what
must hold for any split.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.engine.core.errors import ConfigError
from tandem.launch.estimate import (
    add_arguments,
    describe,
    estimates,
    fastest,
    learn_seconds,
    learner_bytes,
    rollout_seconds,
)
from tandem.launch.shapes import DEVICES, MODELS, Shape, Work, cpu

MEASURED = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "step.jsonl"
SHAPES = {"w1": Shape(134.5e6, 30, 576, 192, 49152), "w4": Shape(3.3e6, 4, 256, 256, 512)}
WORK = Work(64, 8, 512, 1024, 4096)


def measured():
    """(workload line, mode, dtype, medians) of every GRPO step that the benchmark recorded, without
    those of compiled layers.
    """
    for line in map(json.loads, MEASURED.read_text().splitlines()):
        for name, found in line["median"].items():
            mode, _, dtype = name.removesuffix(" grpo").partition(" ")
            if name.endswith("grpo") and not line["compile"]:
                yield pytest.param(
                    line, mode, dtype, found, id=f"{line['workload']} {mode} {dtype}"
                )


@pytest.mark.parametrize("line, mode, dtype, found", list(measured()))
def test_predicts_measured_steps(line, mode, dtype, found):
    """Prompts count as often as they were run: rows share them.

    Peaks are those measured beside the step; the efficiencies are estimate.py's constants. Rollouts
    of the cluster come from vLLM, whose CPU kernels it does not know.
    """
    sequences = line["prompts"] * line["samples"]
    width = 4 if dtype == "float32" else 2
    work = Work(
        line["prompts"],
        line["samples"],
        found["tokens/padded"] / sequences - line["tokens"],
        line["tokens"],
        line["tokens"],
        line["micro_batch_tokens"],
        0,
        width,
    )
    device = cpu(line["limits"][dtype], 2 * line["limits"]["copy"], width)
    shape = SHAPES[line["workload"]]
    rollout = rollout_seconds(shape, device, work, 1, 1)
    learn = learn_seconds(shape, device, work, 1, 1, False)
    step = rollout + learn + device.fixed_seconds

    def near(predicted, seen):
        return seen / 1.6 <= predicted <= seen * 1.6

    assert near(learn, found["time/learn"]), (learn, found["time/learn"])
    if mode == "inline":
        assert near(rollout, found["time/rollout"]), (rollout, found["time/rollout"])
        assert near(step, found["time/step"]), (step, found["time/step"])


def test_lora_has_gradients_and_optimizer_states_of_its_adapters_alone():
    """7 B: 28 layers, 3584 hidden, 512 key-value, MLP of 18,944; rank 16."""
    model, work = MODELS["7b"], replace(WORK, lora=16)
    ways = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944)
    assert model.adapters(16) == pytest.approx(16 * 28 * ways, rel=0.002)
    saved = learner_bytes(model, WORK, 1, 0, False) - learner_bytes(model, work, 1, 0, False)
    assert saved == pytest.approx((4 + 12) * (model.parameters - model.adapters(16)))
    device = DEVICES["h100"]
    full = learn_seconds(model, device, WORK, 8, 2, False)
    assert learn_seconds(model, device, work, 8, 2, False) == pytest.approx(full * 4 / 6, rel=0.05)


def test_learner_memory_by_hand():
    m = Shape(1e9, 10, 1000, 200, 50_000)
    work = Work(1, 1, 10, 10, 10, micro_batch_tokens=1000)
    activations = 34 * 10 * 1000 * 1000 + 2 * 4 * 1024 * 50_000
    assert learner_bytes(m, work, 4, 1, False) == pytest.approx(
        1e9 * (2 + 4 + 12 / 4) + activations
    )
    assert learner_bytes(m, work, 4, 3, False) == pytest.approx(
        1e9 * (2 + 4 + 12) / 4 + activations
    )
    assert learner_bytes(m, work, 4, 3, True) == pytest.approx(
        1e9 * 18 / 4 + (2 * 10 + 34) * 1e6 + 2 * 4 * 1024 * 50_000
    )


def test_learning_time_is_the_flops_where_nothing_else_counts():
    m, d = Shape(1e9, 10, 1000, 200, 50_000), DEVICES["h100"]
    work = Work(1000, 1, 500, 500, 500)
    flops = 1e6 * 6 * (1e9 + 10 * 1000 * 1000)
    adam = 1e9 * 28 / (d.bandwidth * 0.7)
    assert learn_seconds(m, d, work, 1, 1, False) == pytest.approx(flops / (d.flops * 0.45) + adam)


@pytest.mark.parametrize("model", ["1.5b", "7b", "70b"])
def test_more_gpus_are_not_slower_and_every_split_fits(model):
    steps = []
    for gpus in (8, 64, 256):
        found = list(estimates(MODELS[model], DEVICES["h100"], WORK, gpus))
        assert all(
            max(p.engine_bytes, p.learner_bytes) <= 0.9 * 80e9
            and p.engines * p.tensor_parallel + p.ranks == gpus
            for p in found
        )
        steps += [min(p.step for p in found)] if found else []
    assert len(steps) >= 2 and steps == sorted(steps, reverse=True)


def test_staleness_hides_the_shorter_side():
    both = {
        s: fastest(MODELS["7b"], DEVICES["h100"], Work(64, 8, 512, 1024, 4096, staleness=s), 16)
        for s in (0, 1)
    }
    assert both[1].step < both[0].step
    assert both[0].step == pytest.approx(
        both[0].rollout + both[0].learn + both[0].sync + DEVICES["h100"].fixed_seconds
    )
    assert both[1].step == pytest.approx(
        max(both[1].rollout, both[1].learn) + both[1].sync + DEVICES["h100"].fixed_seconds
    )


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_output_names_the_bottleneck_and_scales_with_the_price():
    text = describe(arguments("--model", "7b", "--gpus", "16", "--dollars", "2"))
    assert "bottleneck   " in text and "per million trained tokens at $2" in text

    def cost(dollars):
        return float(
            describe(arguments("--gpus", "16", "--dollars", dollars))
            .split("cost         $")[1]
            .split()[0]
        )

    assert cost("200") == pytest.approx(100 * cost("2"), rel=0.05)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--model", "7B0"), "unknown model '7B0'"),
        (("--gpu", "h10"), "did you mean 'h100'"),
        (("--gpus", "0"), "at least 1"),
        (("--model", "70b", "--gpus", "8"), "cannot hold an engine and a learner of 70.6 B"),
        (("--response-tokens", "100", "--max-tokens", "50"), "no larger than the limit"),
    ],
)
def test_bad_input_is_explained(words, message):
    with pytest.raises(ConfigError, match=message):
        describe(arguments(*words))
