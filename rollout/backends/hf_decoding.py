"""Sampling from a transformers model in this process, many rows at a time.

Rows are left-padded, each distinct context is prefilled once, and rows that ended leave the batch.
B rows of the present batch, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tandem.engine.core.types import Finish, Sampling

GROWTH = 128  # tokens
# ended rows are decoded along, and what they draw is dropped, until the others are at most this
# share of the batch
KEEP = 0.875


@dataclass(eq=False)
class Sample:
    """One row of a batch on its way: what it starts from, and what was sampled so far."""

    context: np.ndarray  # int32: prompt and forced prefix
    forced: int  # length of the forced prefix
    sampling: Sampling
    uniforms: np.ndarray  # float64 [max_tokens] in [0, 1): one per response token
    # What `decode` fills in. A row whose forced prefix leaves no room is not decoded, and stays so.
    tokens: np.ndarray = field(init=False, default_factory=lambda: np.zeros(0, np.int32))
    logp: np.ndarray = field(init=False, default_factory=lambda: np.zeros(0, np.float32))
    finish: Finish = field(init=False, default=Finish.LENGTH)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that may be sampled behind the forced prefix."""
        return self.sampling.max_tokens - self.forced


@torch.inference_mode()
def decode(model, rows: Sequence[Sample], eos: Tensor) -> None:
    """Sample all rows to their ends and fill in tokens, logp and finish.

    Memory beyond the model: keys and values, and one [B, V] of logits.
    """
    decoding = Decoding(model, rows, eos)
    decoding.prefill()
    for step in range(decoding.steps):
        token_B = decoding.sample(step)
        if not decoding.live.any():
            break
        token_B = decoding.compact(token_B)
        decoding.forward(token_B)
    decoding.fill_in()


