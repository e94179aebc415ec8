"""Rollouts from a transformers model in this process: the backend of mode=inline, of CPU debugging
and of the tests.

Requests that are asked together decode together: `max_sequences` rows at a time, left-padded, each
distinct context prefilled once. Rows that ended leave the batch. Every sample draws from a random
stream of its own, so a request's samples depend on its seed and group only, not on what was decoded
beside it (up to the rounding of a matmul with another batch size).

Weights: `update_weights({"named": iterable of (name in the checkpoint, tensor)})` copies into the
module. There is no cache between calls that could go stale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.types import GenRequest, Installed, Source, Trajectory
from tandem.engine.weights.digest import combine, digest
from tandem.rollout.backends.hf_decoding import Sample, decode


class HFBackend:
    """See rollout.backend.Backend.

    `before_update` is called before any weight changes: whoever queues requests serves them first.
    """

    def __init__(self, model_path: str, config: Config, seed: int):
        from tandem.engine.model.context import engine_length
        from tandem.engine.model.load import load_policy
        from tandem.engine.model.resolve import load_tokenizer
        from tandem.engine.model.rope import follow_engines

        model = replace(config.model, path=model_path)
        self.device = torch.device("cuda" if config.cluster.engine_gpus > 0 else "cpu")
        self.model = load_policy(model).model.requires_grad_(False).to(self.device)
        follow_engines(self.model, engine_length(config))  # a debug run computes as a real one
        # a tied weight under each of its names
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.eos = torch.tensor(
            sorted(end_tokens(self.model, load_tokenizer(model))), device=self.device
        )
        self.longest = config.rollout.max_model_len or getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )
        self.max_sequences, self.seed = config.rollout.max_sequences, seed
        self.version, self.calls, self.open = 0, 0, True
        self.received: dict[str, str] | None = None  # during an update: {name: digest}
        self.busy_seconds, self.generated_tokens = 0.0, 0
        self.before_update: Callable[[], None] = lambda: None

    @classmethod
    async def start(
        cls, model_path: str, config: Config, seed: int, log_dir: str | None = None
    ) -> HFBackend:
        """Load the weights of `model_path`, which count as version 0.

        Raises ConfigError if there are none, or the tokenizer cannot end a response.
        """
        return cls(model_path, config, seed)

    # -- generation

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        return self.generate_all([request])[0]

    async def abort(self, request: GenRequest) -> None:
        """Nothing is running between calls."""

    def generate_all(self, requests: Sequence[GenRequest]) -> list[tuple[Trajectory, ...]]:
        """The samples of every request, in order.

        Raises ValueError for a request that cannot be served, EngineDied after close or during an
        update.
        """
        if not self.open or self.received is not None:
            raise EngineDied(
                "the hf backend was closed"
                if not self.open
                else "the hf backend is in the middle of a weight update that did not finish"
            )
        began = time.perf_counter()
        rows = [self.rows(request) for request in requests]
        waiting = [row for group in rows for row in group if row.room > 0]
        for start in range(0, len(waiting), self.max_sequences):
            decode(self.model, waiting[start : start + self.max_sequences], self.eos)
        for request, group in zip(requests, rows, strict=True):
            if not all(np.isfinite(row.logp).all() for row in group):
                raise RuntimeError(
                    f"prompt {request.prompt.id!r}: the model's output is not finite with "
                    f"weight version {self.version}"
                )
        self.busy_seconds += time.perf_counter() - began
        self.generated_tokens += sum(len(row.tokens) for row in waiting)
        return [
            tuple(self.trajectory(request, row) for row in group)
            for request, group in zip(requests, rows, strict=True)
        ]

    def rows(self, request: GenRequest) -> list[Sample]:
        """One Sample per sample of the request."""
        prompt, sampling, prefixes = (
            request.prompt.tokens,
            request.sampling,
            request.prefixes or [()] * request.samples,
        )
        if len(prefixes) != request.samples:
            raise ValueError(
                f"group {request.group}: {len(prefixes)} prefixes for {request.samples} "
                "samples; give one per sample (may be empty) or none"
            )
        if len(prompt) == 0:
            raise ValueError(
                f"group {request.group}: prompt {request.prompt.id!r} has no tokens; a model "
                "needs at least one to start from"
            )
        if self.longest is not None and len(prompt) + sampling.max_tokens > self.longest:
            raise ValueError(
                f"group {request.group}: prompt {request.prompt.id!r} has {len(prompt)} "
                f"tokens and max_tokens is {sampling.max_tokens}, together more "
                f"than the {self.longest} that the model (or rollout.max_model_len) allows; "
                "lower rollout.max_tokens or data.max_prompt_tokens"
            )
        self.calls += 1
        entropy = (
            [self.seed, self.calls] if sampling.seed is None else [sampling.seed, request.group]
        )
        uniforms = np.random.default_rng(entropy).random((request.samples, sampling.max_tokens))
        return [
            Sample(
                np.concatenate([prompt, np.asarray(prefix, np.int32)]).astype(np.int32),
                len(prefix),
                sampling,
                u,
            )
            for prefix, u in zip(prefixes, uniforms, strict=True)
        ]

    def trajectory(self, request: GenRequest, row: Sample) -> Trajectory:
        given, prompt = len(row.context), len(request.prompt.tokens)
        length = given + len(row.tokens)
        source = np.full(length, Source.POLICY, np.int8)
        source[:prompt], source[prompt:given] = Source.PROMPT, request.prefix_source
        logp, version = np.full(length, np.nan, np.float32), np.full(length, -1, np.int32)
        logp[given:], version[given:] = row.logp, self.version
        return Trajectory(
            prompt_id=request.prompt.id,
            tokens=np.concatenate([row.context, row.tokens]),
            source=source,
            finish=row.finish,
            behaviour_logp=logp,
            version=version,
            group=request.group,
        )

    # -- weights

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing to join: the tensors come with the call."""

    async def start_weight_update(self) -> None:
        await self.health()
        self.before_update()
        self.received = {}

    @torch.no_grad()
    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Raises SyncError for a name that the model does not have, a wrong shape, or a call
        outside of an update.
        """
        if self.received is None:
            raise SyncError("update_weights before start_weight_update")
        for name, tensor in update_info["named"]:
            parameter = self.parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                raise SyncError(
                    (
                        f"weights were sent for {name!r} of shape {list(tensor.shape)}, but the "
                        "rollout model has "
                    )
                    + (
                        "no such parameter"
                        if parameter is None
                        else f"shape {list(parameter.shape)} there"
                    )
                )
            self.received[name] = digest(tensor)
            parameter.copy_(tensor)

    async def finish_weight_update(self, version: int) -> Installed:
        """Raises SyncError if a parameter was not sent; the backend then serves no more."""
        if self.received is None:
            raise SyncError("finish_weight_update before start_weight_update")
        arrived = {id(self.parameters[name]) for name in self.received}
        missing = [
            name for name, parameter in self.parameters.items() if id(parameter) not in arrived
        ]
        if missing:
            raise SyncError(
                f"weights {version} are incomplete: {len(missing)} of {len(self.parameters)} "
                f"parameters were not sent, {missing[0]!r} is the first"
            )
        received, self.received, self.version = self.received, None, version
        return Installed(received, await self.weight_version(), await self.held_digest())

    async def weight_version(self) -> int:
        return self.version

    async def held_digest(self) -> str:
        return combine(
            {name: digest(parameter) for name, parameter in self.model.named_parameters()}
        )

    # -- life

    async def health(self) -> None:
        if not self.open:
            raise EngineDied("the hf backend was closed")

    async def close(self) -> None:
        self.open, self.model, self.parameters = False, None, {}


def end_tokens(model, tokenizer) -> set[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config, as vLLM
    has it.
    """
    more = getattr(model.generation_config, "eos_token_id", None)
    return {
        tokenizer.eos_token_id,
        *(more if isinstance(more, list) else [] if more is None else [more]),
    }
