"""Models beside the policy, and views: scores and divergences against plain transformers on each
row alone, in any packing, over steps and resumes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import make_plan
from model_cases import ROWS, SFT, SPEC, config_of, measured

from tandem.algorithms.base import quantities_of
from tandem.engine.config.names import logp_of
from tandem.engine.config.schema import OtherModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.inline import InlineLearner
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.models import on_device
from tandem.engine.learner.packing import pack
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.learner.terms import denominators, make_tokens, micro_batch_loss
from tandem.engine.loop.streams import with_streams
from tandem.engine.model.policy import hf_parameters
from tandem.engine.model.tiny import make_tiny


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("start", "teacher", "other")):
        make_tiny(folder / name, hidden=32, layers=2, seed=seed)
    return {name: str(folder / name) for name in ("start", "teacher", "other")}


def make_rank(paths, **models) -> LearnerRank:
    config = config_of(paths["start"], models)
    policy = build_policy(config, paths["start"], SPEC)
    return LearnerRank(config, paths["start"], SPEC, LocalEngine(policy, config.learner))


def path(folder):
    return OtherModelConfig(path=folder)


def plain_logits(model, row):
    """float32 [n, V] that predict the trained tokens of the row."""
    ids = torch.as_tensor(row.tokens).long()[None]
    start = row.response_start
    return model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)


def plain_logp(model, row):
    """float32 [T]: of the row's response."""
    found = np.full(len(row.tokens), np.nan, np.float32)
    target = torch.as_tensor(row.tokens[row.response_start :]).long()[:, None]
    with torch.no_grad():
        found[row.response_start :] = plain_logits(model, row).gather(-1, target)[:, 0]
    return found


def same(left, right):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right, strict=True))


def scores(rank, stream, rows=ROWS):
    term = replace(SFT, needs=frozenset({stream}))
    found = with_streams(InlineLearner(rank), rows, [term], 1.0)
    return [row.streams[stream] for row in found]


# -- sampled log-probs


@pytest.mark.parametrize("view", ["", "@informed"])
def test_scores_are_those_of_the_model_on_the_row_alone(paths, view):
    """View positions are those that predict response tokens: one off would be another token's."""
    rank = make_rank(paths, teacher=path(paths["teacher"]))
    found = scores(rank, logp_of(f"teacher{view}"))
    model = rank.models.weights_of("teacher").model
    for row, stream in zip(ROWS, found, strict=True):
        seen = row.at_view("informed") if view else row
        expected = plain_logp(model, seen)[seen.response_start :]
        assert len(stream) == len(row.tokens) and np.isnan(stream[: row.response_start]).all()
        np.testing.assert_allclose(stream[row.response_start :], expected, atol=2e-5)


def test_a_view_that_is_the_prompt_changes_nothing(paths):
    rank = make_rank(paths, teacher=path(paths["teacher"]))
    rows = [replace(row, views={"informed": row.tokens[: row.response_start]}) for row in ROWS]
    at_view = scores(rank, "logp:teacher@informed", rows)
    assert same(at_view, scores(rank, "logp:teacher", rows))


def test_kinds_of_models(paths):
    """At first all but another path are the policy; after a step the frozen ones stay, the live one
    goes along.
    """
    rank = make_rank(
        paths,
        teacher=path(paths["teacher"]),
        start=OtherModelConfig(kind="initial"),
        live=OtherModelConfig(kind="policy"),
    )
    names = ("reference", "policy", "start", "live", "teacher")
    before = {name: rank.logprobs(ROWS, 1.0, name) for name in names}
    for name in names[:4]:
        assert same(before[name], before["policy"]), name
    assert not same(before["teacher"], before["policy"])
    rank.step(make_plan(ROWS, terms=[SFT]))
    after = {name: rank.logprobs(ROWS, 1.0, name) for name in names}
    for name in ("reference", "start", "teacher"):
        assert same(after[name], before[name]), name
    assert same(after["live"], after["policy"]) and not same(after["live"], before["live"])
    rank.set_reference()
    assert same(rank.logprobs(ROWS, 1.0, "reference"), after["policy"])
    assert same(rank.logprobs(ROWS, 1.0, "start"), before["start"]), "they parted"


def test_two_teachers_that_change_places_change_their_rows_alone(paths):
    """Section 1 (4) of the notes on distillation."""
    first = make_rank(paths, a=path(paths["teacher"]), b=path(paths["other"]))
    second = make_rank(paths, a=path(paths["other"]), b=path(paths["teacher"]))
    assert same(scores(first, "logp:a"), scores(second, "logp:b"))
    assert not same(scores(first, "logp:a"), scores(second, "logp:a"))


# -- the whole distribution


def gradient(rank, term, rows=ROWS, budget=10_000, ranks=1, share=False):
    """(loss, {parameter: gradient}) of one step."""
    z = denominators([term], rows)
    policy = rank.engine.module
    policy.zero_grad(set_to_none=True)
    total = 0.0
    for micro_batches in pack(rows, [term], ranks, budget, version=0, share_prompts=share):
        for micro in micro_batches:
            found = rank.run_micro_batch(
                rank.engine.forward, micro, 1.0, quantities=quantities_of([term])
            )
            value, _ = micro_batch_loss([term], z, micro, make_tokens(micro, found))
            value.backward()
            total += value.item()
    return total, {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=atol, msg=name)


