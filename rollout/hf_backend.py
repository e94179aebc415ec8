"""Rollouts from a transformers model in this process: the backend of mode=inline, of CPU debugging and of the tests.

Requests that are asked together decode together: `max_sequences` rows at a time, left-padded, each distinct context prefilled once. Rows that
ended leave the batch. Every sample draws from a random stream of its own, so a request's samples depend on its seed and group only, not on what
was decoded beside it (up to the rounding of a matmul with another batch size).

Weights: `update_weights({"named": iterable of (name in the checkpoint, tensor)})` copies into the module. There is no cache between calls that could go stale.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tandem.engine.config import Config
from tandem.engine.digest import combine, digest
from tandem.engine.types import Finish, GenRequest, Sampling, Source, Trajectory
from tandem.rollout.backend import EngineDied, Installed, SyncError

GROWTH = 128        # tokens
KEEP = 0.875        # ended rows are decoded along, and what they draw is dropped, until the others are at most this share of the batch


@dataclass(eq=False)
class Sample:
    """One row of a batch on its way: what it starts from, and what was sampled so far."""

    context: np.ndarray                                     # int32: prompt and forced prefix
    forced: int                                             # length of the forced prefix
    sampling: Sampling
    uniforms: np.ndarray                                    # float64 [max_tokens] in [0, 1): one per response token
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))       # sampled
    logp: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    finish: Finish = Finish.LENGTH


class HFBackend:
    """See rollout.backend.Backend. `before_update` is called before any weight changes: whoever queues requests serves them first."""

    def __init__(self, model_path: str, config: Config, seed: int):
        from tandem.engine.context import engine_length
        from tandem.engine.model import load_policy, load_tokenizer
        from tandem.engine.rope import follow_engines
        model = replace(config.model, path=model_path)
        self.device = torch.device("cuda" if config.cluster.engine_gpus > 0 else "cpu")
        self.model = load_policy(model).model.requires_grad_(False).to(self.device)
        follow_engines(self.model, engine_length(config))       # a debug run computes as a real one
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))     # a tied weight under each of its names
        self.eos = torch.tensor(sorted(end_tokens(self.model, load_tokenizer(model))), device=self.device)
        self.longest = config.rollout.max_model_len or getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_sequences, self.seed = config.rollout.max_sequences, seed
        self.version, self.calls, self.open = 0, 0, True
        self.received: dict[str, str] | None = None         # during an update: {name: digest}
        self.busy_seconds, self.generated_tokens = 0.0, 0
        self.before_update: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls, model_path: str, config: Config, seed: int, log_dir: str | None = None) -> HFBackend:
        """Load the weights of `model_path`, which count as version 0. Raises ConfigError if there are none, or the tokenizer cannot end a response."""
        return cls(model_path, config, seed)

    # -- generation ---------------------------------------------------------------------------------------------------------------------------------

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        return self.generate_all([request])[0]

    async def abort(self, request: GenRequest) -> None:
        """Nothing is running between calls."""

    def generate_all(self, requests: Sequence[GenRequest]) -> list[tuple[Trajectory, ...]]:
        """The samples of every request, in order. Raises ValueError for a request that cannot be served, EngineDied after close or during an update."""
        if not self.open or self.received is not None:
            raise EngineDied("the hf backend was closed" if not self.open else "the hf backend is in the middle of a weight update that did not finish")
        began = time.perf_counter()
        rows = [self.rows(request) for request in requests]
        waiting = [row for group in rows for row in group if row.sampling.max_tokens > row.forced]
        for start in range(0, len(waiting), self.max_sequences):
            decode(self.model, waiting[start:start + self.max_sequences], self.eos)
        for request, group in zip(requests, rows):
            if not all(np.isfinite(row.logp).all() for row in group):
                raise RuntimeError(f"prompt {request.prompt.id!r}: the model's output is not finite with weight version {self.version}")
        self.busy_seconds += time.perf_counter() - began
        self.generated_tokens += sum(len(row.tokens) for row in waiting)
        return [tuple(self.trajectory(request, row) for row in group) for request, group in zip(requests, rows)]

    def rows(self, request: GenRequest) -> list[Sample]:
        """One Sample per sample of the request."""
        prompt, sampling, prefixes = request.prompt.tokens, request.sampling, request.prefixes or [()] * request.samples
        if len(prefixes) != request.samples:
            raise ValueError(f"group {request.group}: {len(prefixes)} prefixes for {request.samples} samples; give one per sample (may be empty) or none")
        if len(prompt) == 0:
            raise ValueError(f"group {request.group}: prompt {request.prompt.id!r} has no tokens; a model needs at least one to start from")
        if self.longest is not None and len(prompt) + sampling.max_tokens > self.longest:
            raise ValueError(f"group {request.group}: prompt {request.prompt.id!r} has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}, together more "
                             f"than the {self.longest} that the model (or rollout.max_model_len) allows; lower rollout.max_tokens or data.max_prompt_tokens")
        self.calls += 1
        entropy = [self.seed, self.calls] if sampling.seed is None else [sampling.seed, request.group]
        uniforms = np.random.default_rng(entropy).random((request.samples, sampling.max_tokens))
        return [Sample(np.concatenate([prompt, np.asarray(prefix, np.int32)]).astype(np.int32), len(prefix), sampling, u) for prefix, u in zip(prefixes, uniforms)]

    def trajectory(self, request: GenRequest, row: Sample) -> Trajectory:
        given, prompt = len(row.context), len(request.prompt.tokens)
        length = given + len(row.tokens)
        source = np.full(length, Source.POLICY, np.int8)
        source[:prompt], source[prompt:given] = Source.PROMPT, request.prefix_source
        logp, version = np.full(length, np.nan, np.float32), np.full(length, -1, np.int32)
        logp[given:], version[given:] = row.logp, self.version
        return Trajectory(prompt_id=request.prompt.id, tokens=np.concatenate([row.context, row.tokens]), source=source, finish=row.finish,
                          behaviour_logp=logp, version=version, group=request.group)

    # -- weights ------------------------------------------------------------------------------------------------------------------------------------

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing to join: the tensors come with the call."""

    async def start_weight_update(self) -> None:
        await self.health()
        self.before_update()
        self.received = {}

    @torch.no_grad()
    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Raises SyncError for a name that the model does not have, a wrong shape, or a call outside of an update."""
        if self.received is None:
            raise SyncError("update_weights before start_weight_update")
        for name, tensor in update_info["named"]:
            parameter = self.parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                raise SyncError(f"weights were sent for {name!r} of shape {list(tensor.shape)}, but the rollout model has "
                                + ("no such parameter" if parameter is None else f"shape {list(parameter.shape)} there"))
            self.received[name] = digest(tensor)
            parameter.copy_(tensor)

    async def finish_weight_update(self, version: int) -> Installed:
        """Raises SyncError if a parameter was not sent; the backend then serves no more."""
        if self.received is None:
            raise SyncError("finish_weight_update before start_weight_update")
        arrived = {id(self.parameters[name]) for name in self.received}
        missing = [name for name, parameter in self.parameters.items() if id(parameter) not in arrived]
        if missing:
            raise SyncError(f"weights {version} are incomplete: {len(missing)} of {len(self.parameters)} parameters were not sent, {missing[0]!r} is the first")
        received, self.received, self.version = self.received, None, version
        return Installed(received, await self.weight_version(), await self.held_digest())

    async def weight_version(self) -> int:
        return self.version

    async def held_digest(self) -> str:
        return combine({name: digest(parameter) for name, parameter in self.model.named_parameters()})

    # -- life ---------------------------------------------------------------------------------------------------------------------------------------

    async def health(self) -> None:
        if not self.open:
            raise EngineDied("the hf backend was closed")

    async def close(self) -> None:
        self.open, self.model, self.parameters = False, None, {}


def end_tokens(model, tokenizer) -> set[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config, as vLLM has it."""
    more = getattr(model.generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])}


