"""`tandem check-method`: every check finds a fault that was planted for it, and no other does."""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest

from tandem import (
    NLL,
    Method,
    PPOClip,
    Term,
    advantages,
    expert_row,
    policy_row,
    trajectory,
)
from tandem.launch import cli
from tandem.launch.method_contract.checks import CHECKS, Subject, run_check

DRAWS = "draws depend on seed and step alone"
FINITE = "losses are finite on degenerate batches"
EMPTY = "an empty step trains nothing"
TRAINED = "only trained tokens have a gradient"
OWN = "every term has weights of its own"
ORDER = "order changes nothing"
PACKING = "micro-batches and ranks change nothing"
ANSWERS = "demand and again only answer"
RESUME = "state survives a resume"
OTHER = "the state of another method is refused"
STALE = ", staleness 2"
QUICK = (FINITE, EMPTY, TRAINED, OWN, ORDER, PACKING, OTHER)


@dataclass
class Good(Method):
    uses_experts: ClassVar[bool] = True

    weight: float = 0.5
    seen: list = field(default_factory=list)

    def rows(self, batch):
        rows = [expert_row(t, "sft") for t in batch.experts]
        found = advantages.grpo([group.rewards for group in batch.groups])
        for group, numbers in zip(batch.groups, found, strict=True):
            for t, advantage in zip(group.trajectories, numbers, strict=True):
                rows.append(policy_row(t, advantage, "policy"))
        return rows

    def terms(self, batch):
        return [Term("policy", PPOClip()), Term("sft", NLL(), coefficient=self.weight)]


@dataclass
class Unseeded(Good):
    def terms(self, batch):
        self.weight = float(np.random.default_rng().random())
        return super().terms(batch)


@dataclass
class DividesByDemonstrations(Good):
    def terms(self, batch):
        self.weight = 1 / len(batch.experts)
        return super().terms(batch)


@dataclass
class ReportsNothing(Good):
    def metrics(self, step):
        return {"mine": float("nan")}


@dataclass
class TrainsItsOwn(Good):
    def rows(self, batch):
        mask = np.array([0, 1], np.float32)
        return [*super().rows(batch), expert_row(EXAMPLE, "sft").with_term("sft", mask)]


@dataclass
class TrainsPrompts(Good):
    def rows(self, batch):
        rows = []
        for row in super().rows(batch):
            everywhere = np.ones(len(row.tokens), np.float32)
            everywhere[0] = 0
            rows.append(row.with_term(next(iter(row.weights)), everywhere))
        return rows


@dataclass
class SharesWeights(Good):
    def rows(self, batch):
        return [row.with_term("more", next(iter(row.weights.values()))) for row in rows_of(batch)]

    def terms(self, batch):
        return [*super().terms(batch), Term("more", NLL(), coefficient=0.1)]


@dataclass
class FirstIsSpecial(Good):
    def terms(self, batch):
        self.weight = 0.1 * len(batch.experts[0].tokens) if batch.experts else 0.0
        return super().terms(batch)


class Centred:
    def __call__(self, tokens):
        return -((tokens.logp - tokens.logp.mean()) ** 2), {}


@dataclass
class OfItsMicroBatch(Good):
    def terms(self, batch):
        return [Term("policy", PPOClip()), Term("sft", Centred())]


@dataclass
class Remembers(Good):
    """Base of those that keep something: `seen` survives a resume."""

    def terms(self, batch):
        self.weight = 0.5 + 0.01 * len(self.seen)
        return super().terms(batch)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


@dataclass
class DemandCounts(Remembers):
    def demand(self, step, budget, signals):
        self.seen.append(step)
        return super().demand(step, budget, signals)


@dataclass
class AgainCounts(Remembers):
    def again(self, group, wave, request, budget):
        self.seen.append(wave)


@dataclass
class Forgets(Remembers):
    def observe(self, step, metrics):
        self.seen.append(metrics["loss/sft"])

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


@dataclass
class ForgetsPlans(Remembers):
    """What is announced and not made yet; at staleness 0 there is nothing of it."""

    planned: dict = field(default_factory=dict)

    def commit(self, step, demand, signals):
        self.planned[step] = 0.01 * step

    def terms(self, batch):
        self.weight = self.planned.pop(batch.step, 0.0)
        return Good.terms(self, batch)


@dataclass
class TakesAnyState(Remembers):
    def load_state_dict(self, state):
        self.seen = list(state.get("seen", []))


def rows_of(batch):
    return Good.rows(Good(), batch)


