"""The learner: policy, optimizer and gradient, and nothing about methods. It runs a StepPlan and says what happened.

`LearnerRank` is one rank around an engine of engine/zero.py. `InlineLearner` is one such rank in this process (mode=inline, no Ray, no DeepSpeed);
`RayLearner` in engine/ray_learner.py is a group of them in Ray actors, with the same surface.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.autograd.graph import save_on_cpu

from tandem.algorithms.base import Term, configured
from tandem.algorithms.objectives import NLL
from tandem.engine import terms as term_losses
from tandem.engine.config import Config, ConfigError, ModelConfig
from tandem.engine.context import engine_length
from tandem.engine.digest import digest
from tandem.engine.export import read_files, write_files, write_weights
from tandem.engine.loss_checks import check_vocabulary
from tandem.engine.model import Policy, hf_parameters, load_policy
from tandem.engine.packing import pack
from tandem.engine.rope import follow_engines
from tandem.engine.types import MicroBatch, Row, Source, StepPlan, StepReport
from tandem.engine.zero import LocalEngine
from tandem.launch.machine import keep_freed_memory
from tandem.rollout.backend import Installed

REFERENCE = "reference.safetensors"     # in a checkpoint: the reference, where it is not the run's original model


@dataclass(frozen=True)
class Delivery:
    """What the learner sent and what each rollout engine says of it, for `weights.sync` to compare."""

    sent: dict[str, str]                # {parameter: digest}
    installed: list[Installed]          # one per engine
    bytes: int


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
    """One rank. `model_path` is the run's original model, also after a resume: the frozen reference is loaded from it when first asked for.

    `set_reference` makes the present weights the reference instead; they are then part of every checkpoint.
    """

    def __init__(self, config: Config, model_path: str, engine, rank: int = 0, ranks: int = 1):
        self.config, self.engine, self.rank, self.ranks = config, engine, rank, ranks
        self.model: ModelConfig = replace(config.model, path=model_path)
        self.reference: Policy | None = None
        self.own_reference = False      # the reference is not the run's original model
        self.files = read_files(self.model) if rank == 0 else {}

    def shares_prompts(self) -> bool:
        return self.engine.module.shares_prompts

    # -- training ---------------------------------------------------------------------------------------------------------------------------------

    def step(self, plan: StepPlan) -> StepReport:
        """One optimizer step. `plan.micro_batches` holds this rank's own micro-batches, `plan.micro_batches[0]`, and no others.

        Metrics, all over the global batch: loss, loss/TERM, TERM/METRIC (token means), grad_norm (before clipping), entropy (mean over sampled tokens),
        gap/max and gap/mean of |learner log-prob - rollout log-prob| on tokens sampled with the present weights, tokens/{trained,real,padded}
        (padded: as run, with padding and with shared prompts counted once), learning_rate, seconds/{gradient,optimizer}.
        """
        started = time.perf_counter()
        self.engine.set_optimizer(plan.optimizer)
        self.engine.set_learning_rate(plan.learning_rate)
        sums: dict[str, torch.Tensor] = {}
        for micro in plan.micro_batches[0]:
            with save_on_cpu(pin_memory=self.engine.device.type == "cuda") if self.config.learner.offload_activations else nullcontext():
                logp, entropy, *more = self._forward(self.engine.forward, micro, plan.temperature, plan.entropy, plan.forward)
            loss, found = term_losses.evaluate(plan.terms, plan.denominators, micro, term_losses.streams(micro, logp, entropy, *more))
            self.engine.backward(loss)
            merge(sums, {**found, **observe(micro, logp.detach(), None if entropy is None else entropy.detach())})
        totals = gather(numbers(sums), self.ranks)
        gradient = time.perf_counter()
        norm, applied = self.engine.step()
        done = time.perf_counter()
        metrics = {**report(plan, totals), "grad_norm": norm, "learning_rate": plan.learning_rate,
                   "seconds/gradient": gradient - started, "seconds/optimizer": done - gradient}
        return StepReport(metrics, skipped=not applied, seconds=done - started)

    def _forward(self, forward, micro: MicroBatch, temperature: float, entropy: bool, custom=None):
        check_vocabulary(micro, self.engine.module.model.get_input_embeddings().num_embeddings)
        move = lambda array: torch.as_tensor(array, device=self.engine.device)
        if custom is None:
            hook = (None, None, None if micro.tree is None else move(micro.tree))
        else:
            hook = custom, {name: move(getattr(micro, name)) for name in ("segment", "group", "source")}
        return forward(move(micro.tokens), move(micro.positions), move(micro.index), move(micro.target), temperature, self.config.learner.head_chunk, entropy, *hook)

    def logprobs(self, rows: Sequence[Row], temperature: float, reference: bool = False) -> list[np.ndarray | None]:
        """The log-probs of `streams`."""
        return self.streams(rows, temperature, reference)["logp"]

    @torch.no_grad()
    def streams(self, rows: Sequence[Row], temperature: float, reference: bool = False) -> dict[str, list[np.ndarray | None]]:
        """`logp` and, if there is a critic, `value`: float32 [T] per row, in row order, NaN on tokens that are not trained.

        logp is the present policy's (or the frozen reference's) log-prob of the token, value that of the state in which it was chosen.
        Called with the same rows on all ranks; rows that another rank computed are None here.
        """
        forward = self._reference() if reference else self.engine.forward
        names = ("logp",) if reference or self.engine.module.critic is None else ("logp", "value")
        plain = [Term(name, NLL()) for name in sorted({name for row in rows for name in row.weights})]
        share = pack(rows, plain, self.ranks, self.config.learner.micro_batch_tokens, version=-1, share=self.shares_prompts())[self.rank]
        results = [(micro, self._forward(forward, micro, temperature, False)) for micro in share]
        out: list[np.ndarray | None] = [None] * len(rows)
        empty = lambda row: np.full((len(names), len(row.tokens)), np.nan, np.float32)
        if self.rank == 0:      # the packer leaves out rows without a trained token
            out = [None if row.trained.any() else empty(row) for row in rows]
        for micro, (logp, _, value) in results:
            found, place = torch.stack([logp, value][:len(names)]).cpu().numpy(), micro.positions.reshape(-1)[micro.index] + 1
            for number, i in enumerate(micro.rows):
                mine = micro.segment == number
                out[i] = empty(rows[i])
                out[i][:, place[mine]] = found[:, mine]
        return {name: [None if one is None else one[k] for one in out] for k, name in enumerate(names)}

    def _reference(self) -> Policy:
        if self.reference is None:
            self.reference = load_like_engines(self.config, self.model.path).to(self.engine.device).requires_grad_(False)
        return self.reference

    @torch.no_grad()
    def set_reference(self) -> None:
        """Make the present weights the reference from now on. A collective."""
        frozen = dict(hf_parameters(self._reference()))
        for name, tensor in self.engine.full_parameters():
            frozen[name].copy_(tensor)
        self.own_reference = True

    # -- weights ----------------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        self.engine.save(folder)
        if self.own_reference and self.rank == 0:
            from safetensors.torch import save_file
            save_file({name: p.detach().cpu() for name, p in hf_parameters(self.reference)}, Path(folder) / REFERENCE)

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
        """A plain Hugging Face folder, complete with tokenizer, written by rank 0: see engine/export.py. A collective."""
        parameters = self.engine.full_parameters()
        if self.rank > 0:
            for _ in parameters:        # takes part in gathering them
                pass
            return
        folder, policy = Path(folder), self.engine.module
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, self.files, self.model.dtype)
        write_weights(folder, policy.model, policy.origin, parameters)

    def release_memory(self) -> None:
        """Give the GPU what torch keeps cached of freed memory: an engine on the same GPU wakes up into it."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def rss(self) -> int:
        """Bytes of memory this process holds."""
        return psutil.Process().memory_info().rss

    def close(self) -> None:
        self.engine.close()


