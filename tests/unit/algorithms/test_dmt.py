"""DMT, method 40 of the catalogue: how many rows an epoch of the second stage replays."""

from dataclasses import replace

import pytest
from method_cases import BUDGET

from tandem.algorithms.base import Demand
from tandem.algorithms.registry import make_method


def budget(special, general, batch):
    return replace(BUDGET, experts=batch, sources={"experts": special, "general": general})


@pytest.mark.parametrize(
    "special, general, batch, share, again",
    [
        (2560, 90, 10, 1 / 256, 10),  # 10 steps an epoch
        (30, 24, 5, 0.2, 6),
        (100, 1, 7, 0.06, 6),
        (30, 12, 4, 0.0, 0),
        (4, 4, 8, 1.0, 4),
    ],
)
def test_replayed_rows_per_epoch(special, general, batch, share, again):
    """In each of four epochs, which need not end with a step, and the rest is of `general`."""
    method = make_method("dmt", {"special_steps": 3, "share": share})
    given = budget(special, general, batch)
    rows = []
    for step in range(3, 3 + 4 * (general + again)):
        demand = method.demand(step, given, {})
        assert sum(demand.experts.values()) == batch
        rows.append(demand.by_source.get("experts", 0))
    epoch = general + again
    found = sum(rows[:epoch])  # `batch` whole epochs
    assert found == again * batch
    for number in range(4):
        first, last = method.replayed(number * epoch, given), (number + 1) * epoch
        assert method.replayed(last, given) - first == again
    assert max(rows) - min(rows) <= 1, "spread evenly"


def test_two_stages_with_moments_of_their_own():
    method, given = make_method("dmt", {"special_steps": 2}), budget(2560, 90, 10)
    assert method.demand(1, given, {}).by_source == {"experts": 10}
    assert method.demand(1, given, {}).optimizer == "special"
    assert method.demand(2, given, {}) == Demand(experts={"general": 9, "experts": 1})


def test_both_sources_are_named_from_the_first_step():
    """So that one that the config lacks is found before the run."""
    assert set(make_method("dmt", {}).demand(0, BUDGET, {}).experts) == {"experts", "general"}


@pytest.mark.parametrize(
    "options, words", [({"share": 1.5}, "0 to 1"), ({"general": "experts"}, "one source")]
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        make_method("dmt", options)
