"""The +- of a held-out accuracy counts problems: by hand, and through a whole evaluation."""

import math
from concurrent.futures import Future

import numpy as np
import pytest

from tandem.engine.core.errors import EngineDied
from tandem.engine.core.outcomes import EvalResult
from tandem.engine.core.types import Prompt, RewardError, RewardOutcome, Sampling
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.loop.evaluation import evaluate, standard_error


@pytest.mark.parametrize(
    "values, expected",
    [
        ([[1], [0], [1], [0]], 0.5 / 2),  # std 1/2 over sqrt(4)
        ([[1] * 16, [0] * 16, [1] * 16, [0] * 16], 0.5 / 2),  # sixteen equal samples say no more
        ([[1, 0], [1, 0], [0, 1]], 0.0),  # every problem half right: they do not differ
        (
            [[1, 1], [1, 0], [0, 0]],
            math.sqrt(1 / 6) / math.sqrt(3),
        ),  # means 1, 1/2, 0: variance 1/6
        ([[1, 1, 1], [0]], math.sqrt(0.75**2 + 0.75**2) / 4),  # mean 3/4: residuals 3/4 and -3/4
        ([[1, 1], [], [0, 0]], 0.5 / math.sqrt(2)),  # a problem whose reward failed is none
        ([[2.0], [-1.0]], 1.5 / math.sqrt(2)),
    ],
)
def test_standard_error_by_hand(values, expected):
    assert standard_error(values) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [[]], [[1, 0, 1]], [[1], []]])
def test_one_problem_says_nothing_of_others(values):
    assert math.isnan(standard_error(values))


def test_it_agrees_with_the_bootstrap_over_problems():
    rng = np.random.default_rng(0)
    rate = rng.random(200)
    values = (rng.random((200, 8)) < rate[:, None]).astype(float)
    draws = [values[rng.integers(0, 200, 200)].mean() for _ in range(2000)]
    assert standard_error(values.tolist()) == pytest.approx(np.std(draws), rel=0.1)


class Answers:
    """Pool and rewards in one: problem p is right where its row of `table` says so; None: the
    reward failed."""

    def __init__(self, table, dies=0):
        self.table, self.dies = table, dies

    def submit(self, asked, *rest):
        future = Future()
        if rest:
            future.set_result([self.outcome(x) for x in self.table[int(asked.id)]])
        elif self.dies:
            self.dies -= 1
            future.set_exception(EngineDied("gone"))
        else:
            future.set_result([trajectory([1], [5, 6, 3])] * asked.samples)
        return future

    def outcome(self, x):
        if x is None:
            return RewardOutcome(None, error=RewardError("exception", "bad", "exact"))
        return RewardOutcome(2.0 * x, {"exact": x})


def run(table, dies=0, problems=None):
    """`problems`: the first token of each row's prompt, a problem of its own where not given."""
    tokens = problems or range(len(table))
    prompts = [Prompt(str(i), np.array([t]), "") for i, t in enumerate(tokens)]
    answers, recovered = Answers(table, dies), []

    def decode(tokens, finish):
        return str(tokens)

    result = evaluate(
        pool=answers,
        rewards=answers,
        prompts=prompts,
        sampling=Sampling(4),
        samples=len(table[0]),
        verifier="exact",
        decode=decode,
        restart_and_sync=lambda: recovered.append(1),
    )
    return result, len(recovered)


def test_an_evaluation_counts_its_problems():
    result, recovered = run([[1, 1], [0, 0], [1, None], [None, None]], dies=1)
    assert recovered == 1
    assert result.problems == 3 and result.samples == 5 and result.errors == 3
    assert result.accuracy == pytest.approx(3 / 5) and result.reward == pytest.approx(6 / 5)
    assert result.standard_error == pytest.approx(math.sqrt(0.8**2 + 1.2**2 + 0.4**2) / 5)
    assert result.describe() == "3 problems, 5 samples, 3 without a reward"


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_rows_with_the_same_prompt_are_one_problem(samples):
    """A benchmark of four problems, stored with each of them as many rows: as if sampled so."""
    right, wrong = [[1]] * samples, [[0]] * samples
    problems = [p for p in range(4) for _ in range(samples)]
    result, _ = run([*right, *wrong, *right, *wrong], problems=problems)
    assert result.problems == 4 and result.samples == 4 * samples
    assert result.standard_error == pytest.approx(0.25)


def test_an_evaluation_of_which_nothing_was_scored():
    result, _ = run([[None], [None]])
    assert math.isnan(result.accuracy) and math.isnan(result.standard_error)
    assert (result.problems, result.samples, result.errors) == (0, 0, 2)


def test_evaluations_of_older_runs_can_be_read():
    assert EvalResult(0.5, 0.5, 3.0, 8, 0, 0.1).problems == 0
