"""The two engines under the learner: `ZeroEngine` (DeepSpeed ZeRO 0-3, any number of ranks) and `LocalEngine` (Accelerate, one process).

Both have the same methods and the same contract:
  * The caller owns the step boundary: any number of `backward` calls, then one `step`. Nothing is divided by a number of micro-batches.
  * Losses are shares of a sum that is already divided by its global denominators, so gradients are added up over micro-batches and ranks.
  * `step` clips by the global norm and returns that norm as it was before clipping. A norm that is not finite leaves weights and moments alone, on all ranks.
  * AdamW works on fp32 master weights, also where the model is bfloat16.
  * AdamW's moments come in named sets, so that two stages of a run can keep theirs apart; a new name starts from zero.
"""
from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from tandem.engine.config import ConfigError, LearnerConfig
from tandem.engine.model import Policy, hf_parameters

BUCKET = 50_000_000     # elements reduced at once; DeepSpeed's own 500 million would reserve 2 GB for a model of any size


def adamw(parameters, learner: LearnerConfig) -> torch.optim.AdamW:
    """The optimizer of both engines. Its learning rate is set before every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=learner.betas, weight_decay=learner.weight_decay)


def follow(optimizer: torch.optim.AdamW, learner: LearnerConfig) -> None:
    """After a checkpoint was loaded: the config's settings, not those it was written with."""
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = learner.betas, learner.weight_decay


class Moments:
    """Named sets of one AdamW's moments. The set in use lives in the optimizer, the others are parked here."""

    def __init__(self, optimizer: torch.optim.AdamW, masters: list[torch.Tensor]):
        self.optimizer, self.masters = optimizer, masters
        self.name, self.parked = "main", {}

    def use(self, name: str) -> None:
        if name != self.name:
            self.parked[self.name] = self.optimizer.state
            self.optimizer.state = self.parked.pop(name, defaultdict(dict))
            self.name = name

    def state_dict(self) -> dict:
        """The parked sets and the name of the one in use, which the engine saves itself."""
        return {"name": self.name, "parked": {name: [dict(state.get(m, {})) for m in self.masters] for name, state in self.parked.items()}}

    def load_state_dict(self, saved: dict) -> None:
        self.name = saved["name"]
        self.parked = {name: defaultdict(dict, {m: s for m, s in zip(self.masters, states, strict=True) if s}) for name, states in saved["parked"].items()}


def random_state() -> dict:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def read_state(folder: str | Path, rank: int, layout: dict) -> dict:
    """rank_R.pt of a checkpoint. Raises ConfigError if it was written with another layout (ranks, ZeRO stage, dtype), which cannot be read back exactly."""
    for path in (Path(folder) / f"rank_{rank}.pt", Path(folder) / "rank_0.pt"):
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            break
    else:
        raise ConfigError(f"checkpoint {folder} has no {path.name}: it is not a learner's checkpoint")
    if state["layout"] != layout:
        raise ConfigError(f"checkpoint {folder} was written with {state['layout']}, this run has {layout}: set mode, cluster.learner_ranks, learner.zero_stage, "
                          "learner.offload_optimizer, model.dtype and method as they were to resume, or start a new run from an exported model")
    return state


