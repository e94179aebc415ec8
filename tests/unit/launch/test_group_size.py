"""One sample per prompt: an error before the run where every advantage would be 0, only there."""

import pytest
import yaml

from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load
from tandem.launch.cli import main
from tandem.launch.run.group_check import check_group_size

TASK = {"path": "task:sort", "options": {"digits": 3}}
BASE = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": TASK,
        "experts": TASK,
        "experts_per_step": 2,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 16,
    },
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 1, "max_tokens": 6},
    "reward": {"functions": ["exact"]},
    "run": {"steps": 1, "save_model": False},
}


def config(folder, method, *overrides):
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**BASE, "method": method}))
    return load(path, [f"run.dir={folder}", *overrides])


def policy(name, advantage, **more):
    options = {"advantage": advantage, **more}
    if advantage == "dr_grpo":
        options["reduction_length"] = 8
        options["reduction"] = "sum_over_constant"
    return {"name": name, "policy": options}


@pytest.mark.parametrize(
    "method",
    [
        *(
            {"name": name}
            for name in (
                "grpo",
                "chord_mu",
                "chord_phi",
                "static_mix",
                "sft_rl",
                "alternating",
                "rl_with_sft",
                "sasr",
                "prefix_rft",
            )
        ),
        *(policy("grpo", advantage) for advantage in ("dr_grpo", "rloo", "reinforce_pp_baseline")),
        {"name": "hpt", "gate": -1.0},  # never a demonstration
        {"name": "grpo", "policy": "dapo"},
        {"name": "grpo", "policy": "gspo"},
        {"name": "grpo", "policy": "cispo"},
    ],
    ids=str,
)
def test_refused(tmp_path, method):
    with pytest.raises(
        ConfigError,
        match=r"samples_per_prompt is 1, but method.policy.advantage is .* each has advantage 0",
    ):
        check_group_size(config(tmp_path, method))
    assert check_group_size(config(tmp_path, method, "rollout.samples_per_prompt=2")) is None


@pytest.mark.parametrize(
    "method",
    [
        *(
            {"name": name}
            for name in ("ppo", "reft", "carft", "sft", "ift", "luffy", "visurf", "srft")
        ),
        policy("grpo", "raw"),
        policy("grpo", "reinforce_pp"),
        {"name": "chord_mu", "policy": "ppo"},
        {"name": "hpt", "policy": "reinforce_pp"},
    ],
    ids=str,
)
def test_one_sample_is_enough(tmp_path, method):
    """A critic, a comparison over the batch, the reward itself, no policy term, or the
    demonstration in the group."""
    assert check_group_size(config(tmp_path, method)) is None


@pytest.mark.parametrize("name", ["uft", "hpt", "relift"])
def test_a_warning_where_rollouts_train_something_else(tmp_path, name):
    """UFT's hints, and the demonstrations of the prompts that a rollout did not solve."""
    method = {"name": name}
    assert "advantage 0" in check_group_size(config(tmp_path, method))
    assert check_group_size(config(tmp_path, method, "rollout.samples_per_prompt=2")) is None


@pytest.mark.parametrize(
    "overrides", [["run.rollout_only=true"], ["rollout.backend=replay", "rollout.record=x.jsonl"]]
)
def test_runs_that_train_nothing_or_know_their_samples(tmp_path, overrides):
    assert check_group_size(config(tmp_path, {"name": "grpo"}, *overrides)) is None


def test_a_batch_of_one_and_a_filter_that_nothing_passes(tmp_path):
    with pytest.raises(ConfigError, match="both 1"):
        check_group_size(
            config(tmp_path, policy("grpo", "reinforce_pp"), "rollout.prompts_per_step=1")
        )
    with pytest.raises(ConfigError, match="dynamic_sampling"):
        check_group_size(config(tmp_path, policy("grpo", "raw", dynamic_sampling=True)))


def test_a_method_that_asks_for_its_own_number_of_samples(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass, replace\nfrom tandem.algorithms.rl.grpo import "
        "GRPO\n\n\n"
        "@dataclass\nclass Mine(GRPO):\n"
        "    def request(self, group, prompt, sampling, step, budget):\n"
        "        more = replace(budget, samples=4)\n"
        "        return super().request(group, prompt, sampling, step, more)\n"
    )
    assert check_group_size(config(tmp_path, {"name": f"{tmp_path}/mine.py:Mine"})) is None


@pytest.mark.parametrize("words", [["train"], ["train", "--dry-run"]])
def test_told_on_one_screen_before_anything_starts(tmp_path, capsys, words):
    config(tmp_path, {"name": "grpo"})
    assert main([*words, str(tmp_path / "c.yaml"), f"run.dir={tmp_path}/runs"]) == 2
    assert (
        "alone, each has advantage 0" in capsys.readouterr().err
        and not (tmp_path / "runs").exists()
    )


@pytest.mark.whole_run
def test_other_commands_do_not_mind(tmp_path, capsys):
    """An evaluation trains nothing; doctor tells."""
    config(tmp_path, {"name": "grpo"})
    held_out = [
        "data.evaluation.path=task:sort",
        "data.evaluation.split=test",
        "data.evaluation.options={digits: 3, size: 4}",
    ]
    assert main(["eval", str(tmp_path / "c.yaml"), f"run.dir={tmp_path}/runs", *held_out]) == 0
    main(["doctor", str(tmp_path / "c.yaml")])
    assert "alone, each has advantage 0" in capsys.readouterr().out
