"""Merged tensors have the values of the papers' formulas, worked out by hand."""

import math

import pytest
import torch

from tandem.engine.core.errors import ConfigError
from tandem.engine.model.merge import Dare, Linear, Restore, Slerp, TaskVector, Ties, largest

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
A = torch.tensor([2.0, 1.5, 1.0, -3.0, 1.25])  # differences 1, .5, 0, -4, .25
B = torch.tensor([4.0, 0.5, 3.0, -1.0, 1.0])  # differences 3, -.5, 2, -2, 0


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype))


def test_average_and_linear():
    close(Linear().tensor("w", None, [A, B]), [3.0, 1.0, 2.0, -2.0, 1.125])
    weighted = Linear((3.0, 1.0)).tensor("w", None, [A, B])
    close(weighted, [2.5, 1.25, 1.5, -2.5, 1.1875])
    close(Linear((2.0, -1.0)).tensor("w", None, [A, B]), [0.0, 2.5, -1.0, -5.0, 1.5])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_models_stay_as_they_are(count):
    one = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Linear().tensor("w", None, [one] * count), one)
    assert torch.equal(Linear((0.3,) * count).tensor("w", None, [one] * count), one)
    assert torch.equal(Slerp(0.3).tensor("w", None, [one, one]), one)


def test_task_vectors():
    close(TaskVector().tensor("w", BASE, [A, B]), [5.0, 1.0, 3.0, -5.0, 1.25])
    close(TaskVector((1.0,), -1.0).tensor("w", BASE, [A]), [0.0, 0.5, 1.0, 5.0, 0.75])  # forget
    scaled = TaskVector((2.0, 1.0), 0.5).tensor("w", BASE, [A, B])
    close(scaled, [3.5, 1.25, 2.0, -4.0, 1.25])
    assert torch.equal(TaskVector().tensor("w", BASE, [BASE, BASE]), BASE)


def test_ties_trims_elects_and_averages_what_agrees():
    # of 5 entries 0.6 keeps 3: A 1, .5, -4; B 3, 2, -2
    found = Ties(density=0.6).tensor("w", BASE, [A, B])
    close(found, [3.0, 1.5, 3.0, -2.0, 1.0])  # (1+3)/2, .5 alone, 2 alone, (-4-2)/2, nothing left
    # nothing trimmed: entry 1 has .5 and -.5, whose sum has no sign
    close(Ties(density=1.0).tensor("w", BASE, [A, B]), [3.0, 1.0, 3.0, -2.0, 1.25])
    # the heavier sign wins: .5 * 3 against -.5
    heavy = Ties((3.0, 1.0), 2.0, 1.0).tensor("w", BASE, [A, B])
    close(heavy, [1 + 2 * 6 / 4, 1 + 2 * 0.5, 1 + 2 * 2, 1 + 2 * -14 / 4, 1 + 2 * 0.25])
    close(Ties(density=0.0).tensor("w", BASE, [A, B]), BASE)


def test_ties_elects_by_mass_not_by_number():
    zero = torch.zeros(1)
    three = [torch.tensor([x]) for x in (1.0, 1.0, -3.0)]
    close(Ties(density=1.0).tensor("w", zero, three), [-3.0])


def test_dare_drops_rescales_and_keeps_the_mean():
    base, model = torch.zeros(100_000), torch.ones(100_000)
    found = Dare(drop=0.9, seed=1).tensor("w", base, [model])
    assert found.unique().tolist() == pytest.approx([0.0, 10.0])
    assert found.mean() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(found, Dare(drop=0.9, seed=1).tensor("w", base, [model]))
    assert not torch.equal(found, Dare(drop=0.9, seed=2).tensor("w", base, [model]))
    assert not torch.equal(found, Dare(drop=0.9, seed=1).tensor("v", base, [model]))
    both = Dare((1.0, 100.0), drop=0.5).tensor("w", base, [model, model])
    assert set(both.unique().tolist()) == {0.0, 2.0, 200.0, 202.0}, "each model has its own mask"
    close(Dare(drop=0.0).tensor("w", BASE, [A, B]), TaskVector().tensor("w", BASE, [A, B]))
    halved = Dare((2.0,), 0.25, drop=0.5).tensor("w", base, [model])
    assert set(halved.unique().tolist()) == {0.0, 1.0}


def test_slerp_goes_along_the_arc():
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    root = math.sqrt(0.5)
    close(Slerp(0.5).tensor("w", None, [east, north]), [[root, root]])
    close(Slerp(1 / 3).tensor("w", None, [east, north]), [[math.cos(math.pi / 6), 0.5]])
    # lengths change linearly at a right angle's ends only: coefficients sin(45)/sin(90) of each
    close(Slerp(0.5).tensor("w", None, [2 * east, 4 * north]), [[2 * root, 4 * root]])
    for t, parent in ((0.0, east), (1.0, north)):
        assert torch.allclose(Slerp(t).tensor("w", None, [east, north]), parent, atol=1e-7)


@pytest.mark.parametrize("other", [[1.0, 0.001], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
def test_slerp_is_straight_where_there_is_no_angle(other):
    one, other = torch.tensor([1.0, 0.0]), torch.tensor(other)
    close(Slerp(0.25).tensor("w", None, [one, other]), 0.75 * one + 0.25 * other)
    assert torch.equal(Slerp(0.0).tensor("w", None, [one, other]), one)
    assert torch.equal(Slerp(1.0).tensor("w", None, [one, other]), other)


def test_restore_puts_back_what_changed_most():
    close(Restore(0.2).tensor("w", BASE, [A]), [2.0, 1.5, 1.0, 1.0, 1.25])
    close(Restore(0.4).tensor("w", BASE, [A]), [1.0, 1.5, 1.0, 1.0, 1.25])
    assert torch.equal(Restore(0.0).tensor("w", BASE, [A]), A)
    assert torch.equal(Restore(1.0).tensor("w", BASE, [A]), BASE)


def test_the_share_is_exact_among_equal_entries():
    """As in bfloat16, whose differences are coarse."""
    delta = torch.tensor([[1.0, -1.0, 1.0], [0.0, 2.0, -1.0]])
    assert largest(delta, 0.5).tolist() == [[True, True, False], [False, True, False]]
    assert largest(torch.zeros(10), 0.3).sum() == 3 and largest(torch.zeros(0), 0.5).shape == (0,)
    assert not largest(delta, 0.0).any() and largest(delta, 1.0).all()


@pytest.mark.parametrize(
    "merge, models, base, words",
    [
        (TaskVector(), 2, False, "task works on differences to a base: give it with --base"),
        (Ties(), 2, False, "ties works on differences"),
        (Dare(), 2, False, "dare works on differences"),
        (Restore(0.5), 1, False, "restore works on differences"),
        (Linear((1.0,)), 2, False, "2 models and 1 weights"),
        (Linear((1.0, -1.0)), 2, False, "sum to 0"),
        (Ties((1.0, -1.0)), 2, True, "ties needs positive"),
        (Ties(density=20), 2, True, "density is 20, expected a number from 0 to 1"),
        (Dare(drop=1.0), 2, True, "drop is 1.0, expected 0 or more and less than 1"),
        (Slerp(), 3, False, "slerp takes two models, found 3"),
        (Slerp(1.5), 2, False, "t is 1.5"),
        (Restore(0.5), 2, True, "restore takes one model, found 2"),
        (Restore(-0.1), 1, True, "share is -0.1"),
    ],
)
def test_settings_that_cannot_be(merge, models, base, words):
    with pytest.raises(ConfigError, match=words):
        merge.check(models, base)
