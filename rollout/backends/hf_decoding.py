"""Sampling from a transformers model in this process, many rows at a time.

Rows are left-padded, each distinct context is prefilled once, and rows that ended leave the batch.
B rows of the present batch, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

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
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # sampled
    logp: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    finish: Finish = Finish.LENGTH

    @property
    def max_new_tokens(self) -> int:
        """Tokens that may be sampled behind the forced prefix."""
        return self.sampling.max_tokens - self.forced


@torch.inference_mode()
def decode(model, rows: Sequence[Sample], eos: torch.Tensor) -> None:
    """Sample all rows to their ends and fill in tokens, logp and finish.

    Memory beyond the model: keys and values, and one [B, V] of logits.
    """
    decoding = Decoding(model, rows, eos)
    decoding.prefill()
    for step in range(decoding.steps):
        token = decoding.sample(step)
        if not decoding.live.any():
            break
        decoding.forward(decoding.compact(token))
    decoding.fill_in()


class Decoding:
    """The state of one batch between two tokens.

    What is fixed has one entry per row; what moves (`batch`, `live`, mask, position, logits, cache)
    has one per row that is still in the batch.
    """

    def __init__(self, model, rows: Sequence[Sample], eos: torch.Tensor):
        self.model, self.rows, self.eos, self.device = model, rows, eos, eos.device
        self.max_new_tokens = self.integers([row.max_new_tokens for row in rows])
        self.steps = int(self.max_new_tokens.max())
        # step from which each row may end
        self.earliest = self.integers([row.sampling.min_tokens - row.forced for row in rows])
        self.all_may_end = int(self.earliest.max())
        self.temperature = self.floats([row.sampling.temperature for row in rows])
        self.top_p = self.floats([row.sampling.top_p for row in rows])
        self.uniforms = torch.from_numpy(self.padded_uniforms()).to(self.device)
        # what was found
        shape = len(rows), self.steps
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logp = torch.zeros(shape, device=self.device)
        self.length = torch.zeros_like(self.max_new_tokens)
        self.stopped = torch.zeros_like(self.max_new_tokens, dtype=torch.bool)
        # the batch: its row numbers, and which of them have not ended
        self.batch = torch.arange(len(rows), device=self.device)
        self.live = torch.ones_like(self.batch, dtype=torch.bool)
        self.cache = growing_cache(model.config)

    def integers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def floats(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def padded_uniforms(self) -> np.ndarray:
        """float64 [rows, steps]: the draws behind each row's forced prefix."""
        found = np.zeros((len(self.rows), self.steps))
        for i, row in enumerate(self.rows):
            own = row.uniforms[row.forced :]
            found[i, : len(own)] = own
        return found

    def prefill(self) -> None:
        """Run each distinct context once (the samples of a group share their prompt) and give every
        row a copy of its cache.
        """
        contexts = {row.context.tobytes(): row.context for row in self.rows}
        number = {key: i for i, key in enumerate(contexts)}
        ids, mask = left_padded(list(contexts.values()))
        self.mask = mask.to(self.device)
        self.position = (self.mask.cumsum(-1) - 1).clamp_(min=0)
        logits = self.run(ids.to(self.device), logits_to_keep=1)
        owner = self.integers([number[row.context.tobytes()] for row in self.rows])
        self.cache.reorder_cache(owner)
        self.logits = logits[owner]
        self.mask = self.mask[owner]
        self.position = self.position[owner, -1:]

    def run(self, ids: torch.Tensor, **options) -> torch.Tensor:
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

    def sample(self, step: int) -> torch.Tensor:
        """Draw a token for every row of the batch, note those of live rows, and mark the rows that
        end with it. Returns the tokens [B].
        """
        batch = self.batch
        logits = self.logits.float()
        if step < self.all_may_end:
            too_early = step < self.earliest[batch]
            is_eos = torch.isin(torch.arange(logits.shape[-1], device=self.device), self.eos)
            logits[too_early[:, None] & is_eos] = -torch.inf
        uniform = self.uniforms[batch, step]
        token, logp = draw(logits, self.temperature[batch], self.top_p[batch], uniform)
        ended = torch.isin(token, self.eos)
        now = batch[self.live]
        self.tokens[now, step] = token[self.live]
        self.logp[now, step] = logp[self.live]
        self.length[now] = step + 1
        self.stopped[now] = ended[self.live]
        self.live &= ~ended & (step + 1 < self.max_new_tokens[batch])
        return token

    def compact(self, token: torch.Tensor) -> torch.Tensor:
        """Let ended rows leave once they are enough. Returns the tokens of the rows that stay."""
        if int(self.live.sum()) > KEEP * len(self.batch):
            return token
        keep = self.live.nonzero().squeeze(-1)
        self.cache.reorder_cache(keep)
        self.batch = self.batch[keep]
        self.mask = self.mask[keep]
        self.position = self.position[keep]
        self.live = self.live[keep]
        return token[keep]

    def forward(self, token: torch.Tensor) -> None:
        """Run the model on the tokens [B] just drawn."""
        one_more = self.mask.new_ones(len(self.mask), 1)
        self.mask = torch.cat([self.mask, one_more], 1)
        # ended rows keep their position, so that they stay within the context
        self.position = self.position + self.live[:, None]
        self.logits = self.run(token[:, None])

    def fill_in(self) -> None:
        """Give each row what was sampled for it."""
        tokens, logp = self.tokens.cpu().numpy(), self.logp.cpu().numpy()
        lengths, stopped = self.length.tolist(), self.stopped.tolist()
        for i, row in enumerate(self.rows):
            row.tokens = tokens[i, : lengths[i]].astype(np.int32)
            row.logp = logp[i, : lengths[i]]
            row.finish = Finish.STOP if stopped[i] else Finish.LENGTH


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-prob under the distribution it was drawn from, which is the
    scaled and truncated one.

    logits float32 [B, V], temperature, top_p [B], uniform float64 [B] -> (int64 [B], float32 [B]).
    Temperature 0 takes the most likely token and gives its log-prob at temperature 1, as vLLM does.
    """
    greedy = temperature == 0
    logp = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    if (top_p < 1).any():
        logp = truncate(logp, torch.where(greedy, 1.0, top_p))
    cumulative = logp.double().exp_().cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    drawn = drawn.clamp_(max=logits.shape[-1] - 1)
    token = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), drawn)
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)


def truncate(logp: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the most likely tokens up to probability `top_p` [B], renormalised; 1 keeps all."""
    ordered, order = logp.sort(-1, descending=True)
    more_likely = ordered.exp().cumsum(-1) - ordered.exp()
    beyond = (more_likely >= top_p[:, None]) & (top_p < 1)[:, None]
    dropped = torch.zeros_like(beyond).scatter_(-1, order, beyond)
    return logp.masked_fill(dropped, -torch.inf).log_softmax(-1)


