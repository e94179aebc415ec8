"""One learner rank: policy, optimizer and gradient, and nothing about methods.

It runs a StepPlan and says what happened.

`LearnerRank` works around an engine of engine/learner/local_engine.py. `InlineLearner` is one
such rank in this process (mode=inline, no Ray, no DeepSpeed); `RayLearner` in engine/learner/ray.py
is a group of them in Ray actors, with the same surface.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from tandem.algorithms.base import Term
from tandem.algorithms.checks.losses import check_vocabulary
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.engine.config.names import POLICY, split_view
from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.core.types import NO_VERSION, MicroBatch, Row, StepPlan, StepReport
from tandem.engine.learner.metrics import StepMetrics, gather, observe, step_report
from tandem.engine.learner.models import OtherModels, load_like_engines, vocabulary
from tandem.engine.learner.packing import pack
from tandem.engine.learner.protocol import PolicySpec, TrainEngine
from tandem.engine.learner.terms import make_tokens, micro_batch_loss
from tandem.engine.model.adapters import write_adapter
from tandem.engine.model.export import read_files, write_files, write_weights
from tandem.engine.model.measured_head import HeadInputs
from tandem.engine.model.policy import Policy
from tandem.engine.model.quantities import Quantity
from tandem.engine.model.scope import apply_scope
from tandem.engine.model.view import View


def build_policy(config: Config, model_path: str, spec: PolicySpec) -> Policy:
    policy = load_like_engines(config, model_path, spec)
    if spec.critic:
        policy.add_critic(spec.embedding)
    apply_scope(policy, config.scope, config.run.seed)
    if config.learner.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if config.learner.liger:
        policy.use_liger()
    if config.learner.compile:
        policy.compile_layers(gpu=config.cluster.learner_gpus > 0)
    return policy


def no_number(row: Row) -> np.ndarray:
    """float32 [T] of NaN."""
    return np.full(len(row.tokens), np.nan, np.float32)


def scatter_to_rows(
    micro: MicroBatch, values_n: np.ndarray, rows: Sequence[Row], out: list[np.ndarray | None]
) -> None:
    """Put the numbers of a micro-batch's trained tokens where they stand in their rows: out[i]
    becomes float32 [T] for every row i of the micro-batch, NaN elsewhere.
    """
    predicted_n = micro.positions.reshape(-1)[micro.index] + 1
    for number, i in enumerate(micro.rows):
        mine = micro.segment == number
        stream = no_number(rows[i])
        stream[predicted_n[mine]] = values_n[mine]
        out[i] = stream


def merge_rank_streams(
    ranks: Sequence[dict[str, list[np.ndarray | None]]],
) -> dict[str, list[np.ndarray]]:
    """Per row the stream of the rank that computed it; all other ranks have None there."""
    streams = {}
    for name in ranks[0]:
        per_row = zip(*[streams_of_rank[name] for streams_of_rank in ranks], strict=True)
        streams[name] = [next(one for one in found if one is not None) for found in per_row]
    return streams


class LearnerRank:
    """One rank. `model_path` is the run's original model, also after a resume. `models` are those
    beside the policy: the frozen reference, and teachers.
    """

    def __init__(
        self,
        config: Config,
        model_path: str,
        spec: PolicySpec,
        engine: TrainEngine,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.config = config
        self.spec = spec
        self.engine = engine
        self.rank = rank
        self.ranks = ranks
        self.model: ModelConfig = replace(config.model, path=model_path)
        self.models = OtherModels(config, model_path, spec, engine)
        self.set_reference = self.models.set_reference
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
        self.engine.choose_half(plan.step)
        self.engine.set_optimizer(plan.optimizer)
        self.engine.set_learning_rate(plan.learning_rate)
        metrics = StepMetrics()
        for micro in plan.micro_batches[0]:
            with self.kept_activations():
                outputs = self.run_micro_batch(
                    self.engine.forward,
                    micro,
                    plan.temperature,
                    plan.entropy,
                    plan.quantities,
                    plan.forward,
                )
            tokens = make_tokens(micro, outputs)
            loss, found = micro_batch_loss(plan.terms, plan.denominators, micro, tokens)
            self.engine.backward(loss)
            metrics.merge(found)
            observe(metrics, micro, outputs["logp"], outputs.get("entropy"))
        totals = gather(metrics.on_host(), self.ranks)
        gradient = time.perf_counter()
        stepped = self.engine.step()
        if stepped.applied:
            self.models.follow_policy()
        done = time.perf_counter()
        report = {
            **step_report(plan, totals),
            "grad_norm": stepped.grad_norm,
            "learning_rate": plan.learning_rate,
            "seconds/gradient": gradient - started,
            "seconds/optimizer": done - gradient,
        }
        return StepReport(report, skipped=not stepped.applied, seconds=done - started)

    def kept_activations(self) -> AbstractContextManager:
        """Where forward keeps what backward needs: on the device, or in CPU memory."""
        if not self.config.learner.offload_activations:
            return nullcontext()
        return save_on_cpu(pin_memory=self.engine.device.type == "cuda")

    def run_micro_batch(
        self,
        forward: Callable[[View, Callable | None], Mapping[str, Tensor]],
        micro: MicroBatch,
        temperature: float,
        entropy: bool = False,
        quantities: Mapping[str, Quantity] | None = None,
        custom: Callable | None = None,
    ) -> dict[str, Tensor]:
        """Run a micro-batch through `forward`, that of a Policy, or through a method's own: float32
        [n] by name, as Policy.forward returns them.
        """
        check_vocabulary(micro, vocabulary(self.engine.module))
        view = View(
            tokens=self.to_device(micro.tokens),
            positions=self.to_device(micro.positions),
            index=self.to_device(micro.index),
            target=self.to_device(micro.target),
            segment=self.to_device(micro.segment),
            group=self.to_device(micro.group),
            source=self.to_device(micro.source),
            prompt_blocks=self.to_device(micro.prompt_blocks),
            temperature=temperature,
            chunk=self.config.learner.head_chunk,
            entropy=entropy,
        )
        if quantities:
            view = self.with_quantities(view, micro, quantities)
        return dict(forward(view, custom))

    def with_quantities(
        self, view: View, micro: MicroBatch, quantities: Mapping[str, Quantity]
    ) -> View:
        """The view that asks for quantities too, with the streams and models that they read."""
        data = {name for quantity in quantities.values() for name in quantity.data}
        models = {name for quantity in quantities.values() for name in quantity.models}
        streams = {name: micro.streams[name] for name in sorted(data & micro.streams.keys())}
        return replace(
            view,
            quantities=quantities,
            data={name: self.to_device(stream) for name, stream in streams.items()},
            others={name: self.beside(name, view, micro) for name in sorted(models)},
        )

    def beside(self, model: str, view: View, micro: MicroBatch) -> HeadInputs:
        """`NAME` or `NAME@VIEW` at the tokens of the micro-batch."""
        name, other_prompt = split_view(model)
        if other_prompt:
            bins = micro.views[other_prompt]
            view = replace(
                view,
                tokens=self.to_device(bins.tokens),
                positions=self.to_device(bins.positions),
                index=self.to_device(bins.index),
                prompt_blocks=None,
            )
        return self.models.beside(name, view)

    def to_device(self, array: np.ndarray | None) -> Any:
        if array is None:
            return None
        return torch.as_tensor(array, device=self.engine.device)

    def logprobs(
        self, rows: Sequence[Row], temperature: float, model: str = POLICY
    ) -> list[np.ndarray | None]:
        """The log-probs of `compute_streams`."""
        return self.compute_streams(rows, temperature, model)["logp"]

    @torch.no_grad()
    def compute_streams(
        self,
        rows: Sequence[Row],
        temperature: float,
        model: str = POLICY,
        quantities: Mapping[str, Quantity] | None = None,
    ) -> dict[str, list[np.ndarray | None]]:
        """`logp`, the `quantities`, and `value` if there is a critic: float32 [T] per row, in row
        order, NaN on tokens that are not trained.

        logp is the log-prob of the token under the present policy or the other `model`, value the
        critic's of the state in which it was chosen. Called with the same rows on all ranks; rows
        that another rank computed are None here.
        """
        with_value = self.engine.module.critic is not None and model == POLICY
        every_term = sorted({name for row in rows for name in row.weights})
        # only which tokens count is read of these terms, and no token's version
        micro_batches = pack(
            rows,
            [Term(name, NLL()) for name in every_term],
            self.ranks,
            self.config.learner.micro_batch_tokens,
            version=NO_VERSION,
            share_prompts=self.shares_prompts(),
        )[self.rank]
        with self.models.scored_by(model) as forward:
            outputs = []
            for micro in micro_batches:
                output = self.run_micro_batch(forward, micro, temperature, quantities=quantities)
                outputs.append(output)
        found = {"logp": self.empty_streams(rows)}
        for name in quantities or ():
            found[name] = self.empty_streams(rows)
        if with_value:
            found["value"] = self.empty_streams(rows)
        for micro, out in zip(micro_batches, outputs, strict=True):
            for name, per_row in found.items():
                scatter_to_rows(micro, out[name].cpu().numpy(), rows, per_row)
        return found

    def empty_streams(self, rows: Sequence[Row]) -> list[np.ndarray | None]:
        """NaN for rows without a trained token, which the packer leaves out, on rank 0; None for
        all others.
        """
        return [
            no_number(row) if self.rank == 0 and not row.trained.any() else None for row in rows
        ]

    # -- weights

    def save(self, folder: str | Path) -> None:
        self.engine.save(folder)
        if self.rank == 0:
            self.models.save(Path(folder))

    def load(self, folder: str | Path) -> None:
        self.engine.load(folder)
        self.models.load(Path(folder))

    def export(self, folder: str | Path) -> None:
        """A plain Hugging Face folder, complete with tokenizer, written by rank 0: see
        engine/model/export.py; with scope.export=adapter the adapters alone. A collective.
        """
        only_adapters = self.config.scope.export == "adapter"
        parameters = self.engine.full_parameters(only_adapters)
        if self.rank > 0:
            for _ in parameters:  # takes part in gathering them
                pass
            return
        folder, policy = Path(folder), self.engine.module
        folder.mkdir(parents=True, exist_ok=True)
        if only_adapters:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in parameters}
            write_adapter(folder, tensors, policy, self.config.scope, self.model.path)
            return
        write_files(folder, self.files, self.model.dtype)
        assert policy.origin is not None  # load_policy noted it
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
