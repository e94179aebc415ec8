"""Rewards of a method's own: ERank, row 32 of the catalogue, and what `score` may return."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from method_cases import ramp
from producer_cases import Plain, Pool, make
from wrong_cases import Right

from tandem.algorithms.base import Batch
from tandem.algorithms.checks.rows import ask_score
from tandem.algorithms.registry import make_method
from tandem.algorithms.rl.erank import written
from tandem.engine.core.errors import ConfigError, MethodError
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect
from tandem.launch.check_config import load
from tandem.launch.run import run


def document(number, texts, positive=False, score=5, query="q"):
    g = group([trajectory([1], [5, 6 + i]) for i in range(len(texts))], [0.0] * len(texts))
    columns = {"query": query, "positive": positive, "score": score}
    return replace(g, group=number, prompt=replace(g.prompt, columns=columns), texts=tuple(texts))


def rewards(*documents):
    batch = ask_score(make_method("erank", {}), Batch(0, documents, ()))
    return [g.rewards.tolist() for g in batch.groups]


def test_the_best_order_gives_the_positive_1():
    """Row 32, first test: two documents, two samples each, the positive ahead of all others."""
    found = rewards(document(0, ["9", "10"], positive=True), document(1, ["5", "3"]))
    assert found[0] == [0.5, 1.0], "one sample of its own scores more than 9"
    assert found[1] == pytest.approx([1.0, 1 - 0.04])


def test_a_negative_above_a_positive_is_penalised():
    """Row 32, second test: moving it there flips its reward; a tie is not above."""
    found = rewards(document(0, ["6"], positive=True), document(1, ["7", "6"], score=6))
    assert found == [[0.5], [-1.0, 1.0]]
    above_one_of_two = rewards(document(0, ["9", "2"], positive=True), document(1, ["3"], score=3))
    assert above_one_of_two[1] == [-1.0]


def test_ties_have_the_smallest_rank():
    found = rewards(document(0, ["8", "8"], positive=True), document(1, ["8"], score=8))
    assert found == [[1.0, 1.0], [1.0]]


def test_malformed_text_is_penalised():
    """Row 32, third test."""
    found = rewards(document(0, ["none", "10"], positive=True), document(1, ["11", "8.5"]))
    assert found == [[-1.0, 1.0], [-1.0, -1.0]]
    assert rewards(document(0, ["9" * 5000, "-"], positive=True)) == [[-1.0, -1.0]]


def test_queries_do_not_see_each_other():
    alone = rewards(document(0, ["4"], positive=True))
    both = rewards(document(0, ["4"], positive=True), document(1, ["9"], score=9, query="other"))
    assert alone == [[1.0]] and both == [[1.0], [1.0]]


@pytest.mark.parametrize(
    "text, number",
    [("<think>3 of 4</think> 7", 7), ("score: 10.", 10), ("007", 7), ("7, not 8.5", 7)],
)
def test_the_last_number_is_the_score(text, number):
    assert written(text) == number


def test_a_missing_column_is_named():
    bare = group([trajectory([1], [5])], [0.0])
    with pytest.raises(ConfigError, match="prompt 'p' has no column 'query'; its columns: none"):
        ask_score(make_method("erank", {}), Batch(0, (bare,), ()))


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"positive": "false"}, "column 'positive' is 'false', expected true or false"),
        ({"score": "5"}, "column 'score' is '5', expected a number from 0 to 10"),
        ({"score": 10**400}, "column 'score' is 1000.*expected a number from 0 to 10"),
    ],
)
def test_columns_that_cannot_be(columns, words):
    with pytest.raises(ConfigError, match=words):
        rewards(document(0, ["5"], **columns))


def test_rows_are_made_with_the_methods_own_rewards():
    """Advantages within one document: (R - mean) / std of 1/2 and 1."""
    out = inspect(
        make_method("erank", {}), Batch(0, (document(0, ["9", "10"], positive=True),), ()), ramp
    )
    ends = [row.streams["advantage"][-1] for row in out.rows]
    assert ends == pytest.approx([-np.sqrt(0.5), np.sqrt(0.5)], rel=1e-3)


@dataclass
class Scores(Right):
    """Whose `score` is the one under test."""

    returns: object = None

    def score(self, batch):
        return self.returns(batch)


def of_group(**changes):
    return lambda batch: replace(batch, groups=(replace(batch.groups[0], **changes),))


@pytest.mark.parametrize(
    "returns, words",
    [
        (lambda batch: None, r"score\(\) returned None, expected a Batch: does it end without"),
        (lambda batch: batch.groups, r"score\(\) returned a tuple, expected a Batch"),
        (lambda batch: replace(batch, groups=()), r"returned 0 groups for 1"),
        (of_group(rewards=[1.0, 2.0]), "group 0: rewards is a list, expected a numpy array"),
        (of_group(rewards=np.array([1.0, np.nan])), "rewards is nan at sample 1, expected finite"),
        (of_group(rewards=np.array(["a", "b"])), "rewards has dtype <U1, expected real numbers"),
        (
            lambda batch: replace(batch, groups=(document(0, ["1", "2"]),)),
            "group 0: its trajectories are others than before",
        ),
        (of_group(group=4), "group 0: its group changed; expected the same group"),
        (of_group(demonstration_reward="1"), "group 0: demonstration_reward is '1', expected"),
        (of_group(demonstration_reward=np.inf), "demonstration_reward is inf, expected a finite"),
        (of_group(texts=("1", "2")), "group 0: its texts changed"),
        (lambda batch: replace(batch, groups=(None,)), "group 0 became None, expected a Scored"),
        (lambda batch: replace(batch, step=7), "changed the batch's step; expected the same"),
        (lambda batch: replace(batch, experts=(3,)), "changed the batch's experts"),
        (lambda batch: replace(batch, off_policy=True), "changed the batch's off_policy"),
    ],
)
def test_scores_that_cannot_be(returns, words):
    batch = Batch(0, (document(0, ["9", "10"]),), ())
    with pytest.raises(MethodError, match=f"method Scores: .*{words}"):
        ask_score(Scores(returns=returns), batch)


class ScoresItself(Plain):
    def score(self, batch):
        groups = [replace(g, rewards=np.full(2, 7.0, np.float32)) for g in batch.groups]
        return replace(batch, groups=tuple(groups))


class Reported:
    """A reporter and a display."""

    def __init__(self):
        self.rewards = []

    def step(self, step, groups, metrics, of_method, clock):
        self.rewards.append(([g.rewards.tolist() for g in groups], metrics["reward/mean"]))


def test_a_run_that_only_generates_has_the_methods_own_rewards(monkeypatch):
    reported = Reported()
    method = ScoresItself()
    producer = make(Pool(), method)

    @contextmanager
    def generation_run(config):
        yield SimpleNamespace(method=method, producer=producer, reporter=reported, display=None)

    monkeypatch.setattr(run, "generation_run", generation_run)
    assert run.generate(SimpleNamespace(run=SimpleNamespace(steps=2)), None) == 0
    assert reported.rewards == [([[7.0, 7.0]] * 3, 7.0)] * 2


def test_groups_are_not_redrawn_by_rewards_that_are_not_there_yet():
    with pytest.raises(ConfigError, match="dynamic_sampling is true, but method 'erank' has rewar"):
        load("tandem:inline_debug", ["method={name: erank, policy: dapo}"])
    load("tandem:inline_debug", ["method={name: erank, policy: {clip_high: 0.28}}"])
