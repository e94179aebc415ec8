"""Terms that ask for quantities of the full distribution: anchored SFT and one-token rollout, rows
16 and 6 of the catalogue, against plain autograd over all logits and in any packing.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from wrong_cases import look, loss, with_row, with_terms

from tandem.algorithms.base import Batch, Budget, Term, quantities_of
from tandem.algorithms.parts.objectives.anchored import KL, Anchored
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.one_token import REWARD, OneTokenRollout
from tandem.algorithms.registry import configured, make_method
from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.core.errors import MethodError
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.packing import pack
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.learner.terms import denominators, make_tokens, micro_batch_loss
from tandem.engine.model.drawn import DrawnReward, uniform
from tandem.engine.model.measured_head import measure
from tandem.engine.model.quantities import Chunk, Divergence, LogProbs, TopKDivergence
from tandem.launch.run.sides import policy_spec

EXPERTS = tuple(
    trajectory([1, 9], list(range(20, 20 + n)), expert=True, prompt_id=f"p{n}") for n in (3, 7, 5)
)
BATCH = Batch(3, (), EXPERTS, budget=Budget(0, 0, 3, 10, seed=5))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=2))


def make_rank(model_path, moved=True):
    """A rank whose policy has moved away from its reference, or not yet."""
    config = Config(
        model=ModelConfig(path=model_path),
        learner=LearnerConfig(head_chunk=4),
        method={"name": "sft"},
    )
    spec = policy_spec(configured(config.method))
    rank = LearnerRank(
        config,
        model_path,
        spec,
        LocalEngine(build_policy(config, model_path, spec), config.learner),
    )
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in rank.engine.module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return rank


def gradient(rank, demos, budget=10_000, ranks=1):
    """(loss, gradient by parameter) of one step of SFT with this objective, in micro-batches."""
    method = make_method("sft", {"demos": demos})
    terms = method.terms(BATCH)
    rows = method.credit(method.rows(BATCH), BATCH)
    z = denominators(terms, rows)
    policy = rank.engine.module
    policy.zero_grad(set_to_none=True)
    total = 0.0
    for micro_batches in pack(rows, terms, ranks, budget, version=0):
        for micro in micro_batches:
            found = rank.run_micro_batch(
                rank.engine.forward, micro, 1.0, quantities=quantities_of(terms)
            )
            value, _ = micro_batch_loss(terms, z, micro, make_tokens(micro, found))
            value.backward()
            total += value.item()
    return total, {name: p.grad.clone() for name, p in policy.named_parameters()}


def by_autograd(rank, token_loss):
    """The same with `token_loss(log_p [T, V], log_q [T, V], target [T])` on each row alone."""
    policy, reference = rank.engine.module, rank.models.weights_of("reference")
    policy.zero_grad(set_to_none=True)
    parts = []
    for expert in EXPERTS:
        ids = torch.as_tensor(expert.tokens).long()[None]
        log_p = policy.model(input_ids=ids).logits[0, 1:-1].log_softmax(-1)
        with torch.no_grad():
            log_q = reference.model(input_ids=ids).logits[0, 1:-1].log_softmax(-1)
        parts.append(token_loss(log_p, log_q, ids[0, 2:]))
    total = torch.cat(parts).mean()
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=rtol, atol=atol, msg=name)


def of_target(log_p, target):
    return log_p.gather(-1, target[:, None]).squeeze(-1)


def dft(log_p, log_q, target):
    logp = of_target(log_p, target)
    return -logp.detach().exp() * logp


def one_token(beta, kappa):
    def loss(log_p, log_q, target):
        drawn = (log_p.detach() / kappa).softmax(-1)
        reward = torch.full_like(log_p, beta).scatter(-1, target[:, None], 1.0)
        return -(drawn * reward * log_p).sum(-1)

    return loss


@pytest.mark.parametrize("weight", ["p", "one"])
def test_anchored_is_its_formula_in_any_packing(model_path, weight):
    def token_loss(log_p, log_q, target):
        likelihood = dft(log_p, log_q, target) if weight == "p" else -of_target(log_p, target)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        return likelihood + 0.3 * kl

    rank = make_rank(model_path)
    demos = {"objective": "anchored", "options": {"coefficient": 0.3, "weight": weight}}
    expected = by_autograd(rank, token_loss)
    for budget, ranks in ((10_000, 1), (9, 1), (12, 2)):
        assert_close(gradient(rank, demos, budget, ranks), expected)


def test_anchored_at_the_reference_is_dft(model_path):
    """Row 16: at theta = ref the KL and its gradient are 0; coefficient 0 asks for nothing."""
    rank = make_rank(model_path, moved=False)
    anchored = gradient(rank, {"objective": "anchored", "options": {"coefficient": 5.0}})
    assert_close(anchored, by_autograd(rank, dft), atol=1e-6)
    assert Anchored(coefficient=0.0).quantities == {}


def test_one_token_exact_is_its_formula_in_any_packing(model_path):
    rank = make_rank(model_path)
    demos = {"objective": "one_token", "options": {"mode": "exact", "beta": -0.2, "kappa": 1.4}}
    expected = by_autograd(rank, one_token(-0.2, 1.4))
    for budget in (10_000, 9):
        assert_close(gradient(rank, demos, budget), expected)


def test_one_token_at_kappa_1_is_dft_times_one_minus_beta(model_path):
    """Row 6, exact enumeration; only the gradients agree, not the losses."""
    rank = make_rank(model_path)
    demos = {"objective": "one_token", "options": {"mode": "exact", "beta": -0.25, "kappa": 1.0}}
    _, found = gradient(rank, demos)
    _, expected = by_autograd(rank, dft)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], 1.25 * grad, rtol=1e-3, atol=1e-6)


def test_draws_do_not_depend_on_the_packing(model_path):
    rank = make_rank(model_path)
    demos = {"objective": "one_token", "options": {"samples": 7}}
    whole = gradient(rank, demos)
    assert_close(gradient(rank, demos, budget=9), whole)
    again = gradient(rank, demos)
    assert again[0] == whole[0], "the same step draws the same"


def chunk(logits, seeds, target):
    log_p = logits.log_softmax(-1)
    data = {"target": target, "draws": seeds}
    return Chunk(log_p, logits.logsumexp(-1, keepdim=True), {}, data)


def test_the_mean_over_many_draws_is_the_expectation():
    """Row 6: the sampled mode's mean over many seeds goes to the exact mode."""
    torch.manual_seed(0)
    logits = torch.randn(1, 8, dtype=torch.float64)
    target = torch.tensor([3]).expand(4096)
    seeds = torch.arange(4096).float()
    drawn = DrawnReward(beta=-0.5, kappa=1.5, samples=16)
    found = drawn.value(chunk(logits.expand(4096, 8), seeds, target))
    exact = -one_token(-0.5, 1.5)(logits.log_softmax(-1), None, target[:1])
    assert found.mean().item() == pytest.approx(exact.item(), abs=4 * found.std().item() / 64)
    numbers = uniform(seeds, 16)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.1
    assert len(torch.unique(numbers)) > 0.99 * numbers.numel()