def growing_cache(config):
    """transformers' DynamicCache with keys and values written in place, into room for GROWTH more tokens: joining them anew per token was a third of decoding."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class GrowingLayer(DynamicLayer):
        room: tuple[torch.Tensor, torch.Tensor] | None = None       # self.keys and self.values are the filled part of it

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            past, new = self.get_seq_length(), key_states.shape[-2]
            if self.room is None or self.room[0].shape[-2] < past + new:
                rows, heads = key_states.shape[:2]
                room = tuple(x.new_empty(rows, heads, past + new + GROWTH, x.shape[-1]) for x in (key_states, value_states))
                if past:
                    room[0][..., :past, :], room[1][..., :past, :] = self.keys, self.values
                self.room = room
            self.room[0][..., past:past + new, :], self.room[1][..., past:past + new, :] = key_states, value_states
            self.keys, self.values = (x[..., :past + new, :] for x in self.room)
            return self.keys, self.values

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self.room = None

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.inference_mode()
def decode(model, rows: Sequence[Sample], eos: torch.Tensor) -> None:
    """Sample all rows to their ends and fill in tokens, logp and finish. Memory beyond the model: keys and values, and one [rows, V] of logits."""
    device = eos.device
    tensor = lambda values, dtype: torch.tensor(values, dtype=dtype, device=device)
    room = tensor([row.sampling.max_tokens - row.forced for row in rows], torch.long)
    steps = int(room.max())
    uniforms = torch.from_numpy(np.stack([np.pad(row.uniforms[row.forced:], (0, steps - len(row.uniforms) + row.forced)) for row in rows])).to(device)
    temperature, top_p = (tensor([getattr(row.sampling, key) for row in rows], torch.float32) for key in ("temperature", "top_p"))
    earliest = tensor([row.sampling.min_tokens - row.forced for row in rows], torch.long)       # step from which the row may end
    all_may_end = int(earliest.max())
    tokens = torch.zeros(len(rows), steps, dtype=torch.long, device=device)
    logps = torch.zeros(len(rows), steps, device=device)
    length, stopped = torch.zeros_like(room), torch.zeros_like(room, dtype=torch.bool)

    contexts = {row.context.tobytes(): row.context for row in rows}     # the samples of a group share their prompt
    place = {key: i for i, key in enumerate(contexts)}
    ids, mask = (part.to(device) for part in left_padded(list(contexts.values())))
    position = (mask.cumsum(-1) - 1).clamp_(min=0)
    cache = growing_cache(model.config)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    owner = tensor([place[row.context.tobytes()] for row in rows], torch.long)
    cache.reorder_cache(owner)
    logits, mask, position = logits[owner], mask[owner], position[owner, -1:]

    batch = torch.arange(len(rows), device=device)                      # row numbers in the batch
    live = torch.ones_like(batch, dtype=torch.bool)                     # those of them that have not ended
    for step in range(steps):
        logits = logits.float()
        if step < all_may_end:
            logits[(step < earliest[batch])[:, None] & torch.isin(torch.arange(logits.shape[-1], device=device), eos)] = -torch.inf
        token, logp = draw(logits, temperature[batch], top_p[batch], uniforms[batch, step])
        now = batch[live]
        tokens[now, step], logps[now, step], length[now] = token[live], logp[live], step + 1
        ended = torch.isin(token, eos)
        stopped[now] = ended[live]
        live &= ~ended & (step + 1 < room[batch])
        left = int(live.sum())
        if left == 0:
            break
        if left <= KEEP * len(batch):
            keep = live.nonzero().squeeze(-1)
            cache.reorder_cache(keep)
            batch, token, mask, position, live = batch[keep], token[keep], mask[keep], position[keep], live[keep]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + live[:, None]     # ended rows stay within the context
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]

    for row, ids, logp, n, stop in zip(rows, tokens.cpu().numpy(), logps.cpu().numpy(), length.tolist(), stopped.tolist()):
        row.tokens, row.logp, row.finish = ids[:n].astype(np.int32), logp[:n], Finish.STOP if stop else Finish.LENGTH


def left_padded(sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, L] ids and attention mask; the pads (id 0) stand in front."""
    longest = max(map(len, sequences))
    ids, mask = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(2))
    for i, sequence in enumerate(sequences):
        ids[i, longest - len(sequence):], mask[i, longest - len(sequence):] = torch.from_numpy(sequence).long(), 1
    return ids, mask


def draw(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-prob under the distribution it was drawn from, which is the scaled and truncated one.

    logits float32 [B, V], temperature, top_p [B], uniform float64 [B] -> (int64 [B], float32 [B]). Temperature 0 takes the most likely token and
    gives its log-prob at temperature 1, as vLLM does.
    """
    greedy = temperature == 0
    logp = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    if (top_p < 1).any():
        ordered, order = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()               # probability of all more likely tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, (before >= top_p[:, None]) & ~greedy[:, None])
        logp = logp.masked_fill(dropped, -torch.inf).log_softmax(-1)
    cumulative = logp.double().exp_().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    token = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), drawn)
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)