class LocalEngine:
    """One process, no DeepSpeed: for mode=inline, and the yardstick that ZeroEngine is tested against."""

    def __init__(self, policy: Policy, learner: LearnerConfig, gpu: bool = False):
        from accelerate import Accelerator
        self.accelerator = Accelerator(cpu=not gpu, mixed_precision="no")
        self.layout = {"engine": "inline", "dtype": str(next(policy.parameters()).dtype), "critic": policy.critic is not None}
        self.device, self.clip, self.learner = self.accelerator.device, learner.grad_clip, learner
        self.module = self.accelerator.prepare(policy)
        self.weights = [p for p in policy.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.weights]
        self.optimizer = adamw(self.masters, learner)
        self.moments = Moments(self.optimizer, self.masters)

    def forward(self, *inputs):
        return self.module(*inputs)

    @torch.no_grad()
    def _collect(self) -> None:
        """Add gradients of bfloat16 weights to their masters' in fp32, so that many micro-batches do not round each other away."""
        for weight, master in zip(self.weights, self.masters):
            if weight is not master and weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)
        self._collect()

    def step(self) -> tuple[float, bool]:
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.clip or math.inf))
        if applied := math.isfinite(norm):
            self.optimizer.step()
            self._refresh()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    @torch.no_grad()
    def _refresh(self) -> None:
        for weight, master in zip(self.weights, self.masters):
            if weight is not master:
                weight.copy_(master)

    def set_optimizer(self, name: str) -> None:
        self.moments.use(name)

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in hf_parameters(self.module):
            yield name, parameter.detach()

    def save(self, folder: str | Path) -> None:
        """Everything that an exact resume needs: weights.safetensors (fp32 masters) and rank_0.pt."""
        from safetensors.torch import save_file
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({f"{i}": m.detach().contiguous() for i, m in enumerate(self.masters)}, Path(folder) / "weights.safetensors")
        state = {"layout": self.layout, "optimizer": self.optimizer.state_dict(), "moments": self.moments.state_dict(), "random": random_state()}
        torch.save(state, Path(folder) / "rank_0.pt")

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Raises ConfigError if the checkpoint was written by another kind of learner."""
        from safetensors.torch import load_file
        state = read_state(folder, 0, self.layout)
        saved = load_file(Path(folder) / "weights.safetensors")
        for i, master in enumerate(self.masters):
            master.copy_(saved[f"{i}"])
        self._refresh()
        self.optimizer.load_state_dict(state["optimizer"])
        follow(self.optimizer, self.learner)
        self.moments.load_state_dict(state["moments"])
        set_random_state(state["random"])

    def close(self) -> None:
        self.accelerator.free_memory()


def join(rank: int, ranks: int, address: str, port: int, timeout: float, gpu: bool = False) -> None:
    """Join the learner's process group: NCCL with a GPU per rank, else gloo. Once per process, before any ZeroEngine."""
    if not gpu:     # also on a machine that has some
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port))
    import logging

    import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory collective first. A build that was killed leaves a lock file behind, on which every later start waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", rank=rank, world_size=ranks, init_method=f"tcp://{address}:{port}",
                               timeout=timedelta(seconds=timeout), auto_mpi_discovery=False, verbose=False)