def test_a_target_that_is_never_drawn_trains_nothing_at_beta_0():
    logits = torch.zeros(2, 5, dtype=torch.float64)
    logits[:, 2] = -80.0
    drawn = DrawnReward(beta=0.0, kappa=1.0, samples=4)
    here = chunk(logits, torch.tensor([1.0, 2.0]), torch.tensor([2, 2]))
    assert drawn.value(here).tolist() == [0.0, 0.0]
    assert not drawn.slope(here, None, torch.ones(2)).any()


def test_slopes_are_those_of_autograd():
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    target = torch.arange(6)
    here = chunk(logits, torch.arange(6).float(), target)
    drawn = DrawnReward(beta=-0.1, kappa=1.3, samples=5)
    weights = drawn.weights(here).detach()
    grad = torch.linspace(-1, 2, 6, dtype=torch.float64)
    (grad * (weights * here.log_p).sum(-1)).sum().backward()
    found = drawn.slope(here, None, grad)
    torch.testing.assert_close(found.detach(), logits.grad)
    assert weights.sum(-1).max() <= 1.0 and (weights[:, 5] == 0).any()


def test_tokens_without_a_seed_draw_as_from_0():
    seeds = torch.tensor([0.0, float("nan")])
    numbers = uniform(seeds, 5)
    assert torch.equal(numbers[0], numbers[1])


