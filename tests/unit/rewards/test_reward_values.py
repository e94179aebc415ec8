"""What a reward may return: every ordered collection of numbers that float32 can hold.

All else is a typed failure of its own sample.
"""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.types import Prompt
from tandem.rollout.rewards.runner import RewardRunner
from tandem.rollout.rewards.values import Failure, of_group, of_sample, of_verl, weighted_sum


class FloatRaises(float):
    def __float__(self):
        raise RuntimeError("boo")


class ReprRaises:
    def __repr__(self):
        raise RuntimeError("no repr")


def kinds(entries):
    return [entry.kind if isinstance(entry, Failure) else entry for entry in entries]


@pytest.mark.parametrize(
    "value, number",
    [
        (1, 1.0),
        (True, 1.0),
        (np.bool_(False), 0.0),
        (np.float16(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(2.0), 2.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(True), 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        (3.4e38, 3.4e38),
        (1e-320, 1e-320),
    ],
)
def test_numbers_of_every_kind(value, number):
    found = of_sample(value)
    assert type(found) is float and found == number


@pytest.mark.parametrize(
    "value, kind",
    [
        (1e39, "not_finite"),
        (-1e308, "not_finite"),
        (np.float64(3.5e38), "not_finite"),
        (10**400, "not_finite"),
        (Decimal("1e400"), "not_finite"),
        (Decimal("NaN"), "not_finite"),
        (torch.tensor(float("inf")), "not_finite"),
        (float("nan"), "not_finite"),
        (None, "not_finite"),
        ("1.0", "arity"),
        (b"1", "arity"),
        (1 + 0j, "arity"),
        ([1.0], "arity"),
        (np.array([1.0]), "arity"),
        (torch.ones(2), "arity"),
        ({"score": 1.0}, "arity"),
        ({ReprRaises(): 1}, "arity"),
        (ReprRaises(), "arity"),
        ("x" * 20_000_000, "arity"),
        (FloatRaises(1.0), "exception"),
    ],
)
def test_what_is_no_reward_says_why(value, kind):
    found = of_sample(value)
    assert found.kind == kind and len(found.message) < 1000
    assert of_verl({"score": value}).kind == kind or kind == "arity"


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        np.array,
        torch.tensor,
        lambda numbers: (n for n in numbers),
        lambda numbers: map(float, numbers),
        lambda numbers: dict(enumerate(numbers)).values(),
    ],
    ids=["list", "tuple", "iterator", "array", "tensor", "generator", "map", "view"],
)
def test_every_ordered_collection_is_a_groups_result(make):
    assert of_group(make([1.0, 2.0, 3.0]), 3) == (1.0, 2.0, 3.0)
    assert kinds(of_group(make([1.0, 2.0]), 3)) == ["arity"] * 3
    assert kinds(of_group(make([1.0, 2.0, 3.0, 4.0]), 3)) == ["arity"] * 3


def endless():
    while True:
        yield 1.0


@pytest.mark.parametrize(
    "result",
    [1.0, None, "111", b"111", {1.0, 2.0, 3.0}, {"a": 1}, np.array(1.0), endless()],
    ids=lambda r: type(r).__name__,
)
def test_what_has_no_order_or_no_end_is_no_groups_result(result):
    assert kinds(of_group(result, 3)) == ["arity"] * 3


def test_entries_of_a_group_fail_one_by_one():
    assert kinds(of_group([1.0, 1e39, FloatRaises(1.0), None, "x"], 5)) == [
        1.0,
        "not_finite",
        "exception",
        None,
        "arity",
    ]


@pytest.mark.parametrize(
    "parts",
    [[(1.0, 3e38), (1.0, 3e38)], [(10.0, 1e38)], [(1e308, 10.0)], [(1e308, 1e10), (-1e308, 1e10)]],
)
def test_a_weighted_sum_beyond_float32_is_a_failure(parts):
    assert weighted_sum(parts).kind == "not_finite"


def outcomes(tmp_path, source, texts=("a", "b"), **kwargs):
    path = tmp_path / "reward.py"
    path.write_text(source)
    config = RewardConfig(functions=(f"{path}:score",), max_error_rate=1.0, **kwargs)
    prompt = Prompt("p", np.zeros(1, np.int32), "?")
    return (
        RewardRunner(config, inline=True)
        .submit(prompt, texts, [np.zeros(1, np.int32)] * len(texts))
        .result(timeout=0)
    )


@pytest.mark.parametrize(
    "body",
    [
        "def score(completions, **kw):\n    for c in completions: yield 1.0",
        "async def score(completions, **kw):\n    for c in completions: yield 1.0",
        "def score(completions, **kw): return (1.0 for c in completions)",
        "async def score(completions, **kw): return tuple(1.0 for c in completions)",
    ],
)
def test_generators_of_trl_work(tmp_path, body):
    assert [o.value for o in outcomes(tmp_path, body)] == [1.0, 1.0]


@pytest.mark.parametrize(
    "body, kind, words",
    [
        ("def score(completion): return 1e39", "not_finite", "infinite in float32"),
        (
            "def score(completion): raise ValueError('y' * 20_000_000)",
            "exception",
            "ValueError: yyy",
        ),
        ("def score(completion): raise ValueError('\\ud83d \\x00')", "exception", "\\ud83d \\x00"),
        (
            (
                "class Evil(Exception):\n    def __str__(self): raise RuntimeError\ndef "
                "score(completion): raise Evil"
            ),
            "exception",
            "Evil",
        ),
        (
            "def score(completions, **kw):\n    yield 1.0\n    raise KeyError('late')",
            "exception",
            "late",
        ),
        (
            "def score(completion):\n    def f(n): return f(n + 1)\n    return f(0)",
            "exception",
            "RecursionError",
        ),
    ],
)
def test_failures_have_short_messages(tmp_path, body, kind, words):
    for outcome in outcomes(tmp_path, body):
        assert (
            outcome.value is None and outcome.error.kind == kind and words in outcome.error.message
        )
        assert len(outcome.error.message) < 5_000
        outcome.error.message.encode("utf-8")


def test_weights_that_make_a_reward_infinite_are_told_with_the_parts(tmp_path):
    for outcome in outcomes(tmp_path, "def score(completion): return 1e38", weights=(10.0,)):
        assert (
            outcome.value is None
            and outcome.error.kind == "not_finite"
            and "weighted sum" in outcome.error.message
        )
        assert list(outcome.parts.values()) == [1e38]
