"""On-policy distillation, GKD and self-distillation by hand: invariants and traps of what a teacher
says, numbered as in the notes on distillation (sections 1 to 3 and 9).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import A, batch, constant, forced, ids, look, ramp, rollouts

from tandem.algorithms.base import Budget, Term
from tandem.algorithms.checks.rows import check_rows
from tandem.algorithms.checks.terms import ask_probes, check_terms
from tandem.algorithms.distillation.sdft import VIEW
from tandem.algorithms.parts.objectives.distilled import TO_TEACHER
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.teachers import less_distance
from tandem.algorithms.registry import make_method
from tandem.algorithms.rows import policy_row
from tandem.engine.core.errors import CarrierError, MethodError
from tandem.engine.core.types import Sampling
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.model.quantities import Chunk, Divergence

TOKENS = 4  # of `rollouts()`, three and one
BETTER = {"teacher": lambda row: ramp(row) + 0.3}  # than the policy at every token: d = -0.3


def opd(logp=ramp, models=BETTER, b=None, **options):
    return look(make_method("opd", options), b or batch(experts=()), logp, models=models)


def on_tokens(out):
    return np.concatenate([g[row.trained] for g, row in zip(out.gradients, out.rows, strict=True)])


# -- opd


def test_alone_each_token_is_pushed_by_the_log_ratio():
    """At ratio 1 the gradient is -A'/Z with A' = -coefficient d, whatever the rewards."""
    out = opd(coefficient=0.5)
    np.testing.assert_allclose(on_tokens(out), -0.5 * 0.3 / TOKENS, rtol=1e-5)
    other = opd(coefficient=0.5, b=batch([rollouts((3, 7))], experts=()))
    np.testing.assert_array_equal(on_tokens(other), on_tokens(out))


def test_beside_rewards_it_is_added_to_the_advantage_after_scaling():
    """Trap 8: whitened with A, its size would say nothing of the distance."""
    out = opd(rewards=True)
    np.testing.assert_allclose(
        on_tokens(out), -np.array([A + 0.3] * 3 + [-A + 0.3]) / TOKENS, rtol=1e-5
    )
    for policy in ("reinforce_pp", "rloo"):
        here = opd(rewards=True, policy=policy)
        parent = opd(rewards=True, policy=policy, coefficient=0.0)
        for mine, theirs in zip(here.rows, parent.rows, strict=True):
            moved = mine.streams["advantage"] - theirs.streams["advantage"]
            np.testing.assert_allclose(moved[mine.trained], 0.3, rtol=1e-5)


def test_1_a_teacher_that_is_the_policy_changes_no_bit():
    same = {"teacher": ramp}
    assert not on_tokens(opd(models=same)).any()
    with_teacher, parent = opd(models=same, rewards=True), opd(rewards=True, coefficient=0.0)
    for mine, theirs in zip(with_teacher.rows, parent.rows, strict=True):
        np.testing.assert_array_equal(mine.streams["advantage"], theirs.streams["advantage"])
    np.testing.assert_array_equal(on_tokens(with_teacher), on_tokens(parent))


def test_2_coefficient_0_is_the_parent_and_asks_no_teacher():
    out = opd(coefficient=0.0, rewards=True, models={})
    grpo = look(make_method("grpo", {}), batch(experts=()))
    np.testing.assert_array_equal(on_tokens(out), on_tokens(grpo))
    assert all("old_logp" not in row.streams for row in out.rows)


def test_3_at_ratio_1_clip_and_plain_policy_gradient_agree():
    plain = opd(policy={"objective": "reinforce"})
    np.testing.assert_allclose(on_tokens(opd()), on_tokens(plain), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_5_a_token_without_a_score_raises(value):
    """As a 0 it would say that the teacher is certain."""
    row = policy_row(trajectory([1], [5, 6]), 0.0, "policy")
    row = row.with_streams(old_logp=-1.0)
    theirs = np.array([np.nan, -1.0, value], np.float32)
    for scored in (row, row.with_streams(**{"logp:teacher": theirs})):
        with pytest.raises(MethodError, match=r"'policy'.*no finite score of the model 'teacher'"):
            less_distance([scored], "policy", "teacher", 1.0, None)


def test_6_a_shift_of_all_rewards_changes_nothing():
    shifted = opd(rewards=True, b=batch([rollouts((6.0, 5.0))], experts=()))
    np.testing.assert_allclose(on_tokens(shifted), on_tokens(opd(rewards=True)), rtol=1e-5)


def test_the_expectation_is_the_gradient_of_the_reverse_kl():
    """Checks 1.1 and 1.2, and trap 1: exact over a vocabulary of five, with d as a constant. Of one
    prefix the signal depends on the token."""
    z = torch.tensor([1.2, 0.3, -0.5, 0.0, -1.5], requires_grad=True)
    log_q = torch.tensor([-0.4, 1.1, 0.2, -0.8, 0.5]).log_softmax(-1)
    log_p = z.log_softmax(-1)
    (expected,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), z, retain_graph=True)
    rows = []
    for token in range(5):
        row = policy_row(trajectory([1], [token]), 0.0, "policy")
        now = {"old_logp": log_p[token].item(), "logp:teacher": log_q[token].item()}
        rows.append(row.with_streams(**now))
    advantages = [
        row.streams["advantage"][1] for row in less_distance(rows, "policy", "teacher", 1, None)
    ]
    assert len(set(advantages)) == 5
    loss = -(log_p.exp().detach() * torch.tensor(advantages) * log_p).sum()
    (found,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_expert_tokens_are_no_samples():
    mixed = forced(trajectory([1], [5]), [9, 8], [5, 6])
    row = policy_row(mixed, 0.5, "policy").with_term(
        "policy", np.array([0, 1, 1, 1, 1], np.float32)
    )
    row = row.with_streams(**{"old_logp": -1.0, "logp:teacher": -0.5})
    (found,) = less_distance([row], "policy", "teacher", 1.0, None)
    np.testing.assert_allclose(
        found.streams["advantage"] - row.streams["advantage"], [0, 0, 0, 0.5, 0.5]
    )


def test_distances_are_reported_and_clipped_on_request():
    method = make_method("opd", {"clip_d": 0.2})
    out = look(method, batch(experts=()), ramp, models=BETTER)
    np.testing.assert_allclose(on_tokens(out), -0.2 / TOKENS, rtol=1e-5)
    found = method.diagnostics(out.rows)
    assert found["teacher/distance"] == pytest.approx(-0.3, rel=1e-5)
    assert found["teacher/k3"] == pytest.approx(np.exp(0.3) - 1 - 0.3, rel=1e-4)
    assert found["teacher/clipped"] == 1.0 and found["teacher/rows"] == 1.0


def test_filters_that_delete_every_row_are_refused():
    with pytest.raises(ValueError, match="dynamic_sampling would drop all groups"):
        make_method("opd", {"policy": "dapo"})
    assert make_method("opd", {"policy": "dapo", "rewards": True})
    with pytest.raises(ValueError, match="clip_d is 0"):
        make_method("opd", {"clip_d": 0.0})


# -- gkd


def demands(own, seed=7, steps=200):
    budget = Budget(prompts=4, samples=4, experts=8, steps=steps, seed=seed)
    method = make_method("gkd", {"own": own})
    return [method.demand(step, budget, {}) for step in range(steps)]


def test_the_coin_falls_once_per_row_from_seed_and_step():
    counts = [demand.prompts for demand in demands(0.3)]
    assert [demand.experts for demand in demands(0.3)] == [8 - count for count in counts]
    assert np.mean(counts) == pytest.approx(8 * 0.3, abs=0.3) and len(set(counts)) > 4
    assert counts == [demand.prompts for demand in demands(0.3)]
    assert counts != [demand.prompts for demand in demands(0.3, seed=8)]
    assert all(demand.experts == 0 for demand in demands(1.0)), "no demonstration is read"
    assert all(demand.prompts == 0 for demand in demands(0.0))


def test_gkd_asks_for_one_sample_and_averages_over_all_tokens():
    method = make_method("gkd", {})
    budget = Budget(prompts=4, samples=4, experts=8, steps=1)
    request = method.request(0, group([trajectory([1], [5])], [0]).prompt, Sampling(8), 0, budget)
    assert request.samples == 1
    out = look(method, batch(), ramp, extra={"divergence": constant(0.5)})
    assert out.loss == pytest.approx(0.5) and out.denominators == {"gkd": 9.0}
    np.testing.assert_allclose(
        np.concatenate(
            [
                g[row.trained]
                for g, row in zip(out.extra_gradients["divergence"], out.rows, strict=True)
            ]
        ),
        1 / 9,
    )


def test_a_teacher_that_is_certain_of_the_demonstration_is_sft():
    """lambda 0, beta 0 (section 2)."""
    log_p = torch.randn(3, 6).log_softmax(-1)
    target = torch.tensor([4, 0, 2])
    log_q = torch.full((3, 6), -200.0)
    log_q[torch.arange(3), target] = 0.0
    chunk = Chunk(log_p, torch.zeros(3, 1), {"teacher": log_q}, {})
    value = Divergence("teacher", 0.0).value(chunk)
    torch.testing.assert_close(value, -log_p[torch.arange(3), target])
    slope = Divergence("teacher", 0.0).slope(chunk, value, torch.ones(3))
    one_hot = torch.nn.functional.one_hot(target, 6)
    torch.testing.assert_close(slope, log_p.exp() - one_hot)


def test_the_sft_half_of_any_method_may_follow_a_teacher():
    option = {"demos": {"objective": "distilled", "options": {"nll": 0.5}}}
    method = make_method("chord_mu", {"mu": 0.25, **option})
    assert method.compares_with == ("teacher",)
    out = look(method, batch(), constant(-2.0), extra={TO_TEACHER: constant(3.0)})
    assert out.terms["expert"] == pytest.approx(3.0 + 0.5 * 2.0)
    assert make_method("chord_mu", {}).compares_with == ()
    with pytest.raises(ValueError, match=r"objective distilled: beta is 2\.0"):
        make_method("sft", {"demos": {"objective": "distilled", "options": {"beta": 2.0}}})


# -- sdft


class Codec:
    def __init__(self):
        self.asked = []

    def encode(self, content):
        self.asked.append(content)
        return None if "long" in content else np.array([1, 2, 9], np.int32)

    def decode(self, response):
        return " ".join(map(str, response))


def sdft(groups, codec=None, models=None, **options):
    method = make_method("sdft", {"template": " so: {hint}", **options})
    b = batch(groups, experts=(), budget=Budget(2, 2, 2, 1, codec=codec or Codec()))
    models = models or {f"reference@{VIEW}": lambda row: ramp(row) + 0.3}
    return method, look(method, b, ramp, models=models)


def asked(content, **more):
    found = rollouts(**more)
    return replace(found, prompt=replace(found.prompt, content=content))


def test_the_teacher_reads_the_demonstration_in_the_prompt():
    codec = Codec()
    _, out = sdft([asked("q", demo=[5, 6, 3])], codec)
    assert codec.asked == ["q so: 5 6 3"]
    for row in out.rows:
        seen = row.at_view(VIEW)
        assert seen.tokens[:3].tolist() == [1, 2, 9]
        np.testing.assert_array_equal(seen.tokens[3:], row.tokens[row.response_start :])
        assert seen.trained.sum() == row.trained.sum(), "as many positions (section 3, 2)"


@pytest.mark.parametrize("form", ["divergence", "sampled"])
def test_rows_without_a_view_train_nothing_and_are_counted(form):
    groups = [
        asked("q", demo=[5, 6, 3], number=0),
        asked("too long", demo=[5, 6, 3], number=1),
        asked("q", number=2),
    ]
    method, out = sdft(groups, form=form)
    assert [bool(row.trained.any()) for row in out.rows] == [True, True] + [False] * 4
    assert out.denominators == {"policy": TOKENS}
    assert method.diagnostics(out.rows)["teacher/rows"] == pytest.approx(1 / 3)


def test_the_sampled_form_is_opd_at_the_view():
    _, out = sdft([asked("q", demo=[5, 6, 3])], form="sampled")
    np.testing.assert_array_equal(on_tokens(out), on_tokens(opd()))


def test_options_of_the_other_form_are_refused():
    for options in ({"rewards": True}, {"clip_d": 1.0}):
        with pytest.raises(ValueError, match="rewards and clip_d are for form sampled"):
            make_method("sdft", options)
    with pytest.raises(ValueError, match="form is 'both'"):
        make_method("sdft", {"form": "both"})
    with pytest.raises(ValueError, match=r"a text with \{hint\}"):
        make_method("sdft", {"template": "x"})


# -- what terms ask


def test_a_model_that_is_not_there_is_named():
    method = make_method("opd", {"teacher": "teachr"})
    terms = method.terms(batch())
    with pytest.raises(MethodError, match=r"'policy' asks for the model 'teachr' \(did you mean"):
        check_terms(method, terms, ("reference", "policy", "teacher"))
    assert check_terms(method, terms), "a budget made by hand knows no names"


def test_a_probe_looks_from_no_view():
    method = make_method("gkd", {})
    for model, words in (("teacher@x", "only a term"), ("other", "models.other is not set")):
        method.probes = lambda batch, model=model: {"far": Divergence(model, 0.0)}
        known = Budget(1, 1, 1, 1, models=("reference", "teacher"))
        with pytest.raises(MethodError, match=rf"probes\(\): 'far' .*{words}"):
            ask_probes(method, batch(budget=known))


def test_a_row_without_the_view_that_its_term_asks_for():
    method = make_method("gkd", {"teacher": f"reference@{VIEW}"})
    with pytest.raises(
        MethodError, match=r"row 0 .*'gkd' asks for .*the row has no view 'informed'"
    ):
        check_rows(method, method.rows(batch()), method.terms(batch()))


@pytest.mark.parametrize("view", [[1, 2], np.zeros(0, np.int32), np.array([1.5]), np.array([-1])])
def test_views_that_are_no_prompts(view):
    method = make_method("gkd", {})
    rows = [replace(row, views={"x": view}) for row in method.rows(batch())]
    with pytest.raises(MethodError, match=r"views\['x'\]"):
        check_rows(method, rows, method.terms(batch()))


def test_a_prompt_that_is_trained_has_no_view():
    row = policy_row(trajectory([1, 2], [5]), 0.0, "sft").with_term("sft", np.ones(3) - [1, 0, 0])
    with pytest.raises(CarrierError, match="a token of the prompt is trained"):
        replace(row, views={"x": np.array([7])}).at_view("x")


def test_another_terms_teacher_is_not_seen():
    """Rows outside the term that asked are not scored, so another would read NaN there."""
    from wrong_cases import look as look_at
    from wrong_cases import loss, with_terms

    ask = Term("again", NLL(), needs=frozenset({"logp:teacher"}))
    read = Term("sft", loss(lambda t: t.logp - t["logp:teacher"]))
    with pytest.raises(MethodError, match="term 'sft'"):
        look_at(with_terms(read, ask), models={"teacher": ids})
    with pytest.raises(ValueError, match=r"pass models=\{.teacher.: "):
        look_at(with_terms(ask, Term("sft", NLL())))
