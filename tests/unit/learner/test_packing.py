"""Every row is packed exactly once, as far as it has to be run, on some rank; streams follow their
tokens; bins are full and ranks balanced.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.reductions import Reduction
from tandem.engine.core.types import Row, Source
from tandem.engine.learner.packing import cost, pack
from tandem.engine.model.policy import block_mask

TERMS = [Term("a", NLL()), Term("b", NLL(), Reduction("seq_mean_token_mean"))]


def make_rows(lengths, seed=0, untrained=0.0):
    """Rows with random ids and random weights in two terms; a share of them `untrained`."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        weights = {
            name: (rng.random(length) < 0.7) * rng.random(length).astype(np.float32)
            for name in "ab"
        }
        if rng.random() < untrained:
            weights = {"a": np.zeros(length, np.float32)}
        elif length > 1:
            weights["a"][-1] = 0.5
        for weight in weights.values():
            weight[0] = 0
        rows.append(
            Row(
                rng.integers(1, 1000, length).astype(np.int32),
                np.full(length, Source.EXPERT, np.int8),
                weights,
                group=int(rng.integers(5)),
            )
        )
    return rows


def needed(row):
    """How many of its tokens predict a trained one, or stand before one that does."""
    return int(row.trained.nonzero()[0].max(initial=0))


def lognormal(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(90), 0.8, n), 20, 400).astype(int)


@pytest.mark.parametrize("seed", range(12))
def test_every_trained_row_once_up_to_its_last_prediction(seed):
    rng = np.random.default_rng(seed)
    ranks, budget = int(rng.integers(1, 4)), int(rng.integers(16, 300))
    rows = make_rows(rng.integers(1, 120, int(rng.integers(0, 60))), seed, untrained=0.2)
    plan = pack(rows, TERMS, ranks, budget, version=0)
    assert len(plan) == ranks and len({len(micros) for micros in plan}) == 1 and len(plan[0]) >= 1
    packed = []
    for micro in (micro for micros in plan for micro in micros):
        assert micro.tokens.size <= budget or len(micro.rows) == 1
        packed += micro.rows
        flat_tokens, flat_positions = micro.tokens.reshape(-1), micro.positions.reshape(-1)
        assert micro.real_tokens == sum(len(rows[i].tokens) for i in micro.rows)
        for number, i in enumerate(micro.rows):
            row, mine = rows[i], micro.segment == number
            place, run = flat_positions[micro.index[mine]], needed(row)
            np.testing.assert_array_equal(place + 1, row.trained.nonzero()[0])
            np.testing.assert_array_equal(micro.target[mine], row.tokens[row.trained])
            start = micro.index[mine][0] - place[0]
            np.testing.assert_array_equal(flat_tokens[start : start + run], row.tokens[:run])
            np.testing.assert_array_equal(flat_positions[start : start + run], np.arange(run))
            assert start // micro.tokens.shape[1] == (start + run - 1) // micro.tokens.shape[1], (
                "a row runs over the end of its bin"
            )
            for term in TERMS:
                weight = row.weights.get(term.name, np.zeros(len(row.tokens), np.float32))
                np.testing.assert_array_equal(micro.weights[term.name][mine], weight[row.trained])
            assert (micro.group[mine] == row.group).all()
    assert sorted(packed) == [i for i, row in enumerate(rows) if row.trained.any()]


