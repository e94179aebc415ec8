"""inspect, as somebody uses it who has read docs/methods.md alone: what is wrong is said, and
nothing is left out of a loss without a word.
"""

import numpy as np
import pytest
import torch
from method_cases import EXPERTS, batch, constant, look, rollouts

from tandem.algorithms.base import Batch
from tandem.algorithms.registry import make_method
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect

RIGHT, WRONG = trajectory([1], [5, 6, 7], [-1, -1, -1]), trajectory([1], [8], [-1])
FLAT = constant(-0.5)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: trajectory([1], [5, 6, 7], [-1, -1]),
            "behaviour_logp has 2 entries, expected 3: one per token of the response",
        ),
        (lambda: trajectory([], [5]), "prompt is empty, expected at least one token"),
        (lambda: group([], []), "no trajectories, expected at least one"),
        (
            lambda: group([RIGHT, WRONG], [1.0]),
            r"rewards are \[1.0\], expected one finite number for each of the 2",
        ),
        (lambda: group([RIGHT, WRONG], [1.0, float("nan")]), "expected one finite number"),
        (
            lambda: group([RIGHT, trajectory([2], [5])], [1, 0]),
            r"trajectory 1 continues prompt \[2\], trajectory 0 prompt \[1\]",
        ),
        (
            lambda: group([RIGHT, trajectory([1], [5], expert=True)], [1, 0]),
            "trajectory 1 is a demonstration; give its response as demonstration=",
        ),
        (lambda: group([RIGHT], [0], demonstration=[]), "demonstration is empty"),
    ],
)
def test_hand_made_sequences_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "given, words",
    [
        (
            lambda row: np.full(len(row.tokens) - 1, -0.5),
            (
                r"logp of the row with tokens \[1, 5, 6, 7\] of prompt 'p' has shape \(3,\), "
                r"expected \(4,\).*prompt too"
            ),
        ),
        (lambda row: np.full(9, -0.5), r"shape \(9,\), expected \(4,\)"),
        (lambda row: -0.5, r"shape \(\), expected \(4,\)"),
        (lambda row: np.full((len(row.tokens), 2), -0.5), r"shape \(4, 2\), expected \(4,\)"),
        (lambda row: ["a"] * len(row.tokens), "cannot be read as float"),
        (lambda row: torch.full((len(row.tokens),), -0.5, requires_grad=True), "detach"),
        (
            lambda row: np.where(np.arange(len(row.tokens)) == 2, np.nan, -0.5),
            "logp of .* is NaN at token 2, which is trained",
        ),
        (np.full(4, -0.5), "logp is ndarray, expected a function from a row"),
    ],
)
def test_log_probs_that_do_not_fit_their_row(given, words):
    with pytest.raises(ValueError, match=words):
        inspect(make_method("grpo", {}), batch(experts=()), given)


@pytest.mark.parametrize(
    "name, stream",
    [
        ("grpo", "old"),
        ("uft", "reference"),
        ("srft", "entropy"),
        ("ppo", "value"),
        ("ppo", "old_value"),
    ],
)
def test_a_stream_of_the_wrong_length_is_called_by_its_argument(name, stream):
    with pytest.raises(
        ValueError, match=rf"{stream} of the row .* has shape \(2,\), expected \(4,\)"
    ):
        look(make_method(name, {}), batch(experts=()), **{stream: lambda row: np.zeros(2)})


@pytest.mark.parametrize(
    "name, words",
    [
        ("uft", "term 'kl' needs 'ref_logp', which inspect was not given: pass reference="),
        ("srft", "needs 'entropy', which inspect was not given: pass entropy="),
    ],
)
def test_a_stream_that_a_term_needs_is_asked_for(name, words):
    with pytest.raises(ValueError, match=words):
        inspect(make_method(name, {}), batch(experts=()), FLAT)


@pytest.mark.parametrize(
    "made, more, words",
    [
        (
            Batch(0, rollouts(), ()),
            {},
            (
                r"Batch.groups must be a tuple of ScoredGroup, found ScoredGroup; a tuple of one "
                r"is written \(x,\)"
            ),
        ),
        (
            Batch(0, (), EXPERTS[0]),
            {},
            "Batch.experts must be a tuple of Trajectory, found Trajectory",
        ),
        (
            Batch(0, (rollouts(), rollouts()), ()),
            {},
            r"numbers \[0, 0\]; each needs one of its own",
        ),
        (Batch(0, (), (RIGHT,)), {}, r"Batch.experts\[0\] has no token of the expert.*expert=True"),
        (batch(), {"ranks": 0}, "ranks is 0"),
        (batch(), {"micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
    ],
)
def test_batches_of_which_something_would_be_lost(made, more, words):
    with pytest.raises(ValueError, match=words):
        inspect(make_method("chord_mu", {}), made, FLAT, **more)


def test_the_name_of_a_method_is_not_a_method():
    with pytest.raises(ValueError, match=r"method is 'grpo', expected a Method, e.g. make_method"):
        inspect("grpo", batch(), FLAT)


def test_a_demonstration_with_its_reward_joins_its_group():
    """Rewards 1, 0 and 1 for the demonstration: A = 1/3, -2/3, 1/3. Without a reward it takes no
    part.
    """

    def make(reward):
        return Batch(
            0,
            (group([RIGHT, WRONG], [1, 0], demonstration=[5, 3], demonstration_reward=reward),),
            (),
        )

    rows = look(make_method("luffy", {}), make(1.0)).rows
    assert [float(row.streams["advantage"][-1]) for row in rows] == pytest.approx(
        [1 / 3, -2 / 3, 1 / 3]
    ) and len(look(make_method("luffy", {}), make(None)).rows) == 2


def test_a_group_of_one_and_an_empty_batch_are_fine():
    alone = inspect(make_method("grpo", {}), Batch(0, (group([RIGHT], [1.0]),), ()), FLAT)
    assert alone.loss == 0.0 and not alone.gradients[0].any()
    assert inspect(make_method("chord_mu", {}), Batch(0, (), ()), FLAT).loss == 0.0
