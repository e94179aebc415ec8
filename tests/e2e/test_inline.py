"""Whole runs in one process: the same loop, producer, learner, sync and checkpoints that a cluster
run uses, with in-process leaves.
"""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tandem.launch.check_config import load
from tandem.launch.run.run import train

BASE = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "evaluation": {"path": "task:sort", "split": "test", "options": {"digits": 3, "size": 8}},
        "experts_per_step": 6,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_tokens": 6},
    "reward": {"functions": ["exact"]},
    "learner": {"learning_rate": 1e-3, "micro_batch_tokens": 128},
    "run": {"steps": 4, "save_model": False},
}


def config(folder: Path, method, *overrides: str):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**BASE, "method": method}))
    return load(path, [f"run.dir={folder}", *overrides])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step_{step}").rglob("*.safetensors"))
    assert files, f"no safetensors in the checkpoint of step {step} of {run}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


SHORT = f"reward.functions=[{Path(__file__).parent / 'short_reward.py'}:score]"
METHODS = [
    {"name": "chord_mu", "mu": {"kind": "cosine", "peak": 0.9, "valley": 0.1, "decay": 4}},
    {"name": "grpo"},
    {"name": "sft_rl", "sft_steps": 2},
    # reference set before the checkpoint, used after it
    {"name": "reft", "sft_steps": 1, "policy": {"critic": {"kl": 0.05, "bootstrap": True}}},
]


SLOW_TEACHER = {"name": "sdft", "teacher": "slow", "form": "sampled", "template": "{hint}"}


@pytest.mark.parametrize(
    "method, staleness",
    [
        (METHODS[0], 0),
        (METHODS[0], 1),
        (METHODS[2], 0),
        (METHODS[3], 0),
        pytest.param(SLOW_TEACHER, 1, marks=pytest.mark.nightly),
    ],
)
def test_four_steps_equal_two_resumed_for_two_more_to_the_bit(tmp_path, method, staleness):
    overrides = [f"rollout.staleness={staleness}", "run.checkpoint_every=2", SHORT]
    if method == SLOW_TEACHER:
        overrides += ["models.slow.kind=ema", "data.max_prompt_tokens=64"]
    assert train(config(tmp_path / "a", method, *overrides)) == 0
    whole = tmp_path / "a" / "run"

    config(tmp_path / "b", method, *overrides)
    script = (
        "import sys; sys.argv = ['x']\nfrom tandem.engine.loop.saver import Saver; from "
        "tandem.launch.run import run\nfrom tandem.launch.check_config import load\n"
        "keep = Saver.save\n"
        "def save_then_die(self, state):\n    keep(self, state)\n    import os\n    os._exit(9)\n"
        "Saver.save = save_then_die\n"
        f"run.train(load({str(tmp_path / 'b' / 'config.yaml')!r}, "
        f"{['run.dir=' + str(tmp_path / 'b'), *overrides]!r}))\n"
    )
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert train(config(tmp_path / "b", method, *overrides, "run.resume=true")) == 0
    parts = tmp_path / "b" / "run"

    a, b = weights(whole, 4), weights(parts, 4)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name

    def timeless(run):
        return [
            {
                k: v
                for k, v in line.items()
                if not any(w in k for w in ("seconds", "time/", "per_second", "idle"))
            }
            for line in lines(run / "metrics.jsonl")
        ]

    assert timeless(whole) == timeless(parts)
    assert lines(whole / "rollouts.jsonl") == lines(parts / "rollouts.jsonl")


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_training_raises_the_reward(tmp_path, name):
    """The reward asks for short responses; ten steps must find out."""
    train(
        config(
            tmp_path,
            {"name": name},
            "run.steps=12",
            SHORT,
            "learner.learning_rate=3e-3",
            "rollout.prompts_per_step=8",
        )
    )
    rewards = [
        line["reward/mean"]
        for line in lines(tmp_path / "run" / "metrics.jsonl")
        if "reward/mean" in line
    ]
    assert len(rewards) == 12 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


@pytest.mark.parametrize("name", ["sft", "chord_phi"])
def test_other_methods_run(tmp_path, name):
    assert train(config(tmp_path, {"name": name}, "run.steps=2")) == 0
    steps = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    assert len(steps) == 2 and all(line["grad_norm"] > 0 for line in steps)


def test_several_updates_per_batch_use_the_snapshots_log_probs(tmp_path):
    train(
        config(
            tmp_path,
            {"name": "grpo"},
            "run.steps=1",
            "learner.updates_per_batch=3",
            "learner.learning_rate=0.01",
            "reward.functions=[fake]",
        )
    )
    (step,) = [
        line for line in lines(tmp_path / "run" / "metrics.jsonl") if "policy/ppo_kl" in line
    ]
    assert step["policy/ppo_kl"] != 0, (
        "with one update the ratio is exactly 1; after the first of three it is not"
    )


