"""A method that hands over what cannot be trained on is an error that names it, in the first step.

Each case changes one thing of a method that is right. The checks are those of training: `inspect`
takes the same path.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from method_cases import batch, half
from wrong_cases import Right, look, loss, with_objective, with_row, with_terms, with_weights, wrong

from tandem.algorithms.base import Term
from tandem.algorithms.parts.diagnostics import critic_diagnostics
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.policy import PPOClip
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rows import expert_row
from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import StepPlan
from tandem.engine.learner.inline import InlineLearner
from tandem.engine.learner.packing import pack
from tandem.engine.learner.protocol import PolicySpec
from tandem.engine.learner.terms import denominators
from tandem.engine.model.tiny import make_tiny


def test_right_is_right():
    assert look(Right()).loss == pytest.approx(1.5 * np.log(2), rel=1e-5)


# -- what objectives return


def metrics(function):
    return lambda tokens: (-tokens.logp, function(tokens))


@pytest.mark.parametrize(
    "objective, words",
    [
        (loss(lambda t: -t.logp[:, None]), r"loss has shape \[5, 1\], expected \[5\]"),
        (loss(lambda t: -t.logp[None]), r"loss has shape \[1, 5\]"),
        (loss(lambda t: -t.logp.mean()), r"loss has shape \[\], expected \[5\]"),
        (loss(lambda t: -t.logp[:1]), r"loss has shape \[1\]"),
        (loss(lambda t: -t.logp[1:]), r"loss has shape \[4\]"),
        (loss(lambda t: -t.logp.detach()), "loss carries no gradient"),
        (loss(lambda t: torch.ones_like(t.logp)), "loss carries no gradient"),
        (loss(lambda t: -t.logp.detach().numpy()), "loss is a ndarray, expected a torch tensor"),
        (loss(lambda t: (-t.logp).tolist()), "loss is a list"),
        (loss(lambda t: -t.logp.to(torch.complex64)), "loss has dtype torch.complex64"),
        (loss(lambda t: t.segment), "loss has dtype torch.int64"),
        (loss(lambda t: -t.logp.to("meta")), "on the device meta, expected cpu"),
        (lambda t: -t.logp, "returned a Tensor, expected a pair"),
        (lambda t: None, "returned None, expected a pair"),
        (lambda t: (-t.logp, {}, {}), "returned a tuple, expected a pair"),
        (metrics(lambda t: None), "metrics are None"),
        (metrics(lambda t: {"p": t.logp[1:]}), r"metric 'p' has shape \[4\]"),
        (metrics(lambda t: {"p": t.logp.mean()}), r"metric 'p' has shape \[\]"),
        (metrics(lambda t: {"p": 0.5}), "metric 'p' is a float"),
        (metrics(lambda t: {"p": t.logp.detach().numpy()}), "metric 'p' is a ndarray"),
        (
            metrics(lambda t: {"part": {"p": t.logp[:2], "q": t.logp[:3]}}),
            r"metric 'part': 'q' has shape \[3\]",
        ),
        (metrics(lambda t: {"part": {"p": 0.5}}), "metric 'part': 'p' is a float"),
        (loss(lambda t: -t["entropy"]), "(?s)'sft'.*KeyError.*does not have here: .*entropy"),
        (loss(lambda t: -t["ref_logp"].exp()), "(?s)'sft'.*KeyError.*ref_logp"),
        (loss(lambda t: (t["value"] - t["returns"]) ** 2), "(?s)'sft'.*KeyError.*value"),
        (PPOClip(), "(?s)'sft'.*does not have here: .*advantage"),
    ],
)
def test_objectives(objective, words):
    with pytest.raises(MethodError, match=words) as caught:
        look(with_objective(objective))
    assert "method Wrong" in str(caught.value) and "term 'sft'" in str(caught.value)


def test_a_stream_that_another_term_asked_for_is_not_seen_by_one_that_did_not():
    ask = Term("again", NLL(), needs=frozenset({"entropy"}))
    sneak = Term("sft", loss(lambda t: -t.logp * t["entropy"]))
    with pytest.raises(MethodError, match="term 'sft'"):
        look(with_terms(sneak, ask), entropy=half)
    asked = replace(sneak, needs=frozenset({"entropy"}))
    assert np.isfinite(look(with_terms(asked, ask), entropy=half).loss)


def test_the_reference_is_seen_by_terms_that_asked_or_brought_their_own():
    """Rows outside the term that asked are not scored, so another term would read NaN there."""
    ask = Term("again", NLL(), needs=frozenset({"ref_logp"}))
    read = Term("sft", loss(lambda t: t.logp - t["ref_logp"]))
    with pytest.raises(MethodError, match=r"term 'sft'.*(?s:.)*does not have here: .*ref_logp"):
        look(with_terms(read, ask), reference=half)
    assert np.isfinite(look(with_terms(read, Term("again", NLL())), reference=half).loss)


@pytest.mark.parametrize(
    "objective",
    [
        loss(lambda t: torch.zeros_like(t.logp)),  # nothing to train in this micro-batch
        metrics(
            lambda t: {"flag": t.logp < 0, "part": {}, "some": {"p": t.logp[:2], "q": t.logp[:2]}}
        ),
        loss(lambda t: -t.logp.to(torch.float64)),
    ],
)
def test_objectives_that_are_right(objective):
    assert np.isfinite(look(with_objective(objective)).loss)


def test_an_error_of_the_objectives_own_is_left_as_it_is():
    def broken(tokens):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        look(with_objective(broken))


# -- terms


@dataclass
class NoDenominator:
    """A reduction of the user's own, whose Z is no number to divide by."""

    z: float | None

    def row_scale(self, n):
        return 1.0

    def denominator(self, counts):
        return self.z


