"""Quantities of the full distribution equal a plain head's in values and gradients, keep their
identities, and never make a [tokens, vocabulary] tensor.
"""

from functools import partial

import pytest
import torch
from head_cases import LargestTensor, inputs
from torch.distributions import Categorical, kl_divergence

from tandem.engine.core.errors import MethodError
from tandem.engine.model.chunked_head import token_logprobs
from tandem.engine.model.drawn import DrawnReward, ExpectedReward
from tandem.engine.model.heads import Head
from tandem.engine.model.measured_head import HeadInputs, drawn_tokens, measure, top_tokens
from tandem.engine.model.quantities import Chunk, Divergence, Entropy, LogProbs, TopKDivergence

N, V, K = 13, 37, 4
TEACHER_HIDDEN = 9
FULL = [Divergence("teacher", beta) for beta in (0.0, 0.3, 0.5, 1.0)]
TOP = [TopKDivergence("top", "top_logp", beta) for beta in (0.0, 0.3, 1.0)]
DRAWN = [ExpectedReward(-0.3, 1.4), DrawnReward(-0.3, 1.4, samples=6)]
QUANTITIES = [LogProbs("target"), LogProbs("sampled"), Entropy(), *FULL, *TOP]
FORMS = [(1.0, 1.0, None), (0.7, 1.0, None), (0.7, 0.0625, None), (1.3, 1.0, 2.0), (0.7, 3.0, 0.5)]


def plain_log_p(hidden, weight, bias, temperature=1.0, scale=1.0, cap=None):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return (logits / temperature).log_softmax(-1)


