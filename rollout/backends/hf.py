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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Trajectory
from tandem.engine.weights.digest import combine, digest
from tandem.rollout.backend import Backend
from tandem.rollout.backends.hf_decoding import Sample, decode
from tandem.rollout.trajectories import prefixes_of, trajectory


class HFBackend(Backend):
    def __init__(self, model_path: str, config: Config, seed: int):
        """Load the model. Raises ConfigError if there is none, or the tokenizer cannot end a
        response.
        """
        from tandem.engine.model.context import engine_length
        from tandem.engine.model.load import load_policy
        from tandem.engine.model.resolve import load_tokenizer
        from tandem.engine.model.rope import follow_engines

        section = replace(config.model, path=model_path)
        self.device = torch.device("cuda" if config.cluster.engine_gpus > 0 else "cpu")
        model = load_policy(section).model
        model.requires_grad_(False)
        self.model = model.to(self.device)
        follow_engines(self.model, engine_length(config))  # a debug run computes as a real one
        # a tied weight under each of its names
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        tokenizer = load_tokenizer(section)
        ids = sorted(stop_tokens(self.model, tokenizer))
        self.eos = torch.tensor(ids, device=self.device)
        text_config = self.model.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None)
        self.longest = config.rollout.max_model_len or context
        self.max_sequences = config.rollout.max_sequences
        self.seed = seed
        self.version = 0
        self.calls = 0
        self.open = True
        self.received: dict[str, str] | None = None  # during an update: {name: digest}

    # -- generation

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        (answer,) = await self.generate_all([request])
        return answer

    async def generate_all(self, requests: Sequence[GenRequest]) -> list[tuple[Trajectory, ...]]:
        """The samples of every request, in order.

        Raises ValueError for a request that cannot be served, EngineDied after close or during an
        update.
        """
        await self.health()
        if self.received is not None:
            raise EngineDied(
                "the hf backend is in the middle of a weight update that did not finish"
            )
        groups = []
        waiting = []
        for request in requests:
            rows = self.rows(request)
            groups.append(rows)
            for row in rows:
                if row.max_new_tokens > 0:
                    waiting.append(row)
        for start in range(0, len(waiting), self.max_sequences):
            end = start + self.max_sequences
            decode(self.model, waiting[start:end], self.eos)
        return list(map(self.answer, requests, groups))

    def rows(self, request: GenRequest) -> list[Sample]:
        """One Sample per sample of the request."""
        prompt = request.prompt.tokens
        sampling = request.sampling
        prefixes = prefixes_of(request)
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
        entropy = [self.seed, self.calls]
        if sampling.seed is not None:
            entropy = [sampling.seed, request.group]
        generator = np.random.default_rng(entropy)
        uniforms = generator.random((request.samples, sampling.max_tokens))
        rows = []
        for prefix, own in zip(prefixes, uniforms, strict=True):
            context = np.concatenate([prompt, prefix]).astype(np.int32)
            rows.append(Sample(context, len(prefix), sampling, own))
        return rows

    def answer(self, request: GenRequest, rows: Sequence[Sample]) -> tuple[Trajectory, ...]:
        """Raises RuntimeError for a model whose numbers are not finite."""
        prompt = len(request.prompt.tokens)
        found = []
        for row in rows:
            if not np.isfinite(row.logp).all():
                raise RuntimeError(
                    f"prompt {request.prompt.id!r}: the model's output is not finite with "
                    f"weight version {self.version}"
                )
            prefix = row.context[prompt:]
            found.append(
                trajectory(request, prefix, row.tokens, row.logp, self.version, row.finish)
            )
        return tuple(found)

    # -- weights

    async def start_weight_update(self) -> None:
        await self.health()
        self.received = {}

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Raises SyncError for a name that the model does not have, a wrong shape, or a call
        outside of an update.
        """
        if self.received is None:
            raise SyncError("update_weights before start_weight_update")
        for name, tensor in update_info["named"]:
            parameter = self.parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                there = "no such parameter"
                if parameter is not None:
                    there = f"shape {list(parameter.shape)} there"
                raise SyncError(
                    f"weights were sent for {name!r} of shape {list(tensor.shape)}, but the "
                    f"rollout model has {there}"
                )
            self.received[name] = digest(tensor)
            parameter.copy_(tensor.detach())

    async def finish_weight_update(self, version: int) -> Installed:
        """Raises SyncError if a parameter was not sent; the backend then serves no more."""
        if self.received is None:
            raise SyncError("finish_weight_update before start_weight_update")
        arrived = {id(self.parameters[name]) for name in self.received}
        missing = []
        for name, parameter in self.parameters.items():
            if id(parameter) not in arrived:
                missing.append(name)
        if missing:
            raise SyncError(
                f"weights {version} are incomplete: {len(missing)} of {len(self.parameters)} "
                f"parameters were not sent, {missing[0]!r} is the first"
            )
        received = self.received
        self.received = None
        self.version = version
        return Installed(received, await self.weight_version(), await self.active_digest())

    async def weight_version(self) -> int:
        return self.version

    async def active_digest(self) -> str:
        return combine({name: digest(p) for name, p in self.model.named_parameters()})

    # -- life

    async def health(self) -> None:
        if not self.open:
            raise EngineDied("the hf backend was closed")

    async def close(self) -> None:
        if self.open:
            self.open = False
            self.parameters = {}
            del self.model


def stop_tokens(model, tokenizer) -> set[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation config, as vLLM
    has it.
    """
    more = getattr(model.generation_config, "eos_token_id", None)
    if more is None:
        more = []
    elif not isinstance(more, list):
        more = [more]
    return {tokenizer.eos_token_id, *more}