def one(term):
    return with_terms(term, Term("again", NLL()))


@pytest.mark.parametrize(
    "method, words",
    [
        (wrong(terms=lambda self, batch: None), r"terms\(\) returned None, .*does it end without"),
        (wrong(terms=lambda self, batch: Term("sft", NLL())), "returned one Term, expected a list"),
        (
            wrong(terms=lambda self, batch: (t for t in Right.terms(self, batch))),
            r"generator.*list\(\.\.\.\)",
        ),
        (wrong(terms=lambda self, batch: {"sft": NLL()}), "returned a dict"),
        (wrong(terms=lambda self, batch: [NLL()]), "entry 0 is a NLL, expected Term"),
        (wrong(terms=lambda self, batch: [Term]), "entry 0 is the class Term"),
        (
            with_terms(Term("sft", NLL()), Term("sft", NLL("phi")), Term("again", NLL())),
            "two terms named 'sft'",
        ),
        (one(Term("sft", NLL)), r"term 'sft': its objective is the class NLL.*NLL\(\)"),
        (one(Term("sft", None)), "term 'sft': its objective is None"),
        (one(Term("sft", NLL(), Reduction)), "term 'sft': its reduction"),
        (one(Term("sft", NLL(), "token_mean")), "term 'sft': its reduction is 'token_mean'"),
        (
            one(Term("sft", NLL(), coefficient=Schedule("constant", 1.0))),
            "term 'sft': its coefficient .*Schedule",
        ),
        (one(Term("sft", NLL(), coefficient=None)), "term 'sft': its coefficient is None"),
        (one(Term("sft", NLL(), coefficient="0.1")), "term 'sft': its coefficient is '0.1'"),
        (one(Term("sft", NLL(), coefficient=float("nan"))), "term 'sft': its coefficient is nan"),
        (one(Term("sft", NLL(), coefficient=10**400)), "its coefficient is 1000.*a number"),
        (
            one(Term("sft", NLL(), coefficient=torch.ones((), requires_grad=True))),
            r"tensor with a gradient, which no optimizer follows; write coefficient.item",
        ),
        (one(Term("sft", NLL(), coefficient=np.ones(2))), "its coefficient is array"),
        (one(Term("sft", NLL(), NoDenominator(0.0))), "term 'sft': its reduction's .* is 0.0"),
        (one(Term("sft", NLL(), NoDenominator(None))), "term 'sft': its reduction's .* is None"),
        (one(Term("sft", NLL(), NoDenominator(np.nan))), "term 'sft': its reduction's .* is nan"),
        (one(Term("sft", NLL(), needs=None)), "term 'sft': its needs is None"),
        (one(Term("sft", NLL(), needs="entropy")), "term 'sft': its needs is the text 'entropy'"),
        (
            one(Term("sft", NLL(), needs={"entropyy"})),
            "term 'sft' needs 'entropyy' .did you mean 'entropy'",
        ),
        (
            one(Term("sft", NLL(), needs={"value"})),
            "term 'sft': it needs 'value', which a critic gives",
        ),
        (one(Term("sft", NLL(), needs={"old_value"})), "term 'sft': it needs 'old_value'"),
        (one(Term("sft", NLL(), needs={"returns"})), "term 'sft' needs 'returns'"),
        (one(Term(3, NLL())), "its name must be a word"),
    ],
)
def test_terms(method, words):
    with pytest.raises(MethodError, match=words) as caught:
        look(method)
    assert "method Wrong" in str(caught.value)


