"""`as: code` against what the authors' training loops compute, written anew from their source:
losses per micro-batch, added up, averaged over GPUs."""

import math

import numpy as np
import pytest
import torch
from method_cases import as_expert, batch, constant, look, rollouts

from tandem.algorithms.parts.policy import PolicyLoss
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Finish, Source
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect

LIMIT = 10  # the response limit that the policy sum is divided by
DEMO = [5, 6, 3]  # three tokens
P = 0.5  # every token's probability


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def theirs(gpus, micro_batches, sft_coefficient, entropy_coefficient=0.001, advantages=(0.5, -0.5)):
    """One optimizer step of the authors' loop. Every micro-batch holds two rollouts, of three
    tokens and of one, and one demonstration of three.

    Returns d loss / d logp, [3, 3] of the three rows of a micro-batch, all alike, and the loss.
    """
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 1]])
    loss, logps = 0.0, []
    for _ in range(gpus):
        for _ in range(micro_batches):
            logp = torch.full((3, 3), math.log(P), requires_grad=True)
            logps.append(logp)
            ratio = (logp[:2] - logp[:2].detach()).exp()
            policy = (-torch.tensor(advantages)[:, None] * ratio * mask[:2]).sum() / LIMIT
            sft = masked_mean(-logp[2], mask[2])
            entropy = masked_mean(torch.full((3, 3), 0.7), mask)
            loss = loss + (policy + sft_coefficient * sft - entropy_coefficient * entropy) / gpus
    loss.backward()
    return logps[0].grad.numpy(), loss.item()


def machine(gpus, micro_batches):
    return {"reduction_length": LIMIT, "code_gpus": gpus, "code_micro_batches": micro_batches}


def found(method, b):
    """Gradients of two rollouts and a demonstration [3, 3], and the loss; every entropy is 0.7."""
    out = look(method, b, constant(math.log(P)), entropy=constant(0.7))
    grads = np.zeros((3, 3))
    policy = [
        g[1:]
        for g, row in zip(out.gradients, out.rows, strict=True)
        if (row.source == Source.POLICY).any()
    ]
    expert = [
        g[1:]
        for g, row in zip(out.gradients, out.rows, strict=True)
        if (row.source == Source.EXPERT).any()
    ]
    for place, row in enumerate((*policy[:2], expert[0])):
        grads[place, : len(row)] = row
    return grads, out.loss


@pytest.mark.parametrize("gpus, micro_batches", [(1, 1), (8, 1), (1, 4), (2, 3), (8, 4)])
def test_hpt(gpus, micro_batches):
    """One solved prompt and one failed one per micro-batch. SFT weighs gpus * micro_batches as
    much against RL as on one GPU."""
    method = make_method(
        "hpt", {"as": "code", "sft_coefficient": 0.3, "policy": machine(gpus, micro_batches)}
    )
    groups = []
    for number in range(gpus * micro_batches):
        groups.append(rollouts((1, 0), demo=DEMO, number=2 * number))
        groups.append(rollouts((0, 0), demo=DEMO, number=2 * number + 1))
    grads, loss = found(method, batch(groups=groups))
    expected, expected_loss = theirs(gpus, micro_batches, 0.3)
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-8)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("gpus, micro_batches", [(1, 1), (2, 3), (8, 4)])
def test_rl_with_sft(gpus, micro_batches):
    """Their entropy bonus is over all rows; here it covers rollouts only. Left out of both."""
    policy = {"preset": "luffy_code", "entropy_bonus": 0.0, **machine(gpus, micro_batches)}
    method = make_method("rl_with_sft", {"policy": policy})
    count = gpus * micro_batches
    b = batch(
        groups=[rollouts((1, 0), number=n) for n in range(count)],
        experts=(as_expert(rollouts(demo=DEMO)),) * count,
    )
    grads, loss = found(method, b)
    expected, expected_loss = theirs(gpus, micro_batches, 1.0, entropy_coefficient=0.0)
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-8)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize(
    "name, coefficient, tokens", [("luffy", 0.001, 7), ("relift", 0.001, 4), ("hpt", 0.001, 4)]
)
@pytest.mark.parametrize("gpus, micro_batches", [(1, 1), (4, 3)])
def test_entropy_bonuses_are_means(name, coefficient, tokens, gpus, micro_batches):
    """Of all trained tokens, 0.001 each; LUFFY's group has its demonstration."""
    method = make_method(name, {"as": "code", "policy": machine(gpus, micro_batches)})
    b = batch(groups=[rollouts((1, 0), demo=DEMO, demo_reward=1.0)])
    out = look(method, b, entropy=constant(0.7))
    assert out.terms["entropy"] == pytest.approx(-0.7) and out.denominators["entropy"] == tokens
    assert out.coefficients["entropy"] == pytest.approx(coefficient * micro_batches)
    assert out.coefficients["policy"] == pytest.approx(1 / gpus)


