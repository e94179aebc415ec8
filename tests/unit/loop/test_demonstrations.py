"""Demonstrations by name: which sources a step draws from, and what is told of a wrong demand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from method_cases import EXPERTS

from tandem.algorithms.base import Demand, Method
from tandem.algorithms.checks.method import check_demand
from tandem.engine.core.errors import MethodError
from tandem.engine.loop.demonstrations import draw_demonstrations, never_asked
from tandem.engine.loop.group_numbers import PAIRS, PROBE


class Takes(Method):
    uses_experts = True

    def rows(self, batch):
        return []


class Fake:
    """A source of demonstrations, or of pairs."""

    def __init__(self, pairs=False):
        self.pairs, self.drawn = pairs, 0

    def take(self, n):
        found = []
        for number in range(self.drawn, self.drawn + n):
            if self.pairs:
                found += [replace(EXPERTS[0], group=number), replace(EXPERTS[1], group=number)]
            else:
                found.append(EXPERTS[0])
        self.drawn += n
        return found


@pytest.fixture
def sources():
    return {"experts": Fake(), "old": Fake(), "pairs": Fake(True), "more": Fake(True)}


def drawn(sources) -> dict[str, int]:
    return {name: source.drawn for name, source in sources.items() if source.drawn}


def test_a_number_asks_data_experts(sources):
    found = draw_demonstrations(Takes(), Demand(experts=3), sources)
    assert [t.dataset for t in found] == ["experts"] * 3 and drawn(sources) == {"experts": 3}
    assert draw_demonstrations(Takes(), Demand(prompts=3), sources) == ()


def test_names_ask_several_in_their_order(sources):
    demand = Demand(experts={"old": 2, "experts": 1, "pairs": 0})
    found = draw_demonstrations(Takes(), demand, sources)
    assert [t.dataset for t in found] == ["old", "old", "experts"]
    assert [t.group for t in found] == [-1] * 3
    assert drawn(sources) == {"old": 2, "experts": 1}


def test_pairs_have_numbers_of_their_own(sources):
    """Above every number of rollouts, evaluations and probes, and in every source others."""
    demand = Demand(experts={"pairs": 2, "more": 1})
    found = [t for _ in range(2) for t in draw_demonstrations(Takes(), demand, sources)]
    groups = [t.group for t in found]
    assert groups[0::2] == groups[1::2] and len(set(groups)) == 6
    assert min(groups) >= PAIRS > 2 * PROBE - 1 and max(groups) < 1 << 62


def test_prompts_with_demonstrations_are_not_drawn_again(sources):
    method = Takes()
    method.prompts_from_experts = True
    demand = Demand(prompts=4, experts={"experts": 2, "old": 1})
    found = draw_demonstrations(method, demand, sources)
    assert [t.dataset for t in found] == ["old"]


def test_a_run_ends_before_a_step_that_asks_for_nothing():
    assert Demand(experts={"a": 0}, stop="enough").ends_before
    assert not Demand(experts={"a": 1}, stop="enough").ends_before


@pytest.mark.parametrize(
    "experts, words",
    [
        ({"odl": 1}, ["'odl'", "did you mean 'old'", "data.sources.odl is not set"]),
        ({"new": 0, "old": 1}, ["'new'", "the config has old, math"]),  # found before it is due
        (2, ["'experts'", "data.experts is not set"]),
        ({"old": -1}, ["experts['old']=-1"]),
        ({"old": 0.5}, ["experts['old']=0.5"]),
        ({"old": True}, ["experts['old']=True"]),
        ({3: 1}, ["3"]),
        ([("old", 1)], ["experts=[("]),
    ],
)
def test_a_demand_that_cannot_be_met_is_told(experts, words):
    with pytest.raises(MethodError, match=r"method Takes: demand\(\)") as error:
        check_demand(Takes(), Demand(experts=experts), ("old", "math"))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_demonstrations_without_uses_experts():
    with pytest.raises(MethodError, match="asks for 3 demonstrations, but"):
        check_demand(Method(), Demand(experts={"old": 1, "math": 2}), ("old", "math"))


def test_sources_that_no_step_asked_for_are_told():
    def source(drawn):
        return SimpleNamespace(cursor=SimpleNamespace(drawn=drawn))

    sources = {"experts": source(0), "old": source(3), "math": source(0)}
    assert never_asked(Takes(), sources) == ["experts", "math"]
    method = Takes()
    method.prompts_from_experts = True
    assert never_asked(method, sources) == ["math"]