@pytest.mark.parametrize(
    "coefficient", [torch.tensor(0.5), np.float64(0.5), np.array(0.5), np.array([0.5])]
)
def test_coefficients_of_other_libraries(coefficient):
    out = look(with_terms(Term("sft", NLL(), coefficient=coefficient), Term("again", NLL())))
    assert out.loss == pytest.approx(1.5 * np.log(2), rel=1e-5)
    assert type(out.coefficients["sft"]) is float


@pytest.mark.parametrize("name", ["gap", "entropy", "gap/max", "a/b", "größe", "two words"])
def test_names_of_terms(name, tmp_path):
    """No name meets what the learner counts beside the terms."""
    rows = [expert_row(t, name) for t in batch().experts]
    terms = [Term(name, NLL())]
    model = str(make_tiny(tmp_path / "tiny", hidden=32, layers=2))
    learner = InlineLearner.start(Config(model=ModelConfig(model)), model, PolicySpec())
    micro_batches = pack(rows, terms, 1, 64, version=0)
    for entropy in (False, True):
        plan = StepPlan(terms, denominators(terms, rows), micro_batches, 1e-4, entropy=entropy)
        metrics = learner.step(plan).metrics
        assert metrics[f"loss/{name}"] > 0 and 0 < metrics[f"{name}/p"] < 1
        assert "entropy" not in metrics, "there is no token of the policy"


def test_a_tuple_of_terms_and_a_negative_or_zero_coefficient_are_fine():
    terms = (Term("sft", NLL(), coefficient=-0.5), Term("again", NLL(), coefficient=np.float32(0)))
    assert look(wrong(terms=lambda self, batch: terms)).loss == pytest.approx(-0.5 * np.log(2))


# -- rows


def floats(row, value=1.0):
    return np.full(len(row.tokens), value, np.float32)


def column(row):
    weight = np.ones((len(row.tokens), 1), np.float32)
    weight[0] = 0
    return weight


@pytest.mark.parametrize(
    "method, words",
    [
        (wrong(rows=lambda self, batch: None), r"rows\(\) returned None, .*does it end without"),
        (
            wrong(rows=lambda self, batch: (r for r in Right.rows(self, batch))),
            r"a generator.*list\(\.\.\.\)",
        ),
        (
            wrong(rows=lambda self, batch: map(lambda r: r, Right.rows(self, batch))),
            r"a map.*list\(\.\.\.\)",
        ),
        (
            wrong(rows=lambda self, batch: Right.rows(self, batch)[0]),
            "returned one Row, expected a list",
        ),
        (wrong(rows=lambda self, batch: batch.experts), "entry 0 is a Trajectory, expected Row"),
        (
            with_row(lambda r: with_weights(r, sft=r.weights["sft"].tolist())),
            r"weights\['sft'\] is a list",
        ),
        (with_row(lambda r: replace(r, tokens=r.tokens.tolist())), "tokens is a list"),
        (with_row(lambda r: replace(r, source=r.source.tolist())), "source is a list"),
        (
            with_row(lambda r: r.with_streams(advantage=[1.0] * len(r.tokens))),
            r"\['advantage'\] is a list",
        ),
        (
            with_row(lambda r: r.with_streams(ref_logp=torch.ones(len(r.tokens)))),
            r"\['ref_logp'\] is a Tensor",
        ),
        (
            with_row(lambda r: with_weights(r, sft=column(r))),
            r"weights\['sft'\] has shape \(5, 1\)",
        ),
        (
            with_row(lambda r: with_weights(r, sft=r.weights["sft"].astype(complex))),
            "dtype complex128",
        ),
        (
            with_row(lambda r: replace(r, tokens=r.tokens.astype(float))),
            "tokens has dtype float64, expected integers",
        ),
        (
            with_row(lambda r: with_weights(r, sft=np.where(r.weights["sft"], np.nan, 0))),
            r"weights\['sft'\] is nan at token 2",
        ),
        (
            with_row(lambda r: with_weights(r, sft=np.where(r.weights["sft"], np.inf, 0))),
            "is inf at token 2",
        ),
        (
            with_row(lambda r: with_weights(r, again2=r.weights["sft"])),
            "'again2', which is no term.*did you mean 'again'",
        ),
        (
            with_row(lambda r: r.with_streams(advantage=floats(r, np.nan))),
            r"\['advantage'\] is nan at token 2",
        ),
        (
            with_row(lambda r: r.with_streams(advantage=floats(r, np.inf))),
            r"\['advantage'\] is inf at token 2",
        ),
    ],
)
def test_rows(method, words):
    with pytest.raises(MethodError, match=words) as caught:
        look(method)
    assert "method Wrong" in str(caught.value)
    if "returned" not in str(caught.value):
        assert "row 0 (prompt 'e0')" in str(caught.value)