def deliver(named: Sequence[tuple[str, torch.Tensor]], backends: Sequence, version: int) -> Delivery:
    """Hand tensors to backends of this process."""
    installed = []
    for backend in backends:
        asyncio.run(backend.start_weight_update())
        asyncio.run(backend.update_weights({"named": named}))
        installed.append(asyncio.run(backend.finish_weight_update(version)))
    return Delivery({name: digest(tensor) for name, tensor in named}, installed, sum(t.numel() * t.element_size() for _, t in named))


def observe(micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a micro-batch shows beside its losses: `observed/` for sums, which no term's name can meet, and `max/` for maxima. Indices are made on the host, so that the GPU is not waited for."""
    found = {"tokens/trained": torch.tensor(float(len(micro.index))), "tokens/real": torch.tensor(float(micro.real_tokens)),
             "tokens/padded": torch.tensor(float(micro.tokens.size))}
    if entropy is not None:
        sampled = np.flatnonzero(micro.source == Source.POLICY)
        found["observed/entropy"] = entropy[torch.as_tensor(sampled, device=logp.device)].sum()
        found["observed/entropy_tokens"] = torch.tensor(float(len(sampled)))
    if "behaviour_logp" in micro.streams:
        fresh = np.flatnonzero(micro.fresh & ~np.isnan(micro.streams["behaviour_logp"]))
        if len(fresh):
            gap = (logp[torch.as_tensor(fresh, device=logp.device)] - torch.as_tensor(micro.streams["behaviour_logp"][fresh], device=logp.device)).abs()
            found |= {"observed/gap": gap.sum(), "max/gap": gap.max(), "observed/gap_tokens": torch.tensor(float(len(fresh)))}
    return found


def merge(into: dict, more: dict) -> None:
    """Add sums, keep the larger of maxima."""
    for key, value in more.items():
        if key not in into:
            into[key] = value
        elif key.startswith("max/"):
            into[key] = torch.maximum(into[key], value) if isinstance(value, torch.Tensor) else float(np.maximum(into[key], value))     # both keep NaN
        else:
            into[key] = into[key] + value


def numbers(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The one place where a step waits for the device: a single copy to the host."""
    device = next((v.device for v in sums.values() if v.device.type != "cpu"), "cpu")
    values = torch.stack([v.to(device, torch.float32, non_blocking=True) for v in sums.values()]).tolist() if sums else []
    return dict(zip(sums, values))


def gather(mine: dict[str, float], ranks: int) -> dict[str, float]:
    """The same totals on every rank; ranks may have different keys (a rank without rows has none of a term's)."""
    if ranks == 1:
        return mine
    everyone: list = [None] * ranks
    torch.distributed.all_gather_object(everyone, mine)
    totals: dict[str, float] = {}
    for one in everyone:
        merge(totals, one)
    return totals


def report(plan: StepPlan, totals: dict[str, float]) -> dict[str, float]:
    """Sums of the global batch as metrics."""
    metrics = {key: value for key, value in totals.items() if key.startswith(("loss/", "tokens/"))}
    metrics["loss"] = sum(term.coefficient * totals.get(f"loss/{term.name}", 0.0) for term in plan.terms)
    metrics |= term_losses.means(totals)
    if totals.get("observed/entropy_tokens"):
        metrics["entropy"] = totals["observed/entropy"] / totals["observed/entropy_tokens"]
    if totals.get("observed/gap_tokens"):
        metrics |= {"gap/max": totals["max/gap"], "gap/mean": totals["observed/gap"] / totals["observed/gap_tokens"]}
    return metrics


class InlineLearner:
    """The learner of mode=inline: one rank in this process, weights handed to the pool's backends directly."""

    ranks = 1

    def __init__(self, rank: LearnerRank):
        self.rank, self.pool, self.synced = rank, None, None
        self.shares_prompts = rank.shares_prompts()
        self.step, self.logprobs, self.streams, self.set_reference = rank.step, rank.logprobs, rank.streams, rank.set_reference
        self.save, self.load, self.export, self.close = rank.save, rank.load, rank.export, rank.close

    @classmethod
    def start(cls, config: Config, model_path: str) -> InlineLearner:
        """Raises ConfigError if cluster.learner_gpus asks for a GPU that is not there."""
        gpu = config.cluster.learner_gpus > 0
        if gpu and not torch.cuda.is_available():
            raise ConfigError(f"cluster.learner_gpus is {config.cluster.learner_gpus:g}, but torch finds no GPU here; set it to 0")
        if not gpu:
            keep_freed_memory()
        torch.set_num_threads(config.cluster.threads)
        torch.manual_seed(config.run.seed)
        return cls(LearnerRank(config, model_path, LocalEngine(build_policy(config, model_path), config.learner, gpu)))

    def connect(self, pool) -> None:
        self.pool = pool

    def send(self, version: int) -> Delivery:
        """Put the present weights into every backend of the pool."""
        return deliver(list(self.rank.engine.full_parameters()), self.pool.backends, version)

    def rss(self) -> list[int]:
        """Bytes of memory per rank."""
        return [self.rank.rss()]
