"""The learner: policy, optimizer and gradient, and nothing about methods.

It runs a StepPlan and says what happened.

`LearnerRank` is one rank around an engine of engine/learner/local_engine.py. `InlineLearner` is one
such rank in this process (mode=inline, no Ray, no DeepSpeed); `RayLearner` in engine/learner/ray.py
is a group of them in Ray actors, with the same surface.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.autograd.graph import save_on_cpu

from tandem.algorithms.base import Term
from tandem.algorithms.checks.losses import check_vocabulary
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.registry import configured
from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.core.types import MicroBatch, Row, StepPlan, StepReport
from tandem.engine.learner import terms as term_losses
from tandem.engine.learner.metrics import gather, merge, numbers, observe, report
from tandem.engine.learner.packing import pack
from tandem.engine.model.context import engine_length
from tandem.engine.model.export import read_files, write_files, write_weights
from tandem.engine.model.load import load_policy
from tandem.engine.model.policy import Policy, hf_parameters
from tandem.engine.model.rope import follow_engines

# in a checkpoint: the reference, where it is not the run's original model
REFERENCE = "reference.safetensors"


def load_like_engines(config: Config, model_path: str) -> Policy:
    """The model as it is in the folder, computing as the engines of this run do."""
    policy = load_policy(replace(config.model, path=model_path))
    if config.method and configured(config.method).uses_rollouts:
        follow_engines(policy.model, engine_length(config))
    return policy


def build_policy(config: Config, model_path: str) -> Policy:
    policy = load_like_engines(config, model_path)
    if config.method and (method := configured(config.method)).critic:
        policy.add_critic(method.embedding)
    if config.learner.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if config.learner.liger:
        policy.use_liger()
    if config.learner.compile:
        policy.compile_layers(gpu=config.cluster.learner_gpus > 0)
    return policy


class LearnerRank:
    """One rank. `model_path` is the run's original model, also after a resume: the frozen reference
    is loaded from it when first asked for.

    `set_reference` makes the present weights the reference instead; they are then part of every
    checkpoint.
    """

    def __init__(self, config: Config, model_path: str, engine, rank: int = 0, ranks: int = 1):
        self.config, self.engine, self.rank, self.ranks = config, engine, rank, ranks
        self.model: ModelConfig = replace(config.model, path=model_path)
        self.reference: Policy | None = None
        self.own_reference = False  # the reference is not the run's original model
        self.files = read_files(self.model) if rank == 0 else {}

    def shares_prompts(self) -> bool:
        return self.engine.module.shares_prompts

    # -- training

    def step(self, plan: StepPlan) -> StepReport:
        """One optimizer step.

        `plan.micro_batches` holds this rank's own micro-batches, `plan.micro_batches[0]`, and no
        others.

        Metrics, all over the global batch: loss, loss/TERM, TERM/METRIC (token means), grad_norm
        (before clipping), entropy (mean over sampled tokens), gap/max and gap/mean of |learner
        log-prob - rollout log-prob| on tokens sampled with the present weights,
        tokens/{trained,real,padded} (padded: as run, with padding and with shared prompts counted
        once), learning_rate, seconds/{gradient,optimizer}.
        """
        started = time.perf_counter()
        self.engine.set_optimizer(plan.optimizer)
        self.engine.set_learning_rate(plan.learning_rate)
        sums: dict[str, torch.Tensor] = {}
        for micro in plan.micro_batches[0]:
            with (
                save_on_cpu(pin_memory=self.engine.device.type == "cuda")
                if self.config.learner.offload_activations
                else nullcontext()
            ):
                logp, entropy, *more = self._forward(
                    self.engine.forward, micro, plan.temperature, plan.entropy, plan.forward
                )
            loss, found = term_losses.evaluate(
                plan.terms,
                plan.denominators,
                micro,
                term_losses.streams(micro, logp, entropy, *more),
            )
            self.engine.backward(loss)
            merge(
                sums,
                {
                    **found,
                    **observe(micro, logp.detach(), None if entropy is None else entropy.detach()),
                },
            )
        totals = gather(numbers(sums), self.ranks)
        gradient = time.perf_counter()
        norm, applied = self.engine.step()
        done = time.perf_counter()
        metrics = {
            **report(plan, totals),
            "grad_norm": norm,
            "learning_rate": plan.learning_rate,
            "seconds/gradient": gradient - started,
            "seconds/optimizer": done - gradient,
        }
        return StepReport(metrics, skipped=not applied, seconds=done - started)

    def _forward(self, forward, micro: MicroBatch, temperature: float, entropy: bool, custom=None):
        check_vocabulary(micro, self.engine.module.model.get_input_embeddings().num_embeddings)

        def move(array):
            return torch.as_tensor(array, device=self.engine.device)

        if custom is None:
            hook = (None, None, None if micro.tree is None else move(micro.tree))
        else:
            hook = (
                custom,
                {name: move(getattr(micro, name)) for name in ("segment", "group", "source")},
            )
        return forward(
            move(micro.tokens),
            move(micro.positions),
            move(micro.index),
            move(micro.target),
            temperature,
            self.config.learner.head_chunk,
            entropy,
            *hook,
        )

    def logprobs(
        self, rows: Sequence[Row], temperature: float, reference: bool = False
    ) -> list[np.ndarray | None]:
        """The log-probs of `streams`."""
        return self.streams(rows, temperature, reference)["logp"]

    @torch.no_grad()
    def streams(
        self, rows: Sequence[Row], temperature: float, reference: bool = False
    ) -> dict[str, list[np.ndarray | None]]:
        """`logp` and, if there is a critic, `value`: float32 [T] per row, in row order, NaN on
        tokens that are not trained.

        logp is the present policy's (or the frozen reference's) log-prob of the token, value that
        of the state in which it was chosen. Called with the same rows on all ranks; rows that
        another rank computed are None here.
        """
        forward = self._reference() if reference else self.engine.forward
        names = ("logp",) if reference or self.engine.module.critic is None else ("logp", "value")
        plain = [
            Term(name, NLL()) for name in sorted({name for row in rows for name in row.weights})
        ]
        share = pack(
            rows,
            plain,
            self.ranks,
            self.config.learner.micro_batch_tokens,
            version=-1,
            share=self.shares_prompts(),
        )[self.rank]
        results = [(micro, self._forward(forward, micro, temperature, False)) for micro in share]
        out: list[np.ndarray | None] = [None] * len(rows)

        def empty(row):
            return np.full((len(names), len(row.tokens)), np.nan, np.float32)

        if self.rank == 0:  # the packer leaves out rows without a trained token
            out = [None if row.trained.any() else empty(row) for row in rows]
        for micro, (logp, _, value) in results:
            found, place = (
                torch.stack([logp, value][: len(names)]).cpu().numpy(),
                micro.positions.reshape(-1)[micro.index] + 1,
            )
            for number, i in enumerate(micro.rows):
                mine = micro.segment == number
                out[i] = empty(rows[i])
                out[i][:, place[mine]] = found[:, mine]
        return {
            name: [None if one is None else one[k] for one in out] for k, name in enumerate(names)
        }

    def _reference(self) -> Policy:
        if self.reference is None:
            self.reference = (
                load_like_engines(self.config, self.model.path)
                .to(self.engine.device)
                .requires_grad_(False)
            )
        return self.reference

    @torch.no_grad()
    def set_reference(self) -> None:
        """Make the present weights the reference from now on. A collective."""
        frozen = dict(hf_parameters(self._reference()))
        for name, tensor in self.engine.full_parameters():
            frozen[name].copy_(tensor)
        self.own_reference = True

    # -- weights

    def save(self, folder: str | Path) -> None:
        self.engine.save(folder)
        if self.own_reference and self.rank == 0:
            from safetensors.torch import save_file

            save_file(
                {name: p.detach().cpu() for name, p in hf_parameters(self.reference)},
                Path(folder) / REFERENCE,
            )

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        self.engine.load(folder)
        self.own_reference = (Path(folder) / REFERENCE).is_file()
        if self.own_reference:
            from safetensors.torch import load_file

            saved = load_file(Path(folder) / REFERENCE)
            for name, parameter in hf_parameters(self._reference()):
                parameter.copy_(saved[name])
        else:
            self.reference = None

    def export(self, folder: str | Path) -> None:
        """A plain Hugging Face folder, complete with tokenizer, written by rank 0: see
        engine/model/export.py. A collective.
        """
        parameters = self.engine.full_parameters()
        if self.rank > 0:
            for _ in parameters:  # takes part in gathering them
                pass
            return
        folder, policy = Path(folder), self.engine.module
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, self.files, self.model.dtype)
        write_weights(folder, policy.model, policy.origin, parameters)

    def release_memory(self) -> None:
        """Give the GPU what torch keeps cached of freed memory: an engine on the same GPU wakes up
        into it.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def rss(self) -> int:
        """Bytes of memory this process holds."""
        return psutil.Process().memory_info().rss

    def close(self) -> None:
        self.engine.close()