def plain_divergence(log_p, log_q, beta):
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (q * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def plain_tail(log_p):
    return torch.cat([log_p, (1 - log_p.exp().sum(-1, keepdim=True)).log()], -1)


def plain(quantity, log_p, log_q, data):
    """The quantity from whole tensors of log-probs, for plain autograd."""
    if isinstance(quantity, LogProbs):
        ids = data[quantity.ids]
        return log_p.gather(-1, ids.view(len(ids), -1)).view(ids.shape)
    if quantity in DRAWN:
        weights = quantity.weights(Chunk(log_p.detach(), log_p, {}, data))
        return (weights * log_p).sum(-1)
    if isinstance(quantity, Entropy):
        return -(log_p.exp() * log_p).sum(-1)
    if isinstance(quantity, Divergence):
        return plain_divergence(log_p, log_q, quantity.beta)
    at_ids = log_p.gather(-1, data[quantity.ids])
    return plain_divergence(plain_tail(at_ids), plain_tail(data[quantity.logp]), quantity.beta)


def case(n=N, dtype=torch.float64, form=(1.0, 1.0, None), vocabulary=V, teacher_form=None):
    """(policy's hidden, weight, bias), teacher, its log-probs, data"""
    hidden, weight, bias, target = inputs(n=n, vocabulary=vocabulary, dtype=dtype)
    other, head, shift, _ = inputs(n, TEACHER_HIDDEN, vocabulary, dtype, seed=5)
    temperature, scale, cap = teacher_form or form
    teacher = HeadInputs(other.detach(), head.detach(), shift.detach(), temperature, scale, cap)
    log_q = plain_log_p(other, head, shift, temperature, scale, cap).detach()
    top = log_q.topk(K)
    sampled = torch.randint(vocabulary, (n, K), generator=torch.Generator().manual_seed(7))
    data = {"target": target, "sampled": sampled, "top": top.indices, "top_logp": top.values}
    data["draws"] = torch.arange(n).float()
    return (hidden, weight, bias), teacher, log_q, data


def asked(parameters, teacher, data, quantities, chunk=5, form=(1.0, 1.0, None)):
    temperature, scale, cap = form
    return measure(
        *parameters, quantities, data, {"teacher": teacher}, temperature, chunk, scale, cap
    )


def weighed(values):
    """One loss of all values, with other weights for each number."""
    loss = 0.0
    for seed, value in enumerate(values):
        generator = torch.Generator().manual_seed(seed)
        loss = loss + (torch.randn(value.shape, generator=generator).to(value) * value).sum()
    return loss


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("quantity", [*QUANTITIES, *DRAWN], ids=str)
def test_equals_plain_autograd(quantity, form):
    parameters, teacher, log_q, data = case(form=form)
    expected = plain(quantity, plain_log_p(*parameters, *form), log_q, data)
    wanted = torch.autograd.grad(weighed([expected]), parameters)
    for chunk in (1, 5, N, 1000):
        (found,) = asked(parameters, teacher, data, [quantity], chunk, form)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        gradients = torch.autograd.grad(weighed([found]), parameters)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
def test_gradcheck_without_bias(quantity):
    (hidden, weight, _), teacher, _, data = case(n=3)

    def value(hidden, weight):
        return asked((hidden, weight, None), teacher, data, [quantity], 2)

    assert torch.autograd.gradcheck(value, (hidden, weight))


@pytest.mark.parametrize("chunk", [5, 100])
def test_all_in_one_pass_equal_each_alone(chunk):
    parameters, teacher, _, data = case(form=(0.7, 1.0, 2.0))
    ask = partial(asked, parameters, teacher, data, chunk=chunk, form=(0.7, 1.0, 2.0))
    alone = [ask([quantity])[0] for quantity in QUANTITIES]
    together = ask(QUANTITIES)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
    one, other = (torch.autograd.grad(weighed(values), parameters) for values in (alone, together))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_quantities_that_are_not_in_the_loss_change_nothing():
    parameters, teacher, _, data = case()
    entropy, *_ = asked(parameters, teacher, data, [Entropy(), *FULL])
    (alone,) = asked(parameters, teacher, data, [Entropy()])
    one, other = (torch.autograd.grad(weighed([value]), parameters) for value in (entropy, alone))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_backward_twice_gives_the_same():
    """The kept chunk serves once; the second time it is computed again."""
    parameters, teacher, _, data = case()
    loss = weighed(asked(parameters, teacher, data, QUANTITIES))
    one, other = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_log_prob_and_entropy_equal_the_plain_head(dtype, form):
    parameters, teacher, _, data = case(dtype=dtype)
    temperature, scale, cap = form
    old = token_logprobs(*parameters, data["target"], temperature, 5, True, scale, cap)
    new = asked(parameters, teacher, data, [LogProbs("target"), Entropy()], 5, form)
    for a, b in zip(new, old, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    for pick in ([0], [1], [0, 1]):
        one, other = (
            torch.autograd.grad(weighed([values[i] for i in pick]), parameters, retain_graph=True)
            for values in (new, old)
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(
                a, b, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-5
            )


def test_values_of_torch_distributions():
    parameters, teacher, log_q, data = case()
    p, q = Categorical(logits=plain_log_p(*parameters)), Categorical(logits=log_q)
    m = Categorical(probs=0.3 * q.probs + 0.7 * p.probs)
    jsd = 0.3 * kl_divergence(q, m) + 0.7 * kl_divergence(p, m)
    quantities = [Entropy(), LogProbs("target"), *(Divergence("teacher", b) for b in (0, 0.3, 1))]
    found = asked(parameters, teacher, data, quantities)
    expected = (p.entropy(), p.log_prob(data["target"]), kl_divergence(q, p), jsd)
    torch.testing.assert_close(found, (*expected, kl_divergence(p, q)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_equal_to_the_policy_gives_no_loss_and_no_gradient(dtype):
    parameters, _, _, data = case(dtype=dtype)
    own = HeadInputs(*(t.detach() for t in parameters), temperature=0.7)
    data["top"], data["top_logp"] = top_tokens(*parameters, K, temperature=0.7)
    for value in asked(parameters, own, data, FULL + TOP, form=(0.7, 1.0, None)):
        assert value.abs().max() < 1e-6
        gradients = torch.autograd.grad(value.sum(), parameters, retain_graph=True)
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_ends_of_the_jsd():
    """JSD_b / b -> KL(teacher || policy), JSD_b / (1 - b) -> KL(policy || teacher), JSD_.5 <= ln 2.

    At the ends themselves the loss jumps to those limits.
    """
    parameters, teacher, log_q, data = case()
    betas = (0.0, 1e-8, 0.5, 1 - 1e-8, 1.0)
    divergences = [Divergence("teacher", beta) for beta in betas]
    forward, first, half, last, reverse = asked(parameters, teacher, data, divergences)
    torch.testing.assert_close(first / 1e-8, forward, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last / 1e-8, reverse, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(forward, plain_divergence(plain_log_p(*parameters), log_q, 0))
    assert (half <= torch.tensor(2.0).log()).all() and (half > 0).all()
    assert not torch.allclose(forward, reverse, rtol=0.01)


def test_reverse_kl_is_the_expected_score_function_gradient():
    """KL(p || q): grad = E_{y ~ p}[(log p - log q) grad log p(y)], here over all ids."""
    parameters, teacher, log_q, data = case()
    data["all"] = torch.arange(V).expand(N, V)
    log_p, kl = asked(parameters, teacher, data, [LogProbs("all"), Divergence("teacher", 1.0)])
    signal = (log_p.exp() * (log_p - log_q)).detach()
    one = torch.autograd.grad((signal * log_p).sum(), parameters, retain_graph=True)
    other = torch.autograd.grad(kl.sum(), parameters)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_estimators_differentiated_directly():
    """In expectation over y ~ p: k1 gives no gradient at all, k2 that of the reverse KL, k3 that of
    the forward KL.
    """
    parameters, teacher, log_q, data = case()
    data["all"] = torch.arange(V).expand(N, V)
    divergences = [Divergence("teacher", 0.0), Divergence("teacher", 1.0)]
    log_p, forward, reverse = asked(parameters, teacher, data, [LogProbs("all"), *divergences])
    p, ratio = log_p.detach().exp(), log_p - log_q
    k1, k2, k3 = ratio, ratio.square() / 2, (-ratio).exp() - 1 + ratio
    for estimator, divergence in ((k1, 0.0 * forward), (k2, reverse), (k3, forward)):
        one, other = (
            torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
            for loss in (p * estimator, divergence)
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_top_k_grows_with_k_to_the_full_divergence():
    form = (3.0, 1.0, None)  # flat, so that no tail is under the floor
    parameters, teacher, log_q, data = case(teacher_form=form)
    for beta in (0.0, 0.5, 1.0):
        (full,) = asked(parameters, teacher, data, [Divergence("teacher", beta)])
        before = torch.zeros(N, dtype=torch.float64)
        for k in (1, 2, 5, V - 1):
            data["top_logp"], data["top"] = log_q.topk(k)
            top = TopKDivergence("top", "top_logp", beta)
            (found,) = asked(parameters, teacher, data, [top])
            assert (found >= before - 1e-12).all() and (found <= full + 1e-12).all()
            assert k > 1 or (found > 1e-3).any()  # renormalised to one id it would be 0
            before = found.detach()
        torch.testing.assert_close(before, full, rtol=1e-9, atol=1e-11)
    data["top_logp"], data["top"] = log_q.topk(V)  # nothing is left for the tail
    (found,) = asked(parameters, teacher, data, [TopKDivergence("top", "top_logp", 0.0)])
    (full,) = asked(parameters, teacher, data, [Divergence("teacher", 0.0)])
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-6)


def test_descent_from_the_teacher_stays_at_it_with_a_tail():
    """Truncated sums would empty the top-k (reverse) or fill it (forward)."""
    log_q = torch.tensor([[-0.4, 1.1, 0.2, -0.8, 0.5]], dtype=torch.float64).log_softmax(-1)
    data = dict(zip(("top_logp", "top"), log_q.topk(2), strict=True))
    one = torch.ones(1, 1, dtype=torch.float64)
    for beta in (0.0, 1.0):
        weight = log_q.T.clone().requires_grad_()
        for _ in range(20):
            (loss,) = measure(one, weight, None, [TopKDivergence("top", "top_logp", beta)], data)
            (gradient,) = torch.autograd.grad(loss.sum(), weight)
            weight.data -= 0.5 * gradient
        torch.testing.assert_close(weight, log_q.T, rtol=0, atol=1e-12)


def test_each_model_has_its_own_scale_cap_and_temperature():
    form, teacher_form = (0.7, 1.0, 2.0), (1.3, 0.5, None)
    parameters, teacher, log_q, data = case(form=form, teacher_form=teacher_form)
    log_p = plain_log_p(*parameters, *form)
    for quantity, found in zip(
        FULL, asked(parameters, teacher, data, FULL, form=form), strict=True
    ):
        torch.testing.assert_close(found, plain(quantity, log_p, log_q, data))


@pytest.mark.parametrize("larger", ["policy", "teacher", "both"])
def test_ids_that_are_not_common_are_left_out(larger):
    """Rows that pad an embedding mean nothing; both distributions are normalised without them."""
    common = V if larger != "both" else V - 5
    parameters, *_, data = case(vocabulary=V if larger == "teacher" else V + 3)
    _, teacher, *_ = case(vocabulary=V if larger == "policy" else V + 3)
    with pytest.raises(MethodError, match=r"model 'teacher' has \d+ ids, but the policy has"):
        small = HeadInputs(teacher.hidden, teacher.weight[:-1])
        asked(parameters, small, data, FULL)
    teacher = HeadInputs(teacher.hidden, teacher.weight, teacher.bias, common=common)
    q = (teacher.hidden @ teacher.weight[:common].T + teacher.bias[:common]).log_softmax(-1)
    hidden, weight, bias = parameters
    p = (hidden @ weight[:common].T + bias[:common]).log_softmax(-1)
    for quantity, found in zip(FULL, asked(parameters, teacher, data, FULL), strict=True):
        expected = plain_divergence(p, q, quantity.beta)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        one, other = (
            torch.autograd.grad(value.square().sum(), parameters, retain_graph=True)
            for value in (found, expected)
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_no_gradient_flows_to_the_other_model():
    parameters, teacher, _, data = case()
    own = [t.clone().requires_grad_() for t in (teacher.hidden, teacher.weight, teacher.bias)]
    values = asked(parameters, HeadInputs(*own), data, FULL)
    weighed(values).backward()
    assert all(t.grad is None for t in own) and parameters[0].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantity", [*QUANTITIES, *DRAWN], ids=str)
def test_logits_are_never_whole(dtype, quantity):
    n, vocabulary, chunk = 64, 500, 4
    parameters, teacher, _, data = case(n=n, dtype=dtype, vocabulary=vocabulary)
    with LargestTensor() as chunked:
        (value,) = asked(parameters, teacher, data, [quantity], chunk)
        value.sum().backward()
    weight = teacher.weight if quantity.models else parameters[1]
    assert chunked.elements == max(chunk * vocabulary, weight.numel())
    assert chunked.elements < n * vocabulary


def test_no_tokens_stay_attached():
    parameters, teacher, _, data = case(n=0)
    values = asked(parameters, teacher, data, QUANTITIES)
    shapes = [(0, K) if q == LogProbs("sampled") else (0,) for q in QUANTITIES]
    assert [tuple(value.shape) for value in values] == shapes
    sum(value.sum() for value in values).backward()
    assert all(t.grad is not None and not t.grad.any() for t in parameters)
    assert [t.shape for t in top_tokens(*parameters, 3)] == [(0, 3), (0, 3)]


def test_frozen_parts_get_no_gradient():
    (hidden, weight, _), teacher, _, data = case()
    values = asked((hidden, weight.detach(), None), teacher, data, QUANTITIES)
    weighed(values).backward()
    assert hidden.grad.any() and weight.grad is None


def test_huge_logits_stay_finite():
    (hidden, weight, bias), teacher, _, data = case(dtype=torch.float32)
    teacher = HeadInputs(teacher.hidden * 1e3, teacher.weight, teacher.bias)
    values = asked((hidden * 1e3, weight, bias), teacher, data, QUANTITIES)
    weighed(values).backward()
    assert all(torch.isfinite(x).all() for x in (*values, hidden.grad, weight.grad, bias.grad))


@pytest.mark.parametrize("quantity", QUANTITIES, ids=str)
def test_bfloat16_is_summed_in_float32(quantity):
    """As near to exact arithmetic on the same bfloat16 numbers as their rounding allows."""
    (hidden, weight, _), teacher, _, data = case(n=256, dtype=torch.bfloat16)
    teacher = HeadInputs(teacher.hidden, teacher.weight)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    log_q = plain_log_p(teacher.hidden.double(), teacher.weight.double(), None)
    data["top_logp"] = log_q.gather(-1, data["top"])
    expected = plain(quantity, plain_log_p(*exact, None), log_q, data)
    wanted = torch.autograd.grad(expected.sum(), exact[1])[0]
    for chunk in (1, 256):
        (value,) = asked((hidden, weight, None), teacher, data, [quantity], chunk)
        assert value.dtype == torch.float32
        (found,) = torch.autograd.grad(value.sum(), weight)
        assert (value - expected).abs().mean() < 0.02
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_top_tokens():
    (hidden, weight, bias), *_ = case()
    log_p = plain_log_p(hidden, weight, bias, 0.7, 1.0, 2.0)
    for chunk in (1, 5, 1000):
        ids, logp = top_tokens(hidden, weight, bias, K, 0.7, chunk, 1.0, 2.0)
        assert torch.equal(ids, log_p.topk(K).indices) and not logp.requires_grad
        torch.testing.assert_close(logp, log_p.topk(K).values)


def test_drawn_tokens_follow_the_distribution_and_their_own_numbers():
    (hidden, weight, bias), *_ = case(n=2, dtype=torch.float32, vocabulary=5)
    uniform = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(0))
    ids, logp = drawn_tokens(hidden, weight, bias, uniform, 2.0, 1)
    log_p = plain_log_p(hidden, weight, bias, 2.0)
    shares = torch.stack([row.bincount(minlength=5) for row in ids]) / 50_000
    assert (shares - log_p.exp()).abs().max() < 0.01
    torch.testing.assert_close(logp, log_p.gather(-1, ids))
    again, _ = drawn_tokens(hidden[1:], weight, bias, uniform[1:], 2.0)
    assert torch.equal(again, ids[1:])  # whatever tokens are beside it
    edges, _ = drawn_tokens(hidden, weight, bias, torch.tensor([[0.0, 1 - 2**-24]] * 2))
    assert torch.equal(edges, torch.tensor([[0, 4]] * 2))


def test_head_module_hands_over_its_parameters():
    output = torch.nn.Linear(6, V).double()
    head = Head(output, scale=0.5, cap=2.0)
    (hidden, *_), teacher, log_q, data = case()
    log_p = plain_log_p(hidden, output.weight, output.bias, 0.7, 0.5, 2.0)
    ask = partial(measure, quantities=QUANTITIES, data=data, others={"teacher": teacher})
    for quantity, found in zip(QUANTITIES, head(hidden, None, 0.7, 5, ask=ask), strict=True):
        torch.testing.assert_close(found, plain(quantity, log_p, log_q, data))
    ids, _ = head(hidden, None, 0.7, 5, ask=partial(top_tokens, k=3))
    assert torch.equal(ids, log_p.topk(3).indices)


def test_what_does_not_fit_is_refused():
    parameters, teacher, _, data = case()
    with pytest.raises(MethodError, match="needs model 'judge'; given: teacher"):
        asked(parameters, teacher, data, [Divergence("judge", 0.0)])
    with pytest.raises(
        MethodError, match=r"LogProbs\(ids='drawn'.*needs data .drawn.; given: draws, sa"
    ):
        asked(parameters, teacher, data, [LogProbs("drawn")])
    with pytest.raises(MethodError, match="'target' has 12 tokens, but the policy has 13"):
        asked(parameters, teacher, data | {"target": data["target"][1:]}, [LogProbs("target")])
    short = HeadInputs(teacher.hidden[1:], teacher.weight)
    with pytest.raises(MethodError, match="'teacher' has 12 tokens, but the policy has 13"):
        asked(parameters, short, data, FULL)
    wrong = HeadInputs(teacher.hidden, teacher.weight, common=V + 1)
    with pytest.raises(MethodError, match=r"common=38, expected 1 to 37"):
        asked(parameters, wrong, data, FULL)
    with pytest.raises(MethodError, match=r"beta is 1\.5, expected a number from 0"):
        Divergence("teacher", 1.5)