def at_ids(ids, quantity=None):
    """LogProbs at the ids of a stream, of a policy with 6 ids."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3), torch.randn(6, 3)
    data = {"ids": ids, "logp": torch.zeros(2)}
    (found,) = measure(hidden, weight, None, [quantity or LogProbs("ids")], data)
    return found


def test_log_probs_at_the_ids_of_a_stream():
    expected = at_ids(torch.tensor([5, 0]))
    assert torch.equal(at_ids(torch.tensor([5.0, 0.0])), expected)
    assert torch.equal(at_ids(torch.tensor([5.0, float("nan")])), expected), "of no row's: id 0"
    assert at_ids(torch.tensor([[5.0, 1.0], [2.0, 0.0]])).shape == (2, 2)


@pytest.mark.parametrize("wrong", [6.0, -1.0, 1.5, float("inf")])
def test_streams_that_are_no_ids(wrong):
    with pytest.raises(MethodError, match=r"'ids' is .* expected token ids: .* from 0 to 5"):
        at_ids(torch.tensor([5.0, wrong]))


def test_a_top_k_of_a_stream_of_rows():
    with pytest.raises(MethodError, match=r"has shape \[2\].*expected \[tokens, k\]"):
        at_ids(torch.tensor([5.0, 1.0]), TopKDivergence("ids", "logp", 0.0))


AGAIN = Term("again", NLL())
KL_TERM = Term(
    "sft", loss(lambda t: -t.logp + t["kl"]), quantities={"kl": Divergence("reference", 0.0)}
)


def test_a_hand_made_term_sees_its_quantity_and_no_other_does():
    out = look(with_terms(KL_TERM, AGAIN), extra={"kl": lambda row: np.full(len(row.tokens), 2.0)})
    count = sum(int(row.trained.sum()) for row in out.rows)
    for row, found in zip(out.rows, out.extra_gradients["kl"], strict=True):
        np.testing.assert_allclose(found, row.trained / count, rtol=1e-6)
    sneak = replace(KL_TERM, name="again", quantities={})
    with pytest.raises(MethodError, match=r"(?s)term 'again'.*no token has 'kl'"):
        look(with_terms(KL_TERM, sneak))


@pytest.mark.parametrize(
    "terms, words",
    [
        ([replace(KL_TERM, quantities=[1]), AGAIN], "quantities are a list, expected a mapping"),
        ([replace(KL_TERM, quantities={"kl": Divergence}), AGAIN], "is the class Divergence"),
        ([replace(KL_TERM, quantities={"kl": NLL()}), AGAIN], "is a NLL, expected a Quantity"),
        (
            [replace(KL_TERM, quantities={"entropy": Divergence("reference", 0.0)}), AGAIN],
            "'entropy': tokens have something else of that name",
        ),
        (
            [KL_TERM, replace(AGAIN, quantities={"kl": Divergence("reference", 1.0)})],
            "by the same name; give them two names",
        ),
        (
            [replace(KL_TERM, quantities={"kl": DrawnReward(0.0, 1.0, 4)}), AGAIN],
            "needs 'draws', which the row lacks",
        ),
    ],
)
def test_quantities_that_cannot_be(terms, words):
    with pytest.raises(MethodError, match=f"method Wrong.*{words}"):
        look(with_terms(*terms))


def test_a_stream_and_a_quantity_of_one_name():
    method = with_row(lambda r: r.with_streams(kl=1.0))
    method.terms = lambda batch: [KL_TERM, AGAIN]
    with pytest.raises(MethodError, match=r"row 0 .*a stream 'kl', which a term has as the name"):
        look(method)


@pytest.mark.parametrize(
    "objective, options",
    [
        ("anchored", {"coefficient": -1}),
        ("anchored", {"weight": "two"}),
        ("one_token", {"samples": 0}),
        ("one_token", {"kappa": 0.0}),
        ("one_token", {"mode": "exakt"}),
    ],
)
def test_options_that_cannot_be(objective, options):
    with pytest.raises(ValueError, match=rf"objective {objective}: {next(iter(options))} is"):
        make_method("sft", {"demos": {"objective": objective, "options": options}})


def test_names_of_what_is_asked():
    assert set(Anchored().quantities) == {KL} and set(OneTokenRollout().quantities) == {REWARD}