def test_the_machine_is_one_gpu_unless_given_and_belongs_to_that_code():
    assert PolicyLoss.parse("grpo").mean_weight == 1
    for options in (
        {"code_gpus": 2},
        {"code_micro_batches": 2},
        {"preset": "luffy_code", "reduction_length": 8, "code_gpus": 0},
    ):
        with pytest.raises(ValueError, match=r"method.policy.code_"):
            PolicyLoss.parse(options)
    with pytest.raises(ValueError, match="reduction"):
        PolicyLoss.parse({"regulariser_reduction": "mean"})


def test_a_regulariser_has_the_reduction_of_the_policy_term_unless_told_otherwise():
    terms = {}
    for reduction in (None, "seq_mean_token_mean"):
        policy = PolicyLoss.parse(
            {"kl": 0.1, "entropy_bonus": 0.1, "regulariser_reduction": reduction}
        )
        terms[reduction] = [term.reduction.name for term in policy.terms(batch())]
    assert terms == {
        None: ["token_mean"] * 3,
        "seq_mean_token_mean": ["token_mean", *["seq_mean_token_mean"] * 2],
    }


# -- the RL layer, section 14


@pytest.mark.parametrize("advantage", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_leaves_out_what_is_not_trained(advantage):
    """Rewards 1, 0, 5 on 3, 1 and 2 tokens; the last response is cut and masked. Advantages have
    mean 0 and std 1 over the four tokens that are trained."""
    cut = trajectory([1], [5, 6], [-1.0] * 2, finish=Finish.LENGTH)
    one = group(
        [trajectory([1], [5, 6, 7], [-1.0] * 3), trajectory([1], [8], [-1.0]), cut], [1.0, 0.0, 5.0]
    )
    method = make_method("grpo", {"policy": {"advantage": advantage, "mask_truncated": True}})
    rows = method.rows(batch(groups=[one]))
    trained = np.concatenate([row.streams["advantage"][row.trained] for row in rows])
    assert len(trained) == 4 and not rows[2].trained.any()
    assert trained.mean() == pytest.approx(0.0, abs=1e-6) and trained.std(ddof=1) == pytest.approx(
        1.0, rel=1e-5
    )
    np.testing.assert_allclose(trained, [0.5, 0.5, 0.5, -1.5], rtol=1e-5)


def test_whitening_a_batch_that_is_cut_altogether():
    method = make_method("grpo", {"policy": {"preset": "reinforce_pp", "mask_truncated": True}})
    rows = method.rows(batch(groups=[rollouts(finish=Finish.LENGTH)]))
    assert all(
        np.isfinite(row.streams["advantage"]).all() and not row.streams["advantage"].any()
        for row in rows
    )


@pytest.mark.parametrize(
    "level, mode, expected",
    [
        ("token", "truncate", [2.0, 0.5]),
        ("sequence", "truncate", [2.0, 2.0]),
        ("token", "mask", [0.0, 0.5]),
        ("sequence", "mask", [0.0, 0.0]),
    ],
)
def test_a_correction_leaves_prefix_tokens_alone(level, mode, expected):
    """w is e^2 and 1/2 on the two sampled tokens, e^2/2 over the sequence; the two tokens of the
    prefix keep weight 1, also where the sequence is masked."""
    from dataclasses import replace

    from method_cases import forced

    hybrid = forced(trajectory([1], [5, 6], [-1.0] * 2), [9, 8], [5, 6])
    hybrid = replace(
        hybrid,
        behaviour_logp=np.array([np.nan, np.nan, np.nan, -3.0, -1.0 + math.log(2)], np.float32),
    )
    one = group([hybrid, trajectory([1], [7], [-1.0])], [1.0, 0.0])

    def make(correction):
        return make_method(
            "prefix_rft",
            {"keep": 1.0, "policy": {"correction": correction, "correction_mode": mode}},
        )

    corrected, plain = (
        inspect(make(c), batch(groups=[one]), constant(-1.0), entropy=constant(0.1))
        for c in (level, "none")
    )
    np.testing.assert_allclose(
        corrected.gradients[0][1:] / plain.gradients[0][1:], [1.0, 1.0, *expected], rtol=1e-5
    )