def plain_divergence(log_p, log_q, beta):
    log_m = {0.0: log_p, 1.0: log_q}.get(beta)
    if log_m is None:
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    to_m = [(log.exp() * (log - log_m)).sum(-1) for log in (log_q, log_p)]
    if beta in (0.0, 1.0):
        return sum(to_m)
    return beta * to_m[0] + (1 - beta) * to_m[1]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergence_at_a_view_against_plain_autograd(paths, beta):
    """And it does not depend on bins, micro-batches, ranks or shared prompts."""
    rank = make_rank(paths, teacher=path(paths["teacher"]))
    policy = rank.engine.module
    teacher = rank.models.weights_of("teacher").model
    parts = []
    policy.zero_grad(set_to_none=True)
    for row in ROWS:
        with torch.no_grad():
            log_q = plain_logits(teacher, row.at_view("informed"))
        parts.append(plain_divergence(plain_logits(policy.model, row), log_q, beta))
    loss = torch.cat(parts).mean()
    loss.backward()
    expected = loss.item(), {name: p.grad.clone() for name, p in policy.named_parameters()}
    term = measured("teacher@informed", beta)
    assert_close(gradient(rank, term), expected)
    assert_close(gradient(rank, term, budget=9), expected)
    assert_close(gradient(rank, term, ranks=2), expected)
    assert_close(gradient(rank, term, share=True), expected)
    assert all(p.grad is None for p in teacher.parameters()), "none reaches the view"


@pytest.mark.parametrize("model", ["reference", "policy", "policy@informed"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_model_that_is_the_policy_has_divergence_and_gradient_0(paths, model, beta):
    """Section 3 (1): also behind a view that is the prompt itself."""
    rank = make_rank(paths)
    rows = [replace(row, views={"informed": row.tokens[: row.response_start]}) for row in ROWS]
    loss, grads = gradient(rank, measured(model, beta), rows)
    assert abs(loss) < 1e-6
    assert max(grad.abs().max() for grad in grads.values()) < 1e-6


def test_trap_6_rows_that_pad_a_teachers_embedding_are_left_out(paths, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(paths["teacher"])
    model.resize_token_embeddings(len(model.lm_head.weight) + 7, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-7:] = 9.0
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(paths["teacher"]).save_pretrained(tmp_path / "padded")
    plain = make_rank(paths, teacher=path(paths["teacher"]))
    padded = make_rank(paths, teacher=path(str(tmp_path / "padded")))
    term = measured("teacher", 0.5)
    assert_close(gradient(padded, term), gradient(plain, term))


# -- moving averages


def average_of(rank, name="slow"):
    parameters = hf_parameters(rank.models.weights_of(name))
    return {key: value.detach().clone() for key, value in parameters}


def test_an_average_by_hand_and_over_a_resume(paths, tmp_path):
    slow = OtherModelConfig(kind="ema", rate=0.25)
    fast = OtherModelConfig(kind="ema", rate=1.0)
    rank = make_rank(paths, slow=slow, fast=fast)
    expected = average_of(rank)
    for _ in range(2):
        rank.step(make_plan(ROWS, terms=[SFT]))
        for key, now in hf_parameters(rank.engine.module):
            expected[key] = 0.75 * expected[key] + 0.25 * now.detach()
    for key, value in average_of(rank).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
    live = dict(hf_parameters(rank.engine.module))
    assert all(torch.equal(value, live[key]) for key, value in average_of(rank, "fast").items())
    rank.save(tmp_path / "ck")
    resumed = make_rank(paths, slow=slow, fast=fast)
    resumed.load(tmp_path / "ck")
    for one in (rank, resumed):
        one.step(make_plan(ROWS, terms=[SFT]))
    assert same(rank.logprobs(ROWS, 1.0, "slow"), resumed.logprobs(ROWS, 1.0, "slow"))
    with pytest.raises(ConfigError, match=r"no average_other.safetensors, .* models.other is"):
        make_rank(paths, other=slow).load(tmp_path / "ck")


def test_a_skipped_step_moves_no_average(paths):
    rank = make_rank(paths, slow=OtherModelConfig(kind="ema", rate=0.5))
    before = average_of(rank)
    rank.step(make_plan(ROWS, terms=[SFT]))
    moved = average_of(rank)
    assert any(not torch.equal(value, moved[key]) for key, value in before.items())
    infinite = [row.with_term("sft", row.weights["sft"] * np.float32(1e38)) for row in ROWS]
    report = rank.step(make_plan(infinite, terms=[SFT]))
    assert report.skipped
    assert all(torch.equal(value, moved[key]) for key, value in average_of(rank).items())


def test_a_model_that_waits_in_cpu_memory_is_on_the_device_while_it_is_asked(paths, monkeypatch):
    """A copy stands for the GPU. Where the device is the CPU nothing is copied."""
    rank = make_rank(paths, teacher=path(paths["teacher"]))
    policy = rank.models.weights_of("teacher")
    cpu = torch.device("cpu")

    def places():
        return [p.data_ptr() for p in policy.parameters()]

    waiting, head = places(), policy.head.weight.clone()
    with on_device(policy, cpu):
        assert places() == waiting
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *device: tensor.clone())
    with on_device(policy, cpu):
        assert set(places()).isdisjoint(waiting)
        kept = policy.head.weight.detach()
    assert places() == waiting and kept.data_ptr() not in waiting
    assert torch.equal(kept, head), "what backward reads stays"


def test_models_that_nobody_names_cost_nothing(paths):
    assert make_rank(paths).models.loaded == {}
