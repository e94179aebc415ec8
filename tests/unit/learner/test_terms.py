"""The loss of a step: hand-computed for every reduction, and the same for any split into
micro-batches and ranks.
"""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
import transformers

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.correction import RolloutCorrection
from tandem.algorithms.parts.objectives.entropy import KLToReference
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.policy import PPOClip
from tandem.algorithms.parts.reductions import Reduction
from tandem.engine.core.types import Row, Source
from tandem.engine.learner.packing import pack
from tandem.engine.learner.terms import (
    denominators,
    make_tokens,
    micro_batch_loss,
    row_counts,
)
from tandem.engine.model.policy import Policy, hf_parameters
from tandem.engine.model.view import View


def expert(weight, term="sft"):
    """A row whose token t >= 1 has weight[t - 1] in `term`; the ids do not matter."""
    weight = np.array([0, *weight], np.float32)
    return Row(
        np.arange(len(weight), dtype=np.int32),
        np.full(len(weight), Source.EXPERT, np.int8),
        {term: weight},
    )


def step(rows, terms, logp):
    """Loss and metrics of one micro-batch, `logp` {row: log-probs of its trained tokens}."""
    ((micro,),) = pack(rows, terms, 1, 1000, version=0)
    values = torch.tensor(
        [x for i in micro.rows for x in logp[i]], dtype=torch.float32, requires_grad=True
    )
    tokens = make_tokens(micro, {"logp": values})
    loss, metrics = micro_batch_loss(terms, denominators(terms, rows), micro, tokens)
    return loss, metrics, values


# Two rows: three tokens with -log p = 1, 2, 3 and one token with 8 of weight 0.5; a third row whose
# only weight is zero does not count.
@pytest.mark.parametrize(
    "reduction, expected",
    [
        (Reduction("token_mean"), (1 + 2 + 3 + 4) / 4),
        (Reduction("seq_mean_token_mean"), ((1 + 2 + 3) / 3 + 4) / 2),
        (Reduction("seq_mean_token_sum"), (1 + 2 + 3 + 4) / 2),
        (Reduction("sum_over_constant", 5), (1 + 2 + 3 + 4) / (2 * 5)),
        (Reduction("constant", 5), (1 + 2 + 3 + 4) / 5),
    ],
)
def test_reductions_by_hand(reduction, expected):
    """Section 0.3 of the methods dossier."""
    rows = [expert([1, 1, 1]), expert([0, 0.5]), expert([0, 0])]
    terms = [Term("sft", NLL(), reduction, coefficient=3.0)]
    loss, metrics, _logp = step(rows, terms, {0: [-1, -2, -3], 1: [-8]})
    assert loss.item() == pytest.approx(3 * expected, rel=1e-6)
    assert metrics.report()["loss/sft"] == pytest.approx(expected, rel=1e-6)
    assert metrics.counts["loss/sft"] == 4
    assert row_counts(rows, "sft").tolist() == [3, 1, 0]


def test_terms_add_up_by_hand():
    """PPO with the clip active on one token, the k3 estimator, and a truncated rollout correction:
    each token as its formula says.
    """
    weight, nan = lambda *x: np.array(x, np.float32), np.nan
    row = Row(
        np.arange(3, dtype=np.int32),
        np.array([0, 1, 1], np.int8),
        {"policy": weight(0, 1, 1), "kl": weight(0, 0, 1)},
        {
            "advantage": weight(0, 2, -1),
            "old_logp": weight(nan, -1.0, -1.0),
            "behaviour_logp": weight(nan, -3.0, -1.5),
            "ref_logp": weight(nan, -1.0, -0.8),
        },
    )
    logp = [-1 + log(1.5), -1 + log(0.9)]
    terms = [
        Term("policy", PPOClip(0.2, 0.2), correction=RolloutCorrection(cap=2.0)),
        Term("kl", KLToReference(), coefficient=0.1, needs=frozenset({"ref_logp"})),
    ]
    loss, metrics, _ = step([row], terms, {0: logp})
    # corrections exp(-1 + 3) cut to 2, and exp(-1 + 1.5)
    policy = (2.0 * (-2 * 1.2) + exp(0.5) * (1 * 0.9)) / 2
    d = -0.8 - logp[1]
    assert loss.item() == pytest.approx(policy + 0.1 * (exp(d) - d - 1), rel=1e-5)
    assert metrics.report()["loss/policy"] == pytest.approx(policy, rel=1e-5)
    assert metrics.totals["policy/clip_fraction"].item() == 1


TERMS = (
    Term("policy", PPOClip(), Reduction("seq_mean_token_mean"), 0.7, RolloutCorrection()),
    Term("sft", NLL("phi"), Reduction("token_mean"), 0.3),
    Term(
        "kl",
        KLToReference(),
        Reduction("sum_over_constant", 20),
        0.05,
        needs=frozenset({"ref_logp"}),
    ),
)