def test_tokens_of_several_updates_add_up(tmp_path):
    steps = []
    for name, more in (
        ("one", ()),
        ("six", ("learner.updates_per_batch=3", "learner.epochs_per_batch=2")),
    ):
        train(
            config(
                tmp_path / name,
                {"name": "grpo"},
                "run.steps=1",
                "reward.functions=[fake]",
                "data.evaluation=null",
                *more,
            )
        )
        steps += [
            line
            for line in lines(tmp_path / name / "run" / "metrics.jsonl")
            if "tokens/real" in line
        ]
    one, six = steps
    assert (
        six["tokens/real"] == 2 * one["tokens/real"]
        and six["tokens/total"] - one["tokens/total"] == one["tokens/real"]
    )


def test_a_step_without_rollouts_is_one_update(tmp_path):
    """ReFT goes through each batch of rollouts twice, ReLIFT in two parts; both take one step on a
    batch of demonstrations.
    """
    found = []
    for name, more in (
        ("one", ()),
        ("six", ("learner.updates_per_batch=3", "learner.epochs_per_batch=2")),
    ):
        train(
            config(tmp_path / name, {"name": "sft"}, "run.steps=2", "data.evaluation=null", *more)
        )
        found.append(weights(tmp_path / name / "run", 2))
    assert found[0].keys() == found[1].keys() and all(
        torch.equal(tensor, found[1][key]) for key, tensor in found[0].items()
    )


def test_the_gate_passes_over_tokens_that_a_method_does_not_train(tmp_path):
    """DAPO's overlong filtering: responses that were cut are rows without weights, for which the
    learner computes no log-prob.
    """
    assert (
        train(
            config(
                tmp_path,
                {"name": "grpo", "policy": {"mask_truncated": True}},
                "run.steps=1",
                "reward.functions=[fake]",
                "data.evaluation=null",
            )
        )
        == 0
    )
    (step,) = [
        line for line in lines(tmp_path / "run" / "metrics.jsonl") if "rollout/truncated" in line
    ]
    assert 0 < step["rollout/truncated"] < 1
    assert [
        e["tokens"] for e in lines(tmp_path / "run" / "events.jsonl") if e["kind"] == "gate"
    ] == [step["tokens/trained"]]


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_a_resume(tmp_path, capsys):
    """Nothing is trained any more, the model is saved, and the accuracy `before` is that of the
    run's beginning.
    """
    overrides = [
        "run.steps=2",
        SHORT,
        "learner.learning_rate=1e-2",
        "eval.temperature=1",
        "eval.samples=4",
    ]
    assert train(config(tmp_path, {"name": "grpo"}, *overrides)) == 0
    assert not (tmp_path / "run" / "model").exists()
    before = weights(tmp_path / "run", 2)
    capsys.readouterr()
    assert (
        train(
            config(tmp_path, {"name": "grpo"}, *overrides, "run.resume=true", "run.save_model=true")
        )
        == 0
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run", 2).items()
    )
    first, last = [
        line["eval/accuracy"]
        for line in lines(tmp_path / "run" / "metrics.jsonl")
        if "eval/accuracy" in line
    ]
    assert first != last
    text = capsys.readouterr().out
    assert f"before {first:.3f}" in text and f"after {last:.3f}" in text, text


