"""The objectives of demonstrations, by hand and by the tests of the methods catalogue, whose rows
are named.
"""

import math

import numpy as np
import pytest
import torch
from method_cases import EXPERTS, look, ramp

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.objectives.cleaned import Cleaned
from tandem.algorithms.parts.objectives.importance import ImportanceWeighted
from tandem.algorithms.parts.objectives.likelihood import DFT, Power, Thresholded
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.talr import TALR
from tandem.algorithms.parts.objectives.tokens import Before, Tokens
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Source


def tokens(p, segment=None, **streams) -> Tokens:
    """Demonstration tokens of these probabilities."""
    logp = torch.tensor(np.log(p), dtype=torch.float32).requires_grad_()
    zeros = torch.zeros(len(logp), dtype=torch.int64)
    segment = zeros if segment is None else torch.tensor(segment)
    streams = {name: torch.tensor(x, dtype=torch.float32) for name, x in streams.items()}
    return Tokens(logp, segment, zeros, zeros.to(torch.int8), streams)


def before(p, ref=None) -> Before:
    """A row's tokens of these probabilities before the update."""
    logp = np.log(np.asarray(p, np.float32))
    return Before(logp, None if ref is None else np.log(np.asarray(ref, np.float32)))


def pushes(objective, t: Tokens) -> np.ndarray:
    """What each token weighs on grad log p."""
    objective(t)[0].sum().backward()
    return -t.logp.grad.numpy()


def logit_gradients(loss_of_logp, logits) -> torch.Tensor:
    """[n, V]: the gradient with which token 0 is trained at n positions."""
    z = logits.clone().requires_grad_()
    loss_of_logp(z.log_softmax(-1)[:, 0]).sum().backward()
    return z.grad


def of(objective):
    """The objective as a function of log p alone."""

    def loss(logp):
        zeros = torch.zeros(len(logp), dtype=torch.int64)
        return objective(Tokens(logp, zeros, zeros, zeros.to(torch.int8)))[0]

    return loss


def logits(seed=0):
    return 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def sft(objective, **options):
    """What SFT with this objective makes of two demonstrations, under `ramp`."""
    demos = {"objective": objective, "options": options}
    return look(make_method("sft", {"demos": demos}), Batch(0, (), EXPERTS), ramp)


def test_dft_has_the_gradient_of_minus_p():
    """Row DFT: exactly, in logit space; a token with p -> 0 gets none, while cross-entropy's stays
    near 1.
    """
    z = logits()
    z[0] = torch.tensor([-20.0, 0, 0, 0, 0])
    ours = logit_gradients(of(DFT()), z)
    torch.testing.assert_close(ours, logit_gradients(lambda logp: -logp.exp(), z))
    assert ours[0].abs().max() < 1e-7
    assert logit_gradients(of(NLL()), z)[0].abs().max() > 0.99


@pytest.mark.parametrize("alpha", [1e-6, 0.5, 1.0, 2.0, 10.0])
def test_a_power_of_p_weighs_p_to_the_alpha(alpha):
    """Row 3: the gradient is p^alpha times cross-entropy's; alpha 1 is DFT's; alpha 1e-6 agrees
    with NLL to 1e-5.
    """
    z = logits()
    p = z.softmax(-1)[:, :1]
    ours, nll = logit_gradients(of(Power(alpha)), z), logit_gradients(of(NLL()), z)
    torch.testing.assert_close(ours, p**alpha * nll)
    if alpha == 1.0:
        torch.testing.assert_close(ours, logit_gradients(of(DFT()), z))
    if alpha == 1e-6:
        logp = z.log_softmax(-1)[:, 0]
        torch.testing.assert_close(of(Power(alpha))(logp), -logp, rtol=1e-5, atol=1e-5)


