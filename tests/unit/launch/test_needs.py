"""A run asks for what it needs only: no engines without rollouts, no rewards nobody uses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Finish, GenRequest, Prompt, Sampling
from tandem.engine.loop.scoring import Scorer
from tandem.engine.loop.tickets import GroupSlot
from tandem.launch import machine, reservation
from tandem.launch.check_config import load
from tandem.launch.run.run import train

DATA = {
    "experts": {"path": "task:sort", "options": {"size": 8}},
    "prompts": {"path": "task:sort"},
    "experts_per_step": 4,
}
EVALUATION = {"path": "task:sort", "split": "test"}
REWARDLESS = """
from dataclasses import dataclass
from typing import ClassVar
from tandem.algorithms.rl.grpo import GRPO

@dataclass
class Own(GRPO):
    title: ClassVar[str] = "test"
    uses_rewards: ClassVar[bool] = False
"""


def config(in_tmp, method, *overrides, functions=(), **data):
    tree = {
        "mode": "cluster",
        "model": {"path": "tandem:tiny"},
        "method": {"name": method},
        "data": {**DATA, **data},
        "reward": {"functions": list(functions)},
    }
    (in_tmp / "c.yaml").write_text(yaml.safe_dump(tree))
    return load(in_tmp / "c.yaml", overrides)


@pytest.mark.parametrize(
    "method, data, engines",
    [
        ("sft", {}, 0),
        ("psft", {}, 0),
        ("sft", {"evaluation": EVALUATION}, 1),
        ("grpo", {}, 1),
    ],
)
def test_places_are_asked_for_what_runs(in_tmp, method, data, engines):
    found = config(in_tmp, method, functions=["exact"], **data)
    asked = reservation.reservation(found)
    assert asked.engines == engines and len(asked.bundles) == engines + asked.ranks
    assert machine.engine_count(found) == engines


def test_a_learner_on_gpus_needs_no_transport_without_engines(in_tmp):
    one_side = ("cluster.learner_gpus=1",)
    assert config(in_tmp, "sft", *one_side).cluster.learner_gpus == 1
    with pytest.raises(ConfigError, match="GPUs on one side only"):
        config(in_tmp, "sft", *one_side, functions=["exact"], evaluation=EVALUATION)
    with pytest.raises(ConfigError, match="GPUs on one side only"):
        config(in_tmp, "grpo", *one_side, functions=["exact"])


def test_rewards_are_asked_for_where_they_are_used(in_tmp):
    (in_tmp / "own.py").write_text(REWARDLESS)
    assert config(in_tmp, "own.py:Own").reward.functions == ()
    with pytest.raises(ConfigError, match=r"'grpo' trains on rewards, but reward\.functions"):
        config(in_tmp, "grpo")
    with pytest.raises(ConfigError, match=r"data\.evaluation is set, but reward\.functions"):
        config(in_tmp, "sft", evaluation=EVALUATION)


def test_without_functions_every_rollout_has_reward_0():
    from tandem.engine.learner.by_hand import trajectory

    scorer = Scorer(None, lambda ids, finish: "", "drop")
    prompt = Prompt("p", np.array([1], np.int32), {})
    slot = GroupSlot(GenRequest(0, prompt, 2, Sampling(4)))
    sampled = trajectory([1], [5, 6])
    slot.generation.set_result((sampled, sampled, replace(sampled, finish=Finish.ABORT)))
    group = scorer.finish(slot)
    assert group is not None and group.rewards.tolist() == [0.0, 0.0]


OWN_ADVANTAGE = """
from dataclasses import dataclass
from typing import ClassVar
from tandem.algorithms.base import Method, Term
from tandem.algorithms.parts.objectives.policy import Reinforce
from tandem.algorithms.rows import policy_row

@dataclass
class Shorter(Method):
    title: ClassVar[str] = "every rollout has an advantage by its length"
    uses_rewards: ClassVar[bool] = False

    def rows(self, batch):
        assert all(not group.rewards.any() for group in batch.groups)
        rollouts = [t for group in batch.groups for t in group.trajectories]
        return [policy_row(t, -len(t.response), "policy") for t in rollouts]

    def terms(self, batch):
        return [Term("policy", Reinforce())]
"""


@pytest.mark.whole_run
def test_a_method_without_rewards_trains(in_tmp):
    (in_tmp / "own.py").write_text(OWN_ADVANTAGE)
    small = [
        "mode=inline",
        "run.steps=1",
        "run.save_model=false",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "rollout.max_tokens=4",
        "data.max_prompt_tokens=64",
    ]
    assert train(config(in_tmp, "own.py:Shorter", *small)) == 0
    lines = (in_tmp / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    (step,) = [json.loads(line) for line in lines]
    assert step["grad_norm"] > 0 and step["rollout/samples"] == 4 and "reward/mean" not in step