@pytest.mark.parametrize(
    "method",
    [
        wrong(rows=lambda self, batch: tuple(Right.rows(self, batch))),
        with_row(lambda r: with_weights(r, sft=-r.weights["sft"])),
        with_row(lambda r: with_weights(r, sft=r.weights["sft"] != 0)),
        with_row(lambda r: with_weights(r, sft=r.weights["sft"].astype(np.float64))),
        with_row(lambda r: r.with_streams(advantage=np.where(r.trained, 1.0, np.nan))),
        with_row(lambda r: r.with_streams(returns=floats(r))),  # a carrier of the method's own
        wrong(
            rows=lambda self, batch: [
                with_weights(r, sft=floats(r, 0)) for r in Right.rows(self, batch)
            ]
        ),
    ],
)
def test_rows_that_are_right(method):
    out = look(method)
    assert np.isfinite(out.loss) and critic_diagnostics(out.rows) == {}


def test_rows_of_which_none_names_a_term():
    bare = wrong(rows=lambda self, b: [replace(r, weights={}) for r in Right.rows(self, b)])
    with pytest.raises(MethodError, match="none of its 2 rows has weights for a term"):
        look(bare)
    assert np.isfinite(look(with_row(lambda r: replace(r, weights={}))).loss), "one row left out"


@pytest.mark.parametrize(
    "credit, words",
    [
        (lambda self, rows, batch: None, r"credit\(\) returned None, .*does it end without"),
        (lambda self, rows, batch: (r for r in rows), "returned a generator"),
        (lambda self, rows, batch: rows[1:], r"credit\(\) returned 1 rows for 2"),
        (lambda self, rows, batch: [*rows, rows[0]], r"credit\(\) returned 3 rows for 2"),
        (
            lambda self, rows, batch: [r.with_streams(advantage=floats(r, np.nan)) for r in rows],
            r"\['advantage'\] is nan",
        ),
        (
            lambda self, rows, batch: [r.with_streams(returns=floats(r).tolist()) for r in rows],
            r"\['returns'\] is a list",
        ),
        (
            lambda self, rows, batch: [with_weights(r, extra=r.weights["sft"]) for r in rows],
            "'extra', which is no term",
        ),
    ],
)
def test_credit(credit, words):
    with pytest.raises(MethodError, match=words):
        look(wrong(credit=credit))


def test_a_needed_advantage_must_be_there_on_every_token_of_the_term():
    needs = Term("sft", PPOClip(), needs=frozenset({"advantage"}))
    method = wrong(
        terms=lambda self, batch: [needs, Term("again", NLL())],
        credit=lambda self, rows, batch: [
            rows[0].with_streams(advantage=floats(rows[0])),
            *rows[1:],
        ],
    )
    with pytest.raises(MethodError, match=r"row 1 .*: term 'sft' needs 'advantage'"):
        look(method)


@pytest.mark.parametrize(
    "stream, objective",
    [
        ("advantage", PPOClip()),
        ("returns", loss(lambda t: (t.logp - t["returns"]) ** 2)),
    ],
)
def test_rows_without_what_others_of_the_term_have(stream, objective):
    """The packer puts NaN where a row has none. NLL does not look: the rows are fine for it."""
    first = type(with_row(lambda r: r.with_streams(**{stream: floats(r)}))).rows

    def asks(self, batch):
        return [Term("sft", objective), Term("again", NLL())]

    with pytest.raises(MethodError, match=f"term 'sft'.*NaN on tokens whose row has no {stream}"):
        look(wrong(rows=first, terms=asks))
    assert np.isfinite(look(wrong(rows=first)).loss)