def test_a_power_by_hand():
    loss, _ = Power(2.0)(tokens([0.5, 0.2]))
    np.testing.assert_allclose(loss.detach(), [(1 - 0.25) / 2, (1 - 0.04) / 2], rtol=1e-6)
    assert Power(0.0)(tokens([0.5]))[0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("keep, kept", [("top", [1, 1, 0]), ("bottom", [0, 1, 1])])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_threshold_edits_the_mask_and_the_denominator(keep, kept, alpha):
    """Row 3: the bound itself is kept on both sides, and Z counts the kept tokens of all rows."""
    (weight,) = Thresholded(keep, 0.5).weigh([before([0.9, 0.5, 0.1])])
    assert weight.tolist() == kept
    out = sft("thresholded", keep=keep, threshold=0.75, alpha=alpha)
    p = np.exp(np.concatenate([ramp(r)[r.source == Source.EXPERT] for r in out.rows]))
    chosen = p >= 0.75 if keep == "top" else p <= 0.75
    assert 0 < chosen.sum() < len(p) and out.denominators["sft"] == chosen.sum()
    loss = -np.log(p) if alpha == 0.0 else 1 - p
    assert out.loss == pytest.approx(loss[chosen].mean(), rel=1e-5)


def test_a_threshold_that_drops_all_tokens_leaves_an_empty_term():
    out = sft("thresholded", threshold=1.0)
    assert out.loss == 0.0 and not any(g.any() for g in out.gradients)


def test_iw_sft_at_the_reference_is_sft():
    """Row 12: all w = 1."""
    for level in ("sequence", "token"):
        t = tokens([0.5, 0.1, 0.9], ref_logp=np.log([0.5, 0.1, 0.9]))
        np.testing.assert_allclose(pushes(ImportanceWeighted(level), t), 1.0, rtol=1e-6)


def test_iw_sft_by_hand_and_within_its_bounds():
    """Row 12: w never leaves its bounds, and no gradient flows through it."""
    t = tokens([0.4, 0.4, 0.5], [0, 0, 1], ref_logp=np.log([0.2, 0.1, 1e-6]))
    # the first row's mean log-ratio is log of sqrt(2 * 4)
    np.testing.assert_allclose(
        pushes(ImportanceWeighted(), t), [math.sqrt(8), math.sqrt(8), 16.0], rtol=1e-5
    )
    t = tokens([0.4, 0.4, 0.5], [0, 0, 1], ref_logp=np.log([0.2, 0.1, 1e-6]))
    squared = ImportanceWeighted(scale=2.0)
    np.testing.assert_allclose(pushes(squared, t), [8.0, 8.0, 16.0], rtol=1e-5)
    t = tokens([0.5, 0.5, 0.5], ref_logp=np.log([0.4, 0.1, 1.0 / 1.1]))
    expected = [1.25, 1.8, 0.55]
    np.testing.assert_allclose(pushes(ImportanceWeighted("token"), t), expected, rtol=1e-5)


def test_talr_by_hand():
    """tau is the median of the rows' means: here 2 log 2, so that p^(1/tau) is e^(-l/tau)."""
    rows = [before(p) for p in ([0.5, 0.5], [0.25, 0.25, 0.25], [1e-3])]
    weights = TALR().weigh(rows)
    expected = [math.exp(-0.5), math.exp(-1.0), max(math.exp(-math.log(1e3) / math.log(4)), 0.01)]
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5)


def test_talr_weights():
    """Row 52: equal losses, equal weights; they fall in the loss, never below the floor; tau 1 and
    floor 0 is DFT; tau without end is SFT.
    """
    p = np.linspace(0.001, 1.0, 50, dtype=np.float32)
    (weight,) = TALR(tau=0.5).weigh([before(p)])
    assert (np.diff(weight) >= 0).all() and weight.min() == np.float32(0.01) and weight[-1] == 1.0
    (weight,) = TALR().weigh([before([0.3] * 4)])
    assert len(set(weight.tolist())) == 1
    (weight,) = TALR(tau=1.0, floor=0.0).weigh([before(p)])
    np.testing.assert_allclose(weight, p, rtol=1e-5)
    (weight,) = TALR(tau=math.inf).weigh([before(p)])
    assert (weight == 1.0).all()


def test_talr_weights_minimise_its_bound():
    """Row 52: of sum w l + tau sum w log w over the simplex."""
    rng = np.random.default_rng(0)
    losses, tau = rng.exponential(size=8), 0.7

    def bound(w):
        return (w * losses).sum() + tau * (w * np.log(w)).sum()

    (weight,) = TALR(tau, floor=0.0).weigh([before(np.exp(-losses))])
    best = weight / weight.sum()
    for _ in range(200):
        other = best * np.exp(0.1 * rng.normal(size=8))
        assert bound(best) <= bound(other / other.sum()) + 1e-7


def test_cleaning_by_hand():
    """Row 39: what the reference found unlikelier is kept; of equal scores the first."""
    row = before([0.5, 0.5, 0.2, 0.9, 0.3], ref=[0.4, 0.6, 0.1, 0.9, 0.3])
    (weight,) = Cleaned(0.6).weigh([row])
    assert weight.tolist() == [1, 0, 1, 1, 0]
    out = sft("cleaned", share=0.5)
    assert out.denominators["sft"] == 2 + 1


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_cleaning_keeps_its_share_of_every_row(share):
    """Row 39: within a token, also where all scores are equal, and the same tokens whatever is
    added to one model's loss.
    """
    rng = np.random.default_rng(0)
    for n in range(1, 12):
        p, ref = rng.uniform(0.1, 0.9, n), rng.uniform(0.1, 0.9, n)
        rows = [before(p, ref), before(p, 0.5 * ref), before(p, p)]
        one, shifted, equal = Cleaned(share).weigh(rows)
        assert abs(one.sum() - share * n) < 1 and equal.sum() == one.sum()
        assert (one == shifted).all() and (np.diff(equal) <= 0).all()
