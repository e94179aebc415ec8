"""Rows, plans and an independent gradient, shared by the learner's tests."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.critic import ValueLoss
from tandem.algorithms.parts.objectives.entropy import KLToReference
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.policy import PPOClip
from tandem.algorithms.parts.objectives.preference import SimplePreference
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Row, Source, StepPlan
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.packing import pack
from tandem.engine.learner.protocol import PolicySpec
from tandem.engine.learner.rank import build_policy
from tandem.engine.learner.terms import denominators
from tandem.engine.model.quantities import Divergence, Entropy

TEMPERATURE = 0.8
TERMS = (
    Term("policy", PPOClip(), Reduction("token_mean")),
    Term("sft", NLL("phi"), Reduction("seq_mean_token_mean"), 0.3),
    Term(
        "kl",
        KLToReference(),
        Reduction("sum_over_constant", 16),
        0.1,
        needs=frozenset({"ref_logp"}),
    ),
    Term(
        "value",
        ValueLoss(),
        Reduction("seq_mean_token_mean"),
        0.1,
        needs=frozenset({"value", "old_value", "returns"}),
    ),
)
SPEC = PolicySpec(critic=True, uses_rollouts=True)  # as of PPO

CLIP = 0.75  # above the gradient norms of make_rows(count=17), below those of make_rows(0)
SEEDS = (("sft", 2), ("main", 3), ("other", 4))  # (moment set, rows) of the steps after a resume


def only(name):
    """TERMS with all coefficients but one set to zero."""
    return tuple(t if t.name == name else replace(t, coefficient=0.0) for t in TERMS)


def make_rows(seed=0, count=7):
    """Own samples with behaviour log-probs and advantages, and demonstrations, of different
    lengths.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length, start = int(rng.integers(6, 24)), int(rng.integers(2, 5))
        tokens, expert = rng.integers(7, 100, length).astype(np.int32), i % 3 == 2
        mask = (np.arange(length) >= start).astype(np.float32)
        source = np.where(
            mask > 0, Source.EXPERT if expert else Source.POLICY, Source.PROMPT
        ).astype(np.int8)
        noise = np.where(mask > 0, rng.normal(-4.6, 0.1, length), np.nan).astype(np.float32)
        rows.append(
            Row(
                tokens,
                source,
                {"sft": mask} if expert else {"policy": mask, "kl": mask, "value": mask},
                {
                    "advantage": mask * np.float32(rng.normal()),
                    "behaviour_logp": None if expert else noise,
                    "ref_logp": noise,
                    "old_value": None if expert else noise + 4.6,
                    "returns": None if expert else -0.2 * noise,
                },
                version=np.where(mask > 0, 0, -1).astype(np.int32),
                group=i,
            )
        )
    return rows


def make_policy(config, model_path):
    """With a critic that says something from the start."""
    policy = build_policy(config, model_path, SPEC)
    with torch.no_grad():
        policy.critic.weight.copy_(critic_weight(len(policy.critic.weight)))
        policy.critic.bias.fill_(0.1)
    return policy


def critic_weight(hidden):
    return 0.1 * torch.randn(hidden, generator=torch.Generator().manual_seed(1))


def poison(rows):
    """The same rows, one of them with an infinite advantage: a non-finite gradient on the one rank
    that gets it.
    """
    return [
        rows[0].with_streams(advantage=np.full(len(rows[0].tokens), np.inf, np.float32)),
        *rows[1:],
    ]


def siblings(rows):
    """The same rows, with one prompt for all whose prompts are equally long."""
    prompt = np.arange(50, 60, dtype=np.int32)

    def first(row):
        return int(row.trained.argmax())

    return [
        replace(row, tokens=np.r_[prompt[: first(row)], row.tokens[first(row) :]].astype(np.int32))
        for row in rows
    ]


def make_plan(rows, ranks=1, budget=64, terms=TERMS, share_prompts=False, **changes):
    plan = StepPlan(
        tuple(terms),
        denominators(terms, rows),
        pack(rows, terms, ranks, budget, version=0, share_prompts=share_prompts),
        learning_rate=1e-3,
        temperature=TEMPERATURE,
        entropy=True,
    )
    return replace(plan, **changes)


@dataclass(frozen=True)
class Measured:
    """-log p, less the entropy, plus a divergence from the reference."""

    def __call__(self, tokens):
        return -tokens.logp - tokens["all_entropy"] + tokens["divergence"], {}


QUANTITIES = {"all_entropy": Entropy(), "divergence": Divergence("reference", 0.5)}