def noise(rng, mask):
    """Log-probs where the mask is, NaN elsewhere."""
    return np.where(mask > 0, rng.normal(-4.5, 0.5, len(mask)), np.nan).astype(np.float32)


def mixed_rows(count=16, seed=0):
    """Own samples (advantage, rollout log-probs) and demonstrations of ragged length, both with
    reference log-probs.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(4, 40))
        mask = (np.arange(length) >= rng.integers(1, 4)).astype(np.float32)
        demo = i % 3 == 0
        rows.append(
            Row(
                rng.integers(0, 96, length).astype(np.int32),
                np.where(mask > 0, Source.EXPERT if demo else Source.POLICY, 0).astype(np.int8),
                {"sft": mask} if demo else {"policy": mask, "kl": mask},
                {
                    "advantage": None if demo else mask * np.float32(rng.normal()),
                    "behaviour_logp": None if demo else noise(rng, mask),
                    "ref_logp": noise(rng, mask),
                },
                group=i,
            )
        )
    return rows


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Policy(transformers.AutoModelForCausalLM.from_config(config))


def gradient(policy, rows, terms, parts, ranks):
    """Loss and gradients of one step over `parts` micro-batches (or a few more) on each of `ranks`,
    added up as the engines do.
    """
    policy.zero_grad(set_to_none=True)
    z = denominators(terms, rows)
    total, forwards = 0.0, 0
    for part in (rows[start::parts] for start in range(parts)):
        for micro in (
            micro for micros in pack(part, terms, ranks, 10_000, version=0) for micro in micros
        ):
            tensor = torch.as_tensor
            view = View.of_one_row(
                tensor(micro.tokens),
                tensor(micro.positions),
                tensor(micro.index),
                tensor(micro.target),
            )
            found = policy(replace(view, temperature=0.9, chunk=16, entropy=True))
            loss, _ = micro_batch_loss(terms, z, micro, make_tokens(micro, found))
            loss.backward()
            total, forwards = total + loss.item(), forwards + 1
    assert forwards == parts * ranks
    return total, {name: p.grad.clone() for name, p in hf_parameters(policy)}


@pytest.mark.parametrize("name", ["policy", "sft", "kl", "all"])
def test_any_split_gives_the_same_loss_and_gradient(policy, name):
    """Sections 0.2 and 0.6 (I-0a, I-0b) of the methods dossier: 16 rows as 1, 3, 8 and 20
    micro-batches (the last with empty ones) on one and two ranks.
    """
    terms = [
        term if name in ("all", term.name) else replace(term, coefficient=0.0) for term in TERMS
    ]
    rows = mixed_rows()
    loss, expected = gradient(policy, rows, terms, 1, 1)
    size = sum(g.square().sum() for g in expected.values()).sqrt()
    assert size > 1e-3
    for parts, ranks in ((3, 1), (8, 1), (1, 2), (3, 2), (8, 2), (20, 2)):
        other, found = gradient(policy, rows, terms, parts, ranks)
        assert other == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert sum((found[k] - expected[k]).square().sum() for k in found).sqrt() <= 1e-5 * size, (
            parts,
            ranks,
        )


def test_absent_streams_do_not_poison_other_rows(policy):
    """Demonstrations have no advantage: NaN in the pack, which the policy term never sees."""
    rows = mixed_rows()
    ((micro,),) = pack(rows, TERMS, 1, 10_000, version=0)
    demos = micro.source == Source.EXPERT
    assert (
        np.isnan(micro.streams["advantage"][demos]).all()
        and not np.isnan(micro.streams["advantage"][~demos]).any()
    )
    _, gradients = gradient(policy, rows, TERMS, 1, 1)
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_no_rows_give_exactly_zero_and_a_backward_pass(policy):
    """Section 0.6 (I-0d) of the methods dossier."""
    loss, gradients = gradient(policy, [], TERMS, 1, 2)
    assert loss == 0.0
    assert all(not g.any() for g in gradients.values()) and len(gradients) == len(
        list(policy.parameters())
    )


def test_a_weight_for_an_undeclared_term_is_an_error():
    row = replace(expert([1, 1], term="stf"), prompt_id="p7")
    with pytest.raises(ValueError, match=r"'p7'.*\['stf'\].*\['sft'\]"):
        denominators([Term("sft", NLL())], [row])


def test_a_term_without_a_stream_it_needs_is_an_error():
    terms = [Term("sft", NLL(), needs=frozenset({"ref_logp"}))]
    with pytest.raises(ValueError, match="'sft' needs 'ref_logp'"):
        step([expert([1, 1])], terms, {0: [-1, -2]})