def zero_config(stage: int, dtype: torch.dtype, clip: float, offload: bool, persistent: int) -> dict:
    """DeepSpeed's settings. Gradient clipping is written out because its default is 1.0, not off."""
    # Stage 0 reduces at a boundary that we set; from stage 1 on DeepSpeed lets the caller own it ("unmanaged") and `step` is the boundary.
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": stage == 0,
              "gradient_clipping": clip, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**62,
              "bf16": {"enabled": dtype == torch.bfloat16},
              "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": persistent}}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.distributed.get_backend() == "nccl"}
    if dtype == torch.bfloat16 and stage > 0:       # stage 0 has no such choice: there DeepSpeed adds micro-batches up in bfloat16
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class ZeroEngine:
    """DeepSpeed. One engine per process and process group; call `join` first. Parameters below `persistent` elements are not split at stage 3."""

    def __init__(self, policy: Policy, learner: LearnerConfig, persistent: int = 100_000, bucket_mib: int = 64):
        import deepspeed
        self.stage, self.bucket, self.learner = learner.zero_stage, bucket_mib * 2**20, learner
        self.ranks, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        inner = adamw([p for p in policy.parameters() if p.requires_grad], learner)
        dtype = next(policy.parameters()).dtype
        self.layout = {"engine": "deepspeed", "dtype": str(dtype), "critic": policy.critic is not None, "ranks": self.ranks, "zero_stage": self.stage, "offload_optimizer": learner.offload_optimizer}
        config = zero_config(self.stage, dtype, learner.grad_clip, learner.offload_optimizer, persistent)
        self.engine, _, _, _ = deepspeed.initialize(model=policy, optimizer=inner, config=config, dist_init_required=False)
        self.module, self.device, self.inner = self.engine.module, self.engine.device, inner
        if self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(False)
        # Stage 3 hands its masters to AdamW one at a time, so AdamW's own list is empty between steps.
        masters = self.engine.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else [p for g in inner.param_groups for p in g["params"]]
        self.moments = Moments(inner, list(masters))

    def forward(self, *inputs):
        return self.engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.ranks)     # DeepSpeed averages over ranks; we want the sum

    def step(self) -> tuple[float, bool]:
        if self.stage == 0:
            return self._step_unpartitioned()
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()

    def _step_unpartitioned(self) -> tuple[float, bool]:
        """Stage 0 has neither a gradient norm nor a check of it: reduce, look, then let DeepSpeed clip and step."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])))
        if applied := math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        self.engine.set_gradient_accumulation_boundary(False)
        return norm, applied

    def set_optimizer(self, name: str) -> None:
        self.moments.use(name)

    def set_learning_rate(self, value: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = value

    def parameter_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) in the order of full_parameters; no communication."""
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in hf_parameters(self.module)]

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters in full, on every rank: a collective at stage 3. A tensor is valid only until the next one is asked for."""
        if self.stage < 3:
            yield from ((name, p.detach()) for name, p in hf_parameters(self.module))
            return
        from deepspeed.runtime.zero import GatheredParameters
        bucket, size = [], 0
        for name, parameter in [*hf_parameters(self.module), (None, None)]:
            bytes_ = 0 if parameter is None else parameter.ds_numel * parameter.element_size()
            if bucket and (parameter is None or size + bytes_ > self.bucket):
                with GatheredParameters([p for _, p in bucket]):
                    yield from ((n, p.detach()) for n, p in bucket)
                bucket, size = [], 0
            bucket.append((name, parameter))
            size += bytes_

    def save(self, folder: str | Path) -> None:
        """All ranks write into the same folder: DeepSpeed's own checkpoint, and rank_R.pt with what DeepSpeed does not know of."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)
        torch.save({"layout": self.layout, "moments": self.moments.state_dict(), "random": random_state()}, Path(folder) / f"rank_{self.rank}.pt")
        torch.distributed.barrier()

    def load(self, folder: str | Path) -> None:
        """Raises ConfigError if the checkpoint was written by another kind of learner."""
        state = read_state(folder, self.rank, self.layout)
        self.engine.load_checkpoint(str(folder), tag="zero", load_lr_scheduler_states=False)
        follow(self.inner, self.learner)
        self.moments.load_state_dict(state["moments"])
        set_random_state(state["random"])

    def close(self) -> None:
        """Without this a ZeRO-3 process does not leave the interpreter."""
        self.engine.destroy()
        torch.distributed.destroy_process_group()


def check_offload(stage: int) -> None:
    """Raise ConfigError if this DeepSpeed loses micro-batches when the optimizer is offloaded to the CPU. Call on all ranks, after `join`.

    A released DeepSpeed (PR 6550, repaired by PR 7967) gave the offloaded optimizer the gradients of the first micro-batch alone and thereby
    distorted published baselines, so we do not trust a version number: one SGD step over two micro-batches must move the weights by their sum.
    """
    import deepspeed
    ranks = torch.distributed.get_world_size()
    module = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
                                           config=zero_config(stage, torch.float32, 0.0, True, 0), dist_init_required=False)
    inputs = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 5.0, 6.0, 7.0, 8.0]], device=engine.device)
    for x in inputs:
        engine.backward(engine(x).sum() * ranks)
    engine.step()
    from deepspeed.runtime.zero import GatheredParameters
    with GatheredParameters([module.weight], enabled=stage == 3):
        moved = -module.weight.detach().flatten().clone()
    engine.destroy()
    expected = inputs.sum(0) * ranks
    if not torch.equal(moved, expected):
        raise ConfigError(f"learner.offload_optimizer=true with zero_stage={stage}: DeepSpeed {deepspeed.__version__} (torch {torch.__version__}) drops gradients of "
                          f"micro-batches: two of them should move the weights by {expected.tolist()}, they moved by {moved.tolist()}. "
                          "Set learner.offload_optimizer=false or install another DeepSpeed")