def test_ppo_goes_through_a_batch_in_epochs_of_minibatches(tmp_path):
    train(
        config(
            tmp_path,
            {"name": "ppo", "policy": {"critic": {"kl": 0.1}}},
            "run.steps=2",
            "learner.updates_per_batch=3",
            "learner.epochs_per_batch=2",
            "reward.functions=[fake]",
            "learner.learning_rate=0.01",
            "run.save_model=true",
        )
    )
    first, second = (
        line for line in lines(tmp_path / "run" / "metrics.jsonl") if "critic/kl" in line
    )
    assert first["critic/kl"] == pytest.approx(0, abs=1e-5) and second[
        "critic/kl"
    ] != pytest.approx(0, abs=1e-5), "the reference is the model the run began with"
    assert (
        first["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
        and first["value/value"] != 0
    ), "a new critic knows nothing, and learns in its first batch"
    state = torch.load(
        tmp_path / "run" / "checkpoints" / "step_2" / "learner" / "rank_0.pt", weights_only=True
    )
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {2 * 3 * 2}
    assert not any(
        "critic" in name for name in load_file(tmp_path / "run" / "model" / "model.safetensors")
    )


def test_rollouts_recorded_in_one_run_train_another(tmp_path):
    train(
        config(
            tmp_path / "a",
            {"name": "grpo"},
            "run.steps=2",
            "reward.functions=[fake]",
            "run.rollout_only=true",
        )
    )
    recorded = tmp_path / "a" / "run" / "rollouts.jsonl"
    assert len(lines(recorded)) == 2 * 3 * 4
    train(
        config(
            tmp_path / "b",
            {"name": "grpo"},
            "run.steps=2",
            "reward.functions=[fake]",
            "rollout.backend=replay",
            f"rollout.record={recorded}",
            "data.evaluation=null",
            "data.prompts=null",
        )
    )
    replayed = lines(tmp_path / "b" / "run" / "rollouts.jsonl")
    assert [line["tokens"] for line in replayed] == [line["tokens"] for line in lines(recorded)]


def test_every_set_of_moments_has_its_own_warm_up(tmp_path):
    train(
        config(
            tmp_path,
            {"name": "sft_rl", "sft_steps": 3, "sft_learning_rate": 4e-3},
            "run.steps=6",
            "learner.warmup_steps=2",
        )
    )
    rates = [
        line["learning_rate"]
        for line in lines(tmp_path / "run" / "metrics.jsonl")
        if "learning_rate" in line
    ]
    assert rates == pytest.approx([2e-3, 4e-3, 4e-3, 5e-4, 1e-3, 1e-3])


def test_a_step_without_rollouts_leaves_what_goes_by_the_reward_where_it_was(tmp_path):
    """SFT and RL take turns, mu = 0.9 - reward: the peak until a reward is known, then the last
    known one's, also right after an SFT step and a resume there.
    """
    method = tmp_path / "mine.py"
    method.write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.staged.alternating import "
        "Alternating\nfrom tandem.algorithms.parts.schedules import Schedule\n"
        "@dataclass\nclass Mine(Alternating):\n    mu = Schedule('reward_gap', peak=0.9)\n"
        "    def rows(self, batch):\n        self.now = self.mu(batch.step, batch.signals)\n "
        "       return super().rows(batch)\n"
        "    def metrics(self, step):\n        return {'mu': self.now}\n"
    )

    def run(*more):
        return train(
            config(
                tmp_path,
                {"name": f"{method}:Mine", "every": 2},
                SHORT,
                "data.evaluation=null",
                *more,
            )
        )

    assert run("run.steps=3") == run("run.steps=6", "run.resume=true") == 0
    steps = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "mu" in line]
    assert ["reward/mean" in line for line in steps] == [False, True] * 3
    first, second = 0.9 - steps[1]["reward/mean"], 0.9 - steps[3]["reward/mean"]
    assert len({0.9, first, second}) == 3 and [line["mu"] for line in steps] == pytest.approx(
        [0.9, 0.9, first, first, second, second]
    )


def test_a_breakpoint_in_a_method_gets_the_terminal(tmp_path):
    method = tmp_path / "mine.py"
    method.write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.rl.grpo import "
        "GRPO\n@dataclass\nclass Mine(GRPO):\n"
        "    def rows(self, batch):\n        breakpoint()\n        return super().rows(batch)\n"
    )
    config(tmp_path, {"name": f"{method}:Mine"})
    script = (
        "from tandem.launch.run.run import train; from tandem.launch.check_config import load; "
        f"train(load({str(tmp_path / 'config.yaml')!r}, ['run.dir={tmp_path}', 'run.steps=1']))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        input="p 'batch of', len(batch.groups)\nc\n",
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert out.returncode == 0 and "('batch of', 3)" in out.stdout, out.stdout + out.stderr
    assert "mine.py" in out.stdout


def test_inline_imports_no_heavy_stack(tmp_path):
    config(tmp_path, {"name": "grpo"})
    script = (
        "import sys; from tandem.launch.run.run import train; from "
        "tandem.launch.check_config import load; "
        f"train(load({str(tmp_path / 'config.yaml')!r}, ['run.dir={tmp_path}', "
        "'run.steps=1']))\n"
        "print('heavy:', sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'vllm', "
        "'deepspeed'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert "heavy: []" in out.stdout, out.stdout + out.stderr


def test_a_bad_row_never_reaches_training(tmp_path):
    """A gradient that is not finite leaves the weights alone, is counted, its rows are kept, and
    the run ends after max_skipped_steps.
    """
    method = tmp_path / "mine.py"
    method.write_text(
        "import numpy as np\nfrom dataclasses import dataclass, replace\nfrom "
        "tandem.algorithms.rl.grpo import GRPO\n@dataclass\nclass Mine(GRPO):\n"
        "    def rows(self, batch):\n        rows = super().rows(batch)\n        return "
        "[rows[0].with_streams(advantage=rows[0].weights['policy'] * np.float32(3e38)), "
        "*rows[1:]]\n"
    )
    from tandem.engine.core.errors import NotFinite

    with pytest.raises(NotFinite, match="2 steps in a row"):
        train(
            config(
                tmp_path,
                {"name": f"{method}:Mine"},
                "learner.max_skipped_steps=1",
                "reward.functions=[fake]",
            )
        )
    saved = pickle.loads((tmp_path / "run" / "bad_steps" / "step_0.pkl").read_bytes())
    assert len(saved["rows"]) == 12
