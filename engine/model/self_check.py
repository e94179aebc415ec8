"""Checks of a loaded model on real numbers: does it keep packed sequences apart, does the chunked
head give its own log-probs, can rows share a prompt?
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.attention import NAME
from tandem.engine.model.context import context_length, rope_kind, ropes
from tandem.engine.model.policy import Policy
from tandem.engine.model.rope import row_ropes
from tandem.engine.model.view import View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # on log-probs


def refuse_unpackable(causal: PreTrainedModel, model: ModelConfig) -> None:
    """Raise ConfigError for what is known to go wrong without a difference that `self_check` could
    see.
    """
    decoder = causal.get_decoder()
    signature = inspect.signature(decoder.forward)
    if "position_ids" not in signature.parameters:
        raise ConfigError(
            f"model {model.path!r} ({type(causal).__name__}) takes no position_ids, so that "
            "packed sequences cannot be told apart; this model is not supported"
        )
    config = causal.config.get_text_config()
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap and causal.config._attn_implementation == "sdpa":
        raise ConfigError(
            f"model {model.path!r} caps its attention scores (attn_logit_softcapping={cap} in its "
            "config.json), which model.attention=sdpa leaves out without a word; set "
            "model.attention=eager, or flash_attention_2 on a GPU"
        )


@torch.no_grad()
def self_check(policy: Policy, model: ModelConfig) -> None:
    """Compare packed log-probs with a plain forward of each sequence, and a sequence behind one
    neighbour with itself behind another.

    Raises ConfigError if they differ by more than rounding; the second difference is exactly 0 on
    the CPU. Flash attention needs a GPU: on the CPU its model is checked with SDPA.
    """
    causal = policy.model
    device = policy.head.weight.device
    tolerance = TOLERANCE[model.dtype]
    tight = tolerance / 10
    a, other, b = random_rows(policy, (3, 8), seed=0)
    b = b[:6]
    swapped = policy.one_line and device.type == "cpu"
    if swapped:
        causal.set_attn_implementation("sdpa")

    a_alone = plain_logp(causal, a)
    b_alone = plain_logp(causal, b)
    own = torch.cat([a_alone, b_alone])
    packed, beside_other = packed_logp(policy, a, other, b)
    far = beside_a_long_row(policy, a, b)
    if swapped:
        causal.set_attn_implementation(model.attention)
    b_packed = packed[len(a) - 1 :]
    b_beside_other = beside_other[len(a) - 1 :]
    gap = mean_gap(packed, own)
    leak = largest_gap(b_packed, b_beside_other)
    if not (gap <= tolerance and leak <= tight):
        raise ConfigError(
            f"model {model.path!r} ({type(causal).__name__}, attention {model.attention!r}, "
            f"{model.dtype}): packed log-probs differ from the model's own by {gap:.1e} on average "
            f"(expected at most {tolerance:.0e}), and by {leak:.1e} between two neighbours in the "
            f"pack ({tight:.0e}): it mixes packed sequences, or its logits are not a "
            "linear map of the hidden states; try model.attention=sdpa, else this model is not "
            "supported"
        )
    if far is None:
        return
    drift = largest_gap(far, b_packed)
    if not drift <= tight:
        config = causal.config.get_text_config()
        kinds = {rope_kind(rope) for rope in ropes(config)}
        known = ", ".join(sorted(kinds)) or "unknown"
        raise ConfigError(
            f"model {model.path!r} ({type(causal).__name__}): log-probs of a packed row change by "
            f"{drift:.1e} (expected at most {tight:.0e}) when its neighbour reaches the end of "
            f"the model's context: its positions (rope {known}) depend on the longest row of a "
            "pack; this model is not supported"
        )


def plain_logp(causal: PreTrainedModel, row: Tensor) -> Tensor:
    """Log-probs [T - 1] of a row [T] by a forward of its own."""
    output = causal(input_ids=row[None], use_cache=False)
    logits = output.logits[0, :-1]
    logits = logits.float()
    logp = logits.log_softmax(-1)
    target = row[1:, None]
    own = logp.gather(-1, target)
    return own.squeeze(-1)


def packed_logp(policy: Policy, a: Tensor, other: Tensor, b: Tensor) -> Tensor:
    """Log-probs of two bins, one a line: `b` behind `a`, and `b` behind `other`, as long as `a`."""
    behind_a = torch.cat([a, b])
    behind_other = torch.cat([other, b])
    bins = torch.stack([behind_a, behind_other])
    of_a = torch.arange(len(a))
    of_b = torch.arange(len(b))
    positions = torch.cat([of_a, of_b])
    positions = positions.to(bins.device)
    positions = positions.expand(2, -1)
    # every token but the first of each sequence is predicted
    predicted = positions.reshape(-1).nonzero()
    predicted = predicted.squeeze(-1)
    tokens = bins.reshape(-1)
    target = tokens[predicted]
    view = View.of_one_row(bins, positions, predicted - 1, target)
    logp = policy(view)["logp"]
    return logp.reshape(2, -1)


def largest_gap(a: Tensor, b: Tensor) -> float:
    gap = (a - b).abs()
    return gap.max().item()


def mean_gap(a: Tensor, b: Tensor) -> float:
    gap = (a - b).abs()
    return gap.mean().item()


def random_rows(policy: Policy, shape: tuple[int, int], seed: int) -> Tensor:
    """Token ids int64 `shape`, the same on every machine."""
    weight = policy.head.weight
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(weight), shape, generator=generator)
    return ids.to(weight.device)


def beside_a_long_row(policy: Policy, a: Tensor, b: Tensor) -> Tensor | None:
    """Log-probs of `b` [n - 1] packed behind `a`, whose positions jump to the end of the model's
    context; None where the config has no limit.

    Cheap: the long row is not there, only its last positions are.
    """
    context = context_length(policy.model.config)
    if context is None or context <= len(a):
        return None
    device = a.device
    start = context - len(a)
    before = torch.arange(start, context, device=device)
    before[0] = 0  # flash attention tells rows apart by their position 0
    of_b = torch.arange(len(b), device=device)
    positions = torch.cat([before, of_b])
    tokens = torch.cat([a, b])
    last = len(tokens) - 1
    index = torch.arange(len(a), last, device=device)
    view = View.of_one_row(tokens[None], positions[None], index, b[1:])
    return policy(view)["logp"]


def can_share(policy: Policy) -> bool:
    """Whether rows may stand behind one copy of their prompt: SDPA with full attention in every
    layer, and the right log-probs on real numbers.
    """
    if not attends_fully(policy):
        return False
    if row_ropes(policy.model):  # a prompt would belong to rows of several lengths
        return False
    dtype = str(policy.head.weight.dtype)
    name = dtype.removeprefix("torch.")
    return sharing_gap(policy) <= TOLERANCE[name]


def attends_fully(policy: Policy) -> bool:
    """Whether SDPA with full attention runs in every layer: a layer with a window would lose it to
    the mask, flash attention takes no mask, eager attention takes another kind, and a recurrent
    layer would see the rows before.
    """
    if policy.model.config._attn_implementation not in ("sdpa", NAME):
        return False
    config = policy.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is None
    return set(kinds) <= {"full_attention"}


@torch.no_grad()
def sharing_gap(policy: Policy) -> float:
    """How far the log-probs of two rows that share a prompt are from those of the rows alone, on
    average.
    """
    prompt, a, b = random_rows(policy, (3, 4), seed=1)
    device = prompt.device
    order = torch.arange(8, device=device)
    four = torch.ones(4, dtype=torch.long, device=device)
    target = torch.cat([a, b])
    with_a = torch.cat([prompt, a])
    with_b = torch.cat([prompt, b])
    rows = torch.stack([with_a, with_b])
    positions = order.expand(2, -1)
    predicting = order[3:7]
    index = torch.cat([predicting, predicting + 8])
    view = View.of_one_row(rows, positions, index, target)
    alone = policy(view)["logp"]
    tokens = torch.cat([prompt, a, b])
    behind_prompt = order[4:]
    positions = torch.cat([order, behind_prompt])
    # b's first token is predicted from the end of the prompt
    prompt_end = order[3:4]
    inside_b = order[5:8] + 3
    index = torch.cat([predicting, prompt_end, inside_b])
    block = torch.cat([0 * four, 1 * four, 2 * four])
    prompt_block = torch.zeros_like(block)
    blocks = torch.stack([block, prompt_block])
    blocks = blocks[:, None]
    together = View.of_one_row(tokens[None], positions[None], index, target, blocks)
    shared = policy(together)["logp"]
    return mean_gap(shared, alone)