class Decoding:
    """The state of one batch between two tokens.

    What is fixed has one entry per row; what moves (`batch`, `live`, mask, position, logits, cache)
    has one per row that is still in the batch.
    """

    def __init__(self, model, rows: Sequence[Sample], eos: Tensor):
        self.model = model
        self.rows = rows
        self.eos = eos
        self.device = eos.device
        # what each row asks for
        limits = [row.max_new_tokens for row in rows]
        self.max_new_tokens = self.integers(limits)
        self.steps = max(limits)
        # step from which each row may end
        earliest = []
        for row in rows:
            earliest.append(row.sampling.min_tokens - row.forced)
        self.earliest = self.integers(earliest)
        self.all_may_end = max(earliest)
        temperatures = [row.sampling.temperature for row in rows]
        self.temperature = self.floats(temperatures)
        top_ps = [row.sampling.top_p for row in rows]
        self.top_p = self.floats(top_ps)
        padded = self.padded_uniforms()
        uniforms = torch.from_numpy(padded)
        self.uniforms = uniforms.to(self.device)
        # what was found
        shape = (len(rows), self.steps)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logp = torch.zeros(shape, device=self.device)
        self.length = torch.zeros_like(self.max_new_tokens)
        self.stopped = torch.zeros_like(self.max_new_tokens, dtype=torch.bool)
        # the batch: its row numbers, and which of them have not ended
        self.batch = torch.arange(len(rows), device=self.device)
        self.live = torch.ones_like(self.batch, dtype=torch.bool)
        self.cache = growing_cache(model.config)

    def integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def padded_uniforms(self) -> np.ndarray:
        """float64 [rows, steps]: the draws behind each row's forced prefix."""
        padded = np.zeros((len(self.rows), self.steps))
        for i, row in enumerate(self.rows):
            own = row.uniforms[row.forced :]
            padded[i, : len(own)] = own
        return padded

    def prefill(self) -> None:
        """Run each distinct context once (the samples of a group share their prompt) and give every
        row a copy of its cache.
        """
        contexts = []
        number_of: dict[bytes, int] = {}
        numbers = []  # of each row's context
        for row in self.rows:
            key = row.context.tobytes()
            if key not in number_of:
                number_of[key] = len(contexts)
                contexts.append(row.context)
            numbers.append(number_of[key])
        ids, mask = left_padded(contexts)
        self.mask = mask.to(self.device)
        position = self.mask.cumsum(-1) - 1
        self.position = position.clamp_(min=0)
        ids = ids.to(self.device)
        logits = self.run(ids, logits_to_keep=1)
        context_B = self.integers(numbers)
        self.reorder_cache(context_B)
        self.logits = logits[context_B]
        self.mask = self.mask[context_B]
        self.position = self.position[context_B, -1:]

    def run(self, ids: Tensor, **options) -> Tensor:
        """Logits [B, V] behind the last of `ids` [B, new]."""
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -1]

    def sample(self, step: int) -> Tensor:
        """Draw a token for every row of the batch, note those of live rows, and mark the rows that
        end with it. Returns the tokens [B].
        """
        batch = self.batch
        logits_BV = self.logits.float()
        if step < self.all_may_end:
            self.forbid_early_ends(logits_BV, step)
        temperature_B = self.temperature[batch]
        top_p_B = self.top_p[batch]
        uniform_B = self.uniforms[batch, step]
        token_B, logp_B = draw(logits_BV, temperature_B, top_p_B, uniform_B)
        ended_B = torch.isin(token_B, self.eos)
        live_B = self.live
        rows = batch[live_B]
        self.tokens[rows, step] = token_B[live_B]
        self.logp[rows, step] = logp_B[live_B]
        self.stopped[rows] = ended_B[live_B]
        length = step + 1
        self.length[rows] = length
        has_room_B = length < self.max_new_tokens[batch]
        live_B &= ~ended_B
        live_B &= has_room_B
        return token_B

    def forbid_early_ends(self, logits_BV: Tensor, step: int) -> None:
        """Take the end tokens, in place, from rows that have fewer than their least tokens."""
        vocabulary = logits_BV.shape[-1]
        ids_V = torch.arange(vocabulary, device=self.device)
        is_eos_V = torch.isin(ids_V, self.eos)
        too_early_B = step < self.earliest[self.batch]
        forbidden_BV = too_early_B[:, None] & is_eos_V
        logits_BV[forbidden_BV] = -torch.inf

    def reorder_cache(self, rows_B: Tensor) -> None:
        """Row i of the cache becomes what row `rows_B[i]` was."""
        # transformers' annotation names the legacy type of an int64 tensor
        self.cache.reorder_cache(cast(torch.LongTensor, rows_B))

    def compact(self, token_B: Tensor) -> Tensor:
        """Let ended rows leave once they are enough. Returns the tokens of the rows that stay."""
        live = int(self.live.sum())
        if live > KEEP * len(self.batch):
            return token_B
        keep = self.live.nonzero()
        keep = keep.squeeze(-1)
        self.reorder_cache(keep)
        self.batch = self.batch[keep]
        self.mask = self.mask[keep]
        self.position = self.position[keep]
        self.live = self.live[keep]
        return token_B[keep]

    def forward(self, token_B: Tensor) -> None:
        """Run the model on the tokens just drawn."""
        mask = self.mask
        one_more = mask.new_ones(len(mask), 1)
        self.mask = torch.cat([mask, one_more], 1)
        # ended rows keep their position, so that they stay within the context
        advance = self.live[:, None]
        self.position = self.position + advance
        ids = token_B[:, None]
        self.logits = self.run(ids)

    def fill_in(self) -> None:
        """Give each row what was sampled for it."""
        tokens = self.tokens.cpu().numpy()
        logp = self.logp.cpu().numpy()
        lengths = self.length.tolist()
        stopped = self.stopped.tolist()
        for i, row in enumerate(self.rows):
            length = lengths[i]
            own = tokens[i, :length]
            row.tokens = own.astype(np.int32)
            row.logp = logp[i, :length]
            row.finish = Finish.STOP if stopped[i] else Finish.LENGTH


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob under the distribution it was drawn from, which is the
    scaled and truncated one.

    logits float32 [B, V], temperature, top_p [B], uniform float64 [B] -> (int64 [B], float32 [B]).
    Temperature 0 takes the most likely token and gives its log-prob at temperature 1, as vLLM does.
    """
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature)
    scaled = logits / divisor[:, None]
    logp = scaled.log_softmax(-1)
    del scaled  # as large as the logits
    if (top_p < 1).any():
        sampled_top_p = torch.where(greedy, 1.0, top_p)
        logp = truncate(logp, sampled_top_p)
    cumulative = logp.double().exp_()
    cumulative = cumulative.cumsum(-1)
    total = cumulative[:, -1:]
    threshold = uniform[:, None] * total
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    last_id = logits.shape[-1] - 1
    drawn = drawn.clamp_(max=last_id)
    likeliest = logits.argmax(-1, keepdim=True)
    token = torch.where(greedy[:, None], likeliest, drawn)
    token_logp = logp.gather(-1, token)
    return token.squeeze(-1), token_logp.squeeze(-1)


def truncate(logp: Tensor, top_p: Tensor) -> Tensor:
    """Keep the most likely tokens up to probability `top_p` [B], renormalised; 1 keeps all."""
    ordered, order = logp.sort(-1, descending=True)
    p = ordered.exp_()
    more_likely = p.cumsum(-1)
    more_likely.sub_(p)  # probability of all tokens before it
    truncated = top_p < 1
    beyond = more_likely >= top_p[:, None]
    beyond &= truncated[:, None]
    dropped = torch.zeros_like(beyond)
    dropped.scatter_(-1, order, beyond)
    kept = logp.masked_fill(dropped, -torch.inf)
    return kept.log_softmax(-1)


def left_padded(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """int64 [B, L] ids and attention mask; the pads (id 0) stand in front."""
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        start = longest - len(sequence)
        ids[i, start:] = torch.from_numpy(sequence)
        mask[i, start:] = 1
    return ids, mask


def growing_cache(config):
    """transformers' DynamicCache with keys and values written in place, into buffers for GROWTH
    more tokens: joining them anew per token was a third of decoding.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        # self.keys and self.values are the filled part of these
        all_keys: Tensor | None = None
        all_values: Tensor | None = None

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            past = self.get_seq_length()
            new = key_states.shape[-2]
            end = past + new
            self.all_keys = extended(self.all_keys, self.keys, key_states, past)
            self.all_values = extended(self.all_values, self.values, value_states, past)
            self.keys = self.all_keys[..., :end, :]
            self.values = self.all_values[..., :end, :]
            return self.keys, self.values

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self.all_keys = None
            self.all_values = None

    def extended(buffer: Tensor | None, filled, states: Tensor, past: int):
        """The buffer with `states` behind its first `past` tokens, which are `filled`; a larger one
        where it is too small.
        """
        rows, heads, new, size = states.shape
        end = past + new
        if buffer is None or buffer.shape[-2] < end:
            room = end + GROWTH
            buffer = states.new_empty(rows, heads, room, size)
            if past:
                buffer[..., :past, :] = filled
        buffer[..., past:end, :] = states
        return buffer

    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer()
    return cache