EXAMPLE = trajectory([1], [5], expert=True)
PLANTED = [
    (Good, []),
    (Remembers, []),
    (Unseeded, [DRAWS, ORDER, PACKING, ANSWERS, ANSWERS + STALE, RESUME, RESUME + STALE]),
    (DividesByDemonstrations, [FINITE, EMPTY]),
    (ReportsNothing, [FINITE]),
    (TrainsItsOwn, [EMPTY]),
    (TrainsPrompts, [TRAINED]),
    (SharesWeights, [OWN]),
    (FirstIsSpecial, [ORDER]),
    (OfItsMicroBatch, [PACKING]),
    (DemandCounts, [ANSWERS, ANSWERS + STALE]),
    (AgainCounts, [ANSWERS, ANSWERS + STALE]),
    (Forgets, [RESUME, RESUME + STALE]),
    (ForgetsPlans, [RESUME + STALE]),
    (TakesAnyState, [OTHER]),
]


@pytest.mark.parametrize("made, expected", PLANTED, ids=[made.__name__ for made, _ in PLANTED])
def test_each_check_finds_its_fault(made, expected):
    """And the others, as far as they are quick, find nothing."""
    found = []
    for name, check in CHECKS.items():
        asked = name in expected or name in QUICK or not expected
        if asked and run_check(check, Subject(made)):
            found.append(name)
    assert found == expected


def test_every_check_has_a_planted_fault():
    times = Counter(name for _, expected in PLANTED for name in expected)
    assert set(times) == set(CHECKS)


def test_what_a_check_says():
    finding = run_check(CHECKS[RESUME], Subject(Forgets))
    assert finding is not None
    assert "step 7: the loss is" in finding.found and "differs in seen after" in finding.found
    assert "state_dict() held weight" in finding.found and "state_dict()" in finding.change
    finding = run_check(CHECKS[FINITE], Subject(DividesByDemonstrations))
    assert finding is not None and finding.found.startswith(
        "on a batch with no demonstrations: ZeroDivisionError: division by zero, at "
    )


def check_method(capsys, *words):
    code = cli.main(["check-method", *words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.fixture
def own(in_tmp):
    (in_tmp / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from tandem import NLL, Demand, Method, Term, expert_row\n\n\n"
        "@dataclass\n"
        "class Mine(Method):\n"
        "    uses_experts: ClassVar[bool] = True\n"
        "    uses_rollouts: ClassVar[bool] = False\n\n"
        "    column: str = ''\n"
        "    source: str = 'experts'\n"
        "    weight: float = 0.5\n\n"
        "    def demand(self, step, budget, signals):\n"
        "        return Demand(experts={self.source: budget.experts})\n\n"
        "    def rows(self, batch):\n"
        "        rows = []\n"
        "        for t in batch.experts:\n"
        "            difficulty = t.columns[self.column] if self.column else 1.0\n"
        "            rows.append(expert_row(t, 'sft').with_streams(difficulty=difficulty))\n"
        "        return rows\n\n"
        "    def terms(self, batch):\n"
        "        return [Term('sft', NLL(), coefficient=self.weight)]\n"
    )
    return in_tmp


def test_a_method_of_the_users_own(own, capsys):
    code, lines, _ = check_method(capsys, "mine.py:Mine", "weight=0.25")
    assert code == 0 and lines == [
        *(f"ok      {name}" for name in CHECKS),
        f"mine.py:Mine: all {len(CHECKS)} checks hold",
    ]


def test_a_failed_check_is_told_with_what_to_change(own, capsys):
    code, lines, err = check_method(capsys, "mine.py:Mine", "weight=1e400")
    assert code == 2 and not err
    place = lines.index(f"failed  {FINITE}")
    told = lines[place + 1 : place + 4]
    assert [line.split()[0] for line in told] == ["found:", "expected:", "change:"]
    assert "its coefficient is inf" in told[0]
    assert lines[-1].startswith("mine.py:Mine: ") and lines[-1].endswith("checks failed")


def test_columns_and_sources_can_be_given(own, capsys):
    code, lines, _ = check_method(capsys, "mine.py:Mine", "column=difficulty", "source=math")
    said = "\n".join(lines)
    assert code == 2 and "--column difficulty=VALUE" in said and "'math'" in said
    words = ("--column", "difficulty=0.5", "--source", "math", "source=math", "column=difficulty")
    assert check_method(capsys, "mine.py:Mine", *words)[0] == 0


@pytest.mark.parametrize(
    "words, told",
    [
        (["grpp"], "unknown method 'grpp' (did you mean 'grpo'?)"),
        (["mine.py:Mine", "wait=1"], "has no option 'wait' (did you mean 'weight'?)"),
        (["mine.py:Mine", "weight=much"], "method.weight: found 'much'"),
        (["mine.py:Mien"], "has no 'Mien'"),
        (["mine.py:Mine", "weight"], "expected key=value"),
    ],
)
def test_a_typo_is_one_screen(own, capsys, words, told):
    code, lines, err = check_method(capsys, *words)
    assert (code, lines) == (2, []) and told in err