@pytest.mark.parametrize("seed", range(5))
def test_transformers_tells_rows_and_padding_apart(seed):
    from transformers.masking_utils import find_packed_sequence_indices

    rows = make_rows(np.random.default_rng(seed).integers(1, 40, 30), seed)
    for micro in pack(rows, TERMS, 1, 160, version=0)[0]:
        found = find_packed_sequence_indices(torch.as_tensor(micro.positions))
        expected, width = np.full(micro.tokens.shape, -1), micro.tokens.shape[1]
        for number, i in enumerate(micro.rows):
            start = micro.index[micro.segment == number][0] + 1 - rows[i].trained.nonzero()[0][0]
            expected[start // width, start % width : start % width + needed(rows[i])] = number
        for ours, theirs in zip(
            expected, np.zeros_like(expected) if found is None else found.numpy(), strict=True
        ):
            np.testing.assert_array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_hand_made_batch():
    def weight(*x):
        return np.array(x, np.float32)

    sampled = Row(
        np.array([5, 6, 7, 8], np.int32),
        np.array([0, 1, 1, 1], np.int8),
        {"a": weight(0, 1, 1, 1)},
        {"advantage": weight(0, 2, 2, 2), "behaviour_logp": weight(np.nan, -1, -2, -3)},
        version=np.array([-1, 3, 3, 4], np.int32),
        group=9,
    )
    expert = Row(
        np.array([1, 2, 3], np.int32),
        np.array([0, 0, 2], np.int8),
        {"b": weight(0, 0, 0.5)},
        version=np.array([4, 4, 4], np.int32),
    )
    dropped = Row(np.array([4, 4], np.int32), np.array([0, 1], np.int8), {"a": weight(0, 0)})
    ((micro,),) = pack(
        [expert, dropped, sampled],
        [Term("a", NLL(), Reduction("seq_mean_token_mean")), Term("b", NLL())],
        1,
        64,
        version=4,
    )
    assert micro.rows == (2, 0)
    assert (
        micro.target.tolist() == [6, 7, 8, 3]
        and micro.segment.tolist() == [0, 0, 0, 1]
        and micro.group.tolist() == [9, 9, 9, -1]
    )
    assert micro.source.tolist() == [1, 1, 1, 2] and micro.fresh.tolist() == [
        False,
        False,
        True,
        False,
    ]
    np.testing.assert_allclose(micro.weights["a"], [1, 1, 1, 0])
    np.testing.assert_allclose(micro.weights["b"], [0, 0, 0, 0.5])
    np.testing.assert_allclose(micro.scale["a"], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(micro.scale["b"], [0, 0, 0, 1])
    assert set(micro.streams) == {"advantage", "behaviour_logp"}
    np.testing.assert_array_equal(micro.streams["advantage"], weight(2, 2, 2, np.nan))
    np.testing.assert_array_equal(micro.streams["behaviour_logp"], weight(-1, -2, -3, np.nan))
    assert (
        micro.tokens.dtype,
        micro.index.dtype,
        micro.target.dtype,
        micro.segment.dtype,
        micro.fresh.dtype,
    ) == (np.int64,) * 4 + (np.bool_,)


def test_a_row_longer_than_the_budget_is_alone():
    rows = make_rows([10, 300, 12, 11])
    (micros,) = pack(rows, TERMS, 1, 64, version=0)
    assert (1,) in [micro.rows for micro in micros] and [
        m.tokens.shape for m in micros if m.rows == (1,)
    ] == [(1, 299)]
    assert all(micro.tokens.size <= 64 for micro in micros if micro.rows != (1,))


@pytest.mark.parametrize("rows", [[], make_rows([5, 9], untrained=1.0)])
def test_without_trained_tokens_every_rank_still_runs_one_empty_micro_batch(rows):
    plan = pack(rows, TERMS, 3, 64, version=0)
    assert [len(micros) for micros in plan] == [1, 1, 1]
    for (micro,) in plan:
        assert (
            micro.tokens.shape == (1, 1)
            and len(micro.index) == len(micro.target) == 0
            and micro.rows == ()
            and micro.real_tokens == 0
        )


@pytest.mark.parametrize("n, budget", [(64, 2048), (200, 2048), (200, 4096), (1000, 16384)])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_rows_fill_their_bins(n, budget, seed):
    rows = make_rows(lognormal(n, seed))
    lengths = np.array([needed(row) for row in rows])
    (micros,) = pack(rows, TERMS, 1, budget, version=0)
    assert lengths.sum() / sum(micro.tokens.size for micro in micros) >= 0.95
    # no padding, no attention beyond a row's own
    alone = sum(length * (cost(1, length) - cost(0, 0)) / length for length in lengths)
    assert sum(cost(*micro.tokens.shape) for micro in micros) <= 1.16 * alone


def test_short_rows_get_short_bins():
    """Attention is dense within a bin: 512 rows of 30 to 38 tokens in bins of 4096 take 5 times as
    long as in short ones (measured).
    """
    lengths = np.random.default_rng(0).integers(30, 39, 512)
    (micros,) = pack(make_rows(lengths), TERMS, 1, 4096, version=0)
    assert max(micro.tokens.shape[1] for micro in micros) <= 160
    assert (lengths - 1).sum() / sum(micro.tokens.size for micro in micros) >= 0.95


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "lengths, spare",
    [(lognormal(400), 1.03), ([900, 700, *[30] * 200], 1.12)],
    ids=["ragged", "two long rows"],
)
def test_ranks_are_balanced(ranks, lengths, spare):
    plan = pack(make_rows(lengths), TERMS, ranks, 2048, version=0)
    loads = [sum(cost(*micro.tokens.shape) for micro in micros) for micros in plan]
    assert max(loads) <= spare * np.mean(loads)


def test_the_plan_depends_on_its_arguments_only():
    one, two = (pack(make_rows(lognormal(100)), TERMS, 2, 1024, version=0) for _ in range(2))
    assert [[micro.rows for micro in micros] for micros in one] == [
        [micro.rows for micro in micros] for micros in two
    ]


def with_prompts(rows, seed):
    """Rows that begin with one of a few prompts; some do not train their first own tokens, some
    have a prompt of their own.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 1000, n).astype(np.int32) for n in (3, 9, 30)]
    found = []
    for row in rows:
        prompt = prompts[rng.integers(3)]
        pad = np.zeros(len(prompt), np.float32)
        found.append(
            replace(
                row,
                tokens=np.r_[prompt, row.tokens],
                source=np.r_[np.full(len(prompt), Source.PROMPT, np.int8), row.source],
                weights={name: np.r_[pad, weight] for name, weight in row.weights.items()},
            )
        )
        if row.trained.any() and rng.random() < 0.8:
            found[-1].weights["a"][len(prompt)] = 0.5
    return found


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_behind_a_shared_prompt_every_token_sees_its_own_row_up_to_itself(seed, together):
    """Read back through the mask: the visible tokens in the order of their positions are the row,
    whatever stands between them in the bin.
    """
    rng = np.random.default_rng(seed)
    ranks, budget = int(rng.integers(1, 3)), int(rng.integers(60, 400))
    rows = with_prompts(make_rows(rng.integers(1, 40, 40), seed, untrained=0.2), seed)
    terms = [*TERMS, Term("c", NLL(), together=True)] if together else TERMS
    plan = pack(rows, terms, ranks, budget, version=0, share_prompts=True)
    packed, run = [], 0
    for micro in (micro for micros in plan for micro in micros):
        assert micro.tokens.size <= budget or len(micro.rows) == 1 or together
        packed += micro.rows
        run += micro.tokens.size
        if micro.prompt_blocks is None:
            continue
        mask, width = (
            block_mask(torch.as_tensor(micro.prompt_blocks))[:, 0].numpy(),
            micro.tokens.shape[1],
        )
        for number, i in enumerate(micro.rows):
            mine = micro.index[micro.segment == number]
            for flat, t in zip(mine, rows[i].trained.nonzero()[0], strict=True):
                b, place = divmod(flat, width)
                seen = mask[b, place].nonzero()[0]
                order = seen[np.argsort(micro.positions[b, seen])]
                np.testing.assert_array_equal(micro.tokens[b, order], rows[i].tokens[:t])
                np.testing.assert_array_equal(micro.positions[b, order], np.arange(t))
            np.testing.assert_array_equal(
                micro.target[micro.segment == number], rows[i].tokens[rows[i].trained]
            )
        assert mask.any(-1).all(), "a token that sees nothing makes NaN"
    assert sorted(packed) == [i for i, row in enumerate(rows) if row.trained.any()]
    alone = sum(
        micro.tokens.size
        for micros in pack(rows, terms, ranks, budget, version=0)
        for micro in micros
    )
    assert run < (0.95 if together else 0.8) * alone


def test_long_answers_are_not_put_behind_one_prompt():
    """Attention over the bin would cost more than the prompt that is saved."""
    rows = with_prompts(make_rows([2000] * 12), 0)
    assert all(
        micro.prompt_blocks is None
        for micro in pack(rows, TERMS, 1, 10_000, version=0, share_prompts=True)[0]
    )
