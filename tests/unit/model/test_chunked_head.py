"""The chunked head equals a plain head in values and gradients, and never makes a [tokens,
vocabulary] tensor.
"""

import pytest
import torch
from head_cases import LargestTensor, inputs

from tandem.engine.model.chunked_head import token_logprobs


def plain(hidden, weight, bias, target, temperature, scale=1.0, cap=None):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, target[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
@pytest.mark.parametrize("entropy", [False, True])
def test_equals_plain_head_in_values_and_gradients(chunk, entropy):
    hidden, weight, bias, target = inputs()
    generator = torch.Generator().manual_seed(1)
    up, up_entropy = torch.randn(13, generator=generator), torch.randn(13, generator=generator)
    expected = plain(hidden, weight, bias, target, 0.7)
    found = token_logprobs(hidden, weight, bias, target, 0.7, chunk, entropy)
    assert (found[1] is not None) == entropy
    results = []
    for logp, ent in (expected, found):
        loss = (up * logp).sum() + ((up_entropy * ent).sum() if entropy else 0.0)
        results.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    if entropy:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pick", ["both", "logp", "entropy", "no bias"])
def test_gradcheck(pick):
    hidden, weight, bias, target = inputs(n=5, hidden=3, vocabulary=7, dtype=torch.float64)
    if pick == "no bias":
        assert torch.autograd.gradcheck(
            lambda h, w: token_logprobs(h, w, None, target, 0.7, 2, True), (hidden, weight)
        )
        return
    choose = {
        "both": lambda pair: pair,
        "logp": lambda pair: pair[0],
        "entropy": lambda pair: pair[1],
    }[pick]
    assert torch.autograd.gradcheck(
        lambda h, w, b: choose(token_logprobs(h, w, b, target, 0.7, 2, True)),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("scale, cap", [(0.0625, None), (1.0, 2.0), (3.0, 0.5)])
@pytest.mark.parametrize("chunk", [2, 100])
def test_scaled_and_capped_logits(scale, cap, chunk):
    hidden, weight, bias, target = inputs(n=5, hidden=3, vocabulary=7, dtype=torch.float64)
    expected = plain(hidden, weight, bias, target, 0.7, scale, cap)
    found = token_logprobs(hidden, weight, bias, target, 0.7, chunk, True, scale, cap)
    for up in ((1.0, 0.0), (0.0, 1.0), (0.6, -0.3)):
        results = []
        for logp, entropy in (expected, found):
            loss = up[0] * logp.square().sum() + up[1] * entropy.square().sum()
            results.append(torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True))
            found = token_logprobs(hidden, weight, bias, target, 0.7, chunk, True, scale, cap)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    without_entropy, none = token_logprobs(
        hidden, weight, bias, target, 0.7, chunk, False, scale, cap
    )
    torch.testing.assert_close(without_entropy, expected[0], rtol=1e-10, atol=1e-12)
    assert none is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype):
    n, vocabulary, chunk = 64, 500, 4
    hidden, weight, bias, target = inputs(n=n, hidden=6, vocabulary=vocabulary, dtype=dtype)
    with LargestTensor() as chunked:
        logp, entropy = token_logprobs(hidden, weight, bias, target, 1.0, chunk, True)
        (logp.sum() + entropy.sum()).backward()
    with LargestTensor() as whole:
        logp, entropy = plain(hidden, weight, bias, target, 1.0)
        (logp.sum() + entropy.sum()).backward()
    assert whole.elements >= n * vocabulary
    assert chunked.elements == max(chunk * vocabulary, weight.numel())


def test_no_tokens_stay_attached():
    hidden, weight, bias, target = inputs(n=0)
    logp, entropy = token_logprobs(hidden, weight, bias, target, 1.0, 8, True)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert all(t.grad is not None and not t.grad.any() for t in (hidden, weight, bias))


def test_frozen_parts_get_no_gradient():
    hidden, weight, _bias, target = inputs()
    logp, _ = token_logprobs(hidden, weight.detach(), None, target, 1.0, 4, False)
    logp.sum().backward()
    (expected,) = torch.autograd.grad(plain(hidden, weight, None, target, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-5)


def test_huge_logits_stay_finite():
    hidden, weight, bias, target = inputs()
    logp, entropy = token_logprobs(hidden * 1e4, weight, bias, target, 1.0, 4, True)
    (logp.sum() + entropy.sum()).backward()
    assert all(
        torch.isfinite(x).all() for x in (logp, entropy, hidden.grad, weight.grad, bias.grad)
    )


def test_bfloat16_softmax_and_weight_gradient_are_summed_in_float32():
    """The result is as near to exact arithmetic on the same bfloat16 numbers as their rounding
    allows, and does not drift with more chunks.
    """
    hidden, weight, _, target = inputs(n=512, hidden=16, vocabulary=64, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected, _ = plain(*exact, None, target, 1.0)
    expected.sum().backward()
    # of the target's logit and of the log-sum, 8 bits each
    rounding = 2 * (exact[0] @ exact[1].T).detach().abs().max().item() / 2**9
    for chunk in (1, 512):
        hidden.grad = weight.grad = None
        logp, _ = token_logprobs(hidden, weight, None, target, 1.0, chunk, False)
        assert logp.dtype == torch.float32
        logp.sum().backward()
        assert weight.grad.dtype == torch.bfloat16
        error = (weight.grad.double() - exact[1].grad).norm() / exact[1].grad.norm()
        assert (logp - expected).abs().max() <= rounding and error < 0.005
