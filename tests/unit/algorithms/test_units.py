"""Terms that have one number per row, or per group of rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import batch, constant, ids
from wrong_cases import loss, wrong

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.correction import RolloutCorrection
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.rows import expert_row
from tandem.engine.core.errors import MethodError
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.learner.inspect import inspect
from tandem.engine.learner.packing import pack

# five rows of three groups: two pairs, and three of one prompt; lengths 3, 1, 2, 5 and 1, 2
ANSWERS = [(0, [5, 6, 3]), (0, [7]), (1, [8, 3]), (1, [9, 8, 7, 6, 3]), (2, [5]), (2, [4, 3])]
EXPERTS = tuple(
    trajectory([1, 2 + group], response, expert=True, prompt_id=f"e{group}")
    for group, response in ANSWERS
)
ROLES = ("good", "bad", "bad", "good", "good", "bad")


def rows_of(batch):
    made = []
    for (group, _), role, expert in zip(ANSWERS, ROLES, EXPERTS, strict=True):
        row = replace(expert_row(expert, "unit"), group=group, role=role)
        made.append(row.with_streams(worth=len(made) + 0.25))
    return made


def method(term, rows=rows_of):
    return wrong(rows=lambda self, batch: rows(batch), terms=lambda self, batch: [term])


def with_unit(objective, unit="row", **parts):
    return Term("unit", objective, unit=unit, **parts)


def look(method, logp=ids, **more):
    return inspect(method, batch(groups=(), experts=EXPERTS), logp, **more)


def sums(logp=ids):
    rows = rows_of(None)
    return np.array([logp(row)[row.trained].sum() for row in rows])


SPLITS = [(1 << 20, 1), (8, 1), (1, 1), (8, 2), (1 << 20, 3)]


@pytest.mark.parametrize("micro_batch_tokens, ranks", SPLITS)
def test_a_row_is_one_number(micro_batch_tokens, ranks):
    """-w sum_logp^2 + mean_logp, by hand, in any packing; Z counts rows."""
    seen = []

    def objective(units):
        seen.append((len(units), units.count.tolist(), units.role, units.group.tolist()))
        value = units["worth"] * units.sum_logp**2 + units.mean_logp
        return value, {"worth": units["worth"], "total": units.sum("worth")}

    out = look(method(with_unit(objective)), micro_batch_tokens=micro_batch_tokens, ranks=ranks)
    total, counts = sums(), np.array([len(response) for _, response in ANSWERS])
    worth = np.arange(6) + 0.25
    expected = worth * total**2 + total / counts
    assert out.denominators == {"unit": 6.0}
    assert out.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert out.metrics["unit/worth"] == pytest.approx(worth.mean())
    assert out.metrics["unit/total"] == pytest.approx((worth * counts).mean())
    for i, (row, gradient) in enumerate(zip(out.rows, out.gradients, strict=True)):
        slope = (2 * worth[i] * total[i] + 1 / counts[i]) / 6
        np.testing.assert_allclose(gradient, slope * row.trained, rtol=1e-5)
    assert sum(count for count, *_ in seen) == 6
    for _, found, roles, groups in seen:
        for count, role, group in zip(found, roles, groups, strict=True):
            at = (list(counts), list(ROLES), [number for number, _ in ANSWERS])
            assert any((count, role, group) == one for one in zip(*at, strict=True))


def margin(groups):
    good, bad = groups.of("good"), groups.of("bad")
    assert len(good) == len(bad) == len(groups) and set(good.role) == {"good"}
    assert good.group.tolist() == bad.group.tolist() == groups.numbers.tolist()
    difference = good["worth"] * good.sum_logp - bad.mean_logp
    return difference**2, {"difference": difference.detach()}


@pytest.mark.parametrize("micro_batch_tokens, ranks", SPLITS)
def test_a_group_is_one_number_and_stays_together(micro_batch_tokens, ranks):
    term = with_unit(margin, "group")
    assert term.together and term.reduction == Reduction("unit_mean")
    out = look(method(term), micro_batch_tokens=micro_batch_tokens, ranks=ranks)
    total, counts = sums(), np.array([len(response) for _, response in ANSWERS])
    good, bad = np.array([0, 3, 4]), np.array([1, 2, 5])
    worth = np.arange(6) + 0.25
    difference = worth[good] * total[good] - total[bad] / counts[bad]
    assert out.denominators == {"unit": 3.0}
    assert out.loss == pytest.approx((difference**2).mean(), rel=1e-5)
    assert out.metrics["unit/difference"] == pytest.approx(difference.mean(), rel=1e-5)
    for g in range(3):
        slope = 2 * difference[g] / 3
        for i, own in ((good[g], worth[good[g]]), (bad[g], -1 / counts[bad[g]])):
            row = out.rows[i]
            np.testing.assert_allclose(out.gradients[i], slope * own * row.trained, rtol=1e-4)


def test_any_rows_of_a_group_without_roles():
    """The log of a sum over the rows of each group, however many."""

    def objective(groups):
        return groups.sum(groups.rows.sum_logp.exp()).log(), {}

    out = look(method(with_unit(objective, "group")), micro_batch_tokens=8)
    total = np.exp(sums())
    expected = np.log([total[0] + total[1], total[2] + total[3], total[4] + total[5]]).mean()
    assert out.loss == pytest.approx(expected, rel=1e-5)


def test_a_unit_weighs_as_its_tokens_do_and_z_counts_it_once():
    def rows(batch):
        weights = (1, 1, 0.5, 0.5, 0, 0)
        made = zip(rows_of(batch), weights, strict=True)
        return [row.with_term("unit", row.weights["unit"] * np.float32(w)) for row, w in made]

    total = sums()
    out = look(method(with_unit(loss(lambda u: u.sum_logp)), rows))
    assert out.denominators == {"unit": 4.0}
    assert out.loss == pytest.approx((total[0] + total[1] + total[2:4].sum() / 2) / 4, rel=1e-5)
    first = loss(lambda g: g.of("good").sum_logp)
    out = look(method(with_unit(first, "group"), rows))
    assert out.denominators == {"unit": 2.0}
    assert out.loss == pytest.approx((total[0] + total[3] / 2) / 2, rel=1e-5)
    of_sums = with_unit(loss(lambda u: u.sum_logp), reduction=Reduction("constant", 10))
    assert look(method(of_sums)).loss == pytest.approx(total.sum() / 10, rel=1e-5)


def test_a_row_with_a_token_without_a_number_has_none():
    def rows(batch):
        made = rows_of(batch)
        behaviour = constant(-1.0)(made[0])
        behaviour[-1] = np.nan
        return [made[0].with_streams(behaviour_logp=behaviour), *made[1:]]

    def objective(units):
        assert (
            units.sum("behaviour_logp").isnan().all() and units.mean("behaviour_logp").isnan().all()
        )
        return units.sum_logp, {}

    look(method(with_unit(objective), rows), micro_batch_tokens=1)


def test_other_terms_are_as_they_were():
    """A token term beside one with units: its own loss and Z."""
    both = wrong(
        rows=lambda self, batch: [
            row.with_term("sft", row.weights["unit"].copy()) for row in rows_of(batch)
        ],
        terms=lambda self, batch: [Term("sft", NLL()), with_unit(margin, "group")],
    )
    out = look(both, micro_batch_tokens=8)
    assert out.denominators == {"sft": 14.0, "unit": 3.0}
    assert out.terms["sft"] == pytest.approx(-sums().sum() / 14, rel=1e-5)


def test_the_packer_does_nothing_for_tokens_and_keeps_groups_whole():
    rows = rows_of(None)
    for unit, whole in (("token", False), ("row", False), ("group", True)):
        term = Term("unit", NLL(), unit=unit)
        (micros,) = pack(rows, [term], 1, 4, version=0)
        groups = [set(micro.group.tolist()) for micro in micros]
        assert (sum(map(len, groups)) == 3) is whole
        assert sorted(role for micro in micros for role in micro.roles) == sorted(ROLES)


def changed(number, **parts):
    """The rows, with one of them changed."""

    def rows(batch):
        made = rows_of(batch)
        made[number] = replace(made[number], **parts)
        return made

    return rows


def uneven(batch):
    made = rows_of(batch)
    made[3].weights["unit"][4] = 0.5
    return made


def halved(batch):
    made = rows_of(batch)
    return [made[0].with_term("unit", made[0].weights["unit"] / 2), *made[1:]]


def without_worth(batch):
    made = rows_of(batch)
    return [*made[:-1], made[-1].with_streams(worth=None)]


row_loss = loss(lambda u: -u.sum_logp)


@pytest.mark.parametrize(
    "term, rows, words",
    [
        (with_unit(loss(lambda u: -u.tokens.logp)), rows_of, r"shape \[14\], expected \[6\]: one"),
        (with_unit(loss(lambda g: -g.rows.sum_logp), "group"), rows_of, "one number per group, "),
        (with_unit(loss(lambda u: -u.sum_logp[:, None])), rows_of, r"shape \[6, 1\]"),
        (with_unit(loss(lambda u: -u.sum_logp.mean())), rows_of, r"shape \[\], expected \[6\]"),
        (with_unit(loss(lambda u: -u.sum_logp.detach())), rows_of, "loss carries no gradient"),
        (with_unit(loss(lambda u: u.count.tolist())), rows_of, "loss is a list"),
        (
            with_unit(lambda u: (-u.sum_logp, {"p": u.tokens.logp})),
            rows_of,
            r"metric 'p' has shape \[14\], expected \[6\]: one number per row",
        ),
        (with_unit(NLL(), "sequence"), rows_of, "unit is 'sequence', expected one of token, row"),
        (with_unit(NLL()), rows_of, "'Units' object has no attribute 'logp'"),
        (
            with_unit(row_loss, reduction=Reduction("token_mean")),
            rows_of,
            "unit is 'row' and its reduction 'token_mean', expected unit_mean or constant",
        ),
        (
            Term("unit", NLL(), Reduction("unit_mean")),
            rows_of,
            "unit is 'token' and its reduction 'unit_mean', expected token_mean or",
        ),
        (with_unit(row_loss, correction=RolloutCorrection()), rows_of, "it has a correction"),
        (with_unit(row_loss), uneven, r"row 3 .*weights\['unit'\] are 1.0 and 0.5, expected one"),
        (with_unit(margin, "group"), changed(1, group=-1), "row 1 .*it is of no group"),
        (with_unit(margin, "group"), halved, "is 1.0, but 0.5 in another row of group 0"),
        (with_unit(margin, "group"), changed(1, role="good"), "group 0 has 2 rows .*role 'good'"),
        (with_unit(margin, "group"), changed(1, role=""), "group 0 has 0 rows of the role 'bad'"),
        (with_unit(margin, "group"), changed(1, group=7), "group 7 has 0 rows of the role 'good'"),
        (with_unit(row_loss), changed(1, role=None), "role is None, expected a word"),
        (
            with_unit(loss(lambda u: u["worth"] * u.sum_logp)),
            without_worth,
            "NaN on rows whose row has no worth",
        ),
        (with_unit(loss(lambda u: u["x"] * u.sum_logp)), rows_of, r"read as units\['advantage'\]"),
        (
            with_unit(loss(lambda g: g.of("good").sum("ref_logp")), "group"),
            rows_of,
            r"no token has 'ref_logp'.*groups.rows\['advantage'\]",
        ),
    ],
)
def test_units_that_cannot_be(term, rows, words):
    with pytest.raises(MethodError, match=f"(?s)method Wrong.*{words}") as error:
        look(method(term, rows))
    assert "'unit'" in str(error.value) or "role is None" in str(error.value)


def test_rows_of_a_group_can_be_taken_in_any_order():
    def objective(units):
        turned = units.take(np.arange(len(units))[::-1])
        torch.testing.assert_close(turned.sum_logp.flip(0), units.sum_logp)
        assert turned.has_role("good").flip(0).tolist() == units.has_role("good").tolist()
        assert turned["worth"].flip(0).tolist() == units["worth"].tolist()
        return units.sum_logp, {}

    look(method(with_unit(objective)))