def left_padded(sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, L] ids and attention mask; the pads (id 0) stand in front."""
    shape = len(sequences), max(map(len, sequences))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        start = shape[1] - len(sequence)
        ids[i, start:] = torch.from_numpy(sequence).long()
        mask[i, start:] = 1
    return ids, mask


def growing_cache(config):
    """transformers' DynamicCache with keys and values written in place, into buffers for GROWTH
    more tokens: joining them anew per token was a third of decoding.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        # self.keys and self.values are the filled part of these
        all_keys: torch.Tensor | None = None
        all_values: torch.Tensor | None = None

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            past = self.get_seq_length()
            end = past + key_states.shape[-2]
            self.all_keys = extended(self.all_keys, self.keys, key_states, past)
            self.all_values = extended(self.all_values, self.values, value_states, past)
            self.keys = self.all_keys[..., :end, :]
            self.values = self.all_values[..., :end, :]
            return self.keys, self.values

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self.all_keys = self.all_values = None

    def extended(
        buffer: torch.Tensor | None, filled, states: torch.Tensor, past: int
    ) -> torch.Tensor:
        """The buffer with `states` behind its first `past` tokens, which are `filled`; a larger one
        where it is too small.
        """
        end = past + states.shape[-2]
        if buffer is None or buffer.shape[-2] < end:
            rows, heads, _, size = states.shape
            buffer = states.new_empty(rows, heads, end + GROWTH, size)
            if past:
                buffer[..., :past, :] = filled
        buffer[..., past:end, :] = states
        return buffer

    cache = DynamicCache(config=config)
    layers = []
    for layer in cache.layers:
        layers.append(GrowingLayer() if type(layer) is DynamicLayer else layer)
    cache.layers = layers
    return cache