def hook_plan(name, ranks=1):
    """A step of a method with a forward of its own, ift or carft, of a head that measures, or of
    pairs.
    """
    if name == "pairs":
        rows = []
        for i, row in enumerate(make_rows(count=12)):
            written = (row.source != Source.PROMPT).astype(np.float32)
            role = ("chosen", "rejected")[i % 2]
            rows.append(replace(row, weights={"pairs": written}, group=i // 2, role=role))
        terms = (Term("pairs", SimplePreference(), unit="group"),)
        return make_plan(rows, ranks, terms=terms)
    if name == "measured":
        terms = []
        for term in only("sft"):
            if term.name == "sft":
                term = replace(term, objective=Measured(), quantities=QUANTITIES)
            terms.append(term)
        return make_plan(make_rows(), ranks, terms=terms, quantities=QUANTITIES)
    rng = np.random.default_rng(7)

    def draw(n):
        return rng.integers(7, 100, n)

    groups = [
        group(
            [trajectory([1], draw(n)) for n in (5, 8, 3)],
            [1.0, 0.0, 1.0],
            demonstration=draw(6),
            number=g,
        )
        for g in range(3)
    ]
    batch = Batch(
        0, tuple(groups), tuple(trajectory([1, 2], draw(n), expert=True) for n in (4, 9, 6, 12))
    )
    method = make_method(
        name, {} if name == "ift" else {"contrast": 1.0, "policy": {"critic": {"kl": 0.0}}}
    )

    def zeros(row):
        return np.zeros(len(row.tokens), np.float32)

    rows, terms = (
        method.credit(
            [row.with_streams(old_value=zeros(row)) for row in method.rows(batch)], batch
        ),
        method.terms(batch),
    )
    return make_plan(rows, ranks, 48, terms, forward=method.forward)


@cache
def budget_of(seed, count, ranks, micro_batches):
    """A token budget with which make_rows(seed, count) makes so many micro-batches per rank."""
    return next(
        b
        for b in (10_000, *range(400, 0, -4))
        if len(pack(make_rows(seed, count), TERMS, ranks, b, version=0)[0]) == micro_batches
    )


def plain_gradient(model_path, rows, terms):
    """({parameter: gradient}, loss) by the formula of the loss, row by row through transformers'
    own head: nothing of packer, chunked head or engines.

    The critic's value of a token is a linear map of the hidden state one position before it.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    critic = {
        "critic.weight": critic_weight(model.config.hidden_size).requires_grad_(),
        "critic.bias": torch.tensor([0.1], requires_grad=True),
    }
    z, loss = denominators(terms, rows), 0.0
    for row in rows:
        out = model(
            input_ids=torch.as_tensor(row.tokens, dtype=torch.long)[None], output_hidden_states=True
        )
        logits, values = (
            out.logits[0, :-1] / TEMPERATURE,
            (out.hidden_states[-1][0, :-1] * critic["critic.weight"]).sum(-1)
            + critic["critic.bias"],
        )
        logp = (
            logits.log_softmax(-1)
            .gather(-1, torch.as_tensor(row.tokens[1:], dtype=torch.long)[:, None])
            .squeeze(-1)
        )
        for term in terms:
            if term.name not in row.weights:
                continue
            mask, scale = (
                torch.as_tensor(row.weights[term.name][1:]),
                term.reduction.row_scale(int(row.weights[term.name].sum())),
            )
            if term.name == "policy":  # first step since the snapshot: ratio 1, no clipping
                token = -(logp - logp.detach()).exp() * torch.as_tensor(
                    row.streams["advantage"][1:]
                )
            elif term.name == "sft":
                p = logp.detach().exp()
                token = -p * (1 - p) * logp
            elif term.name == "kl":
                d = torch.as_tensor(row.streams["ref_logp"][1:]).nan_to_num() - logp
                token = d.exp() - d - 1
            else:
                old, returns = (
                    torch.as_tensor(row.streams["old_value"][1:]).nan_to_num(),
                    torch.as_tensor(row.streams["returns"][1:]).nan_to_num(),
                )
                near = torch.minimum(torch.maximum(values, old - 0.2), old + 0.2)
                token = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
            loss = loss + term.coefficient * scale * (token[mask > 0]).sum() / z[term.name]
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in (*model.named_parameters(), *critic.items())
    }, float(loss.detach())


def weights(rank):
    """{parameter: copy of the full tensor} of a LearnerRank, and its critic's; a collective."""
    critic = {f"critic.{name}": p for name, p in rank.engine.module.critic.named_parameters()}
    gathered = nullcontext()
    if any(hasattr(p, "ds_id") for p in critic.values()):  # ZeRO-3 has split it
        from deepspeed.runtime.zero import GatheredParameters

        gathered = GatheredParameters(list(critic.values()))
    with gathered:
        critic = {name: p.detach().clone() for name, p in critic.items()}
    return {name: tensor.clone() for name, tensor in rank.engine.full_parameters()} | critic


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
