"""A DeepSpeed ZeRO engine behind the calls of LocalEngine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.engine.config.schema import LearnerConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.local_engine import (
    Moments,
    adamw,
    choose_half,
    follow,
    half_adamw,
    random_state,
    read_state,
    set_random_state,
)
from tandem.engine.learner.protocol import Stepped
from tandem.engine.model.adapters import HfTensor, adapter_tensors, hf_tensors
from tandem.engine.model.policy import Policy
from tandem.engine.model.view import View

# elements reduced at once; DeepSpeed's own 500 million would reserve 2 GB for a model of any size
BUCKET = 50_000_000


def zero_config(
    stage: int, dtype: torch.dtype, clip: float, offload: bool, persistent: int
) -> dict:
    """DeepSpeed's settings.

    Gradient clipping is written out because its default is 1.0, not off.
    """
    # Stage 0 reduces at a boundary that we set; from stage 1 on DeepSpeed lets the caller own it
    # ("unmanaged") and `step` is the boundary.
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": stage == 0,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": persistent,
        },
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.distributed.get_backend() == "nccl",
        }
    # stage 0 has no such choice: there DeepSpeed adds micro-batches up in bfloat16
    if dtype == torch.bfloat16 and stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class ZeroEngine:
    """DeepSpeed. One engine per process and process group; call `join` first.

    Parameters below `persistent` elements are not split at stage 3.
    """

    def __init__(
        self,
        policy: Policy,
        learner: LearnerConfig,
        persistent: int = 100_000,
        bucket_mib: int = 64,
    ):
        import deepspeed

        self.stage, self.bucket, self.learner = learner.zero_stage, bucket_mib * 2**20, learner
        self.ranks, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        trained = [p for p in policy.parameters() if p.requires_grad]
        if policy.halves is None:
            inner = adamw(trained, learner)
        else:
            inner = half_adamw(policy, trained, trained, learner)
        dtype = next(policy.parameters()).dtype
        self.layout = {
            "engine": "deepspeed",
            "dtype": str(dtype),
            "critic": policy.critic is not None,
            "ranks": self.ranks,
            "zero_stage": self.stage,
            "offload_optimizer": learner.offload_optimizer,
        }
        config = zero_config(
            self.stage, dtype, learner.grad_clip, learner.offload_optimizer, persistent
        )
        self.engine, _, _, _ = deepspeed.initialize(
            model=policy, optimizer=inner, config=config, dist_init_required=False
        )
        self.module, self.inner = policy, inner
        self.splits_weights = self.stage == 3
        self.frozen = len(trained) < len(list(policy.parameters()))
        assert self.engine.device is not None  # it has one once it is initialized
        self.device = torch.device(self.engine.device)
        if self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(False)
        self.moments = Moments(inner, self._masters())

    def _masters(self) -> list[Tensor]:
        """The tensors that AdamW works on."""
        if self.stage == 3:
            # handed to AdamW one at a time, so that its own list is empty between steps
            optimizer: Any = self.engine.optimizer
            return list(optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.inner.param_groups for p in group["params"]]

    def forward(self, view: View, custom: Callable | None = None) -> Mapping[str, Tensor]:
        # by keyword: DeepSpeed's hooks look into positional arguments
        return self.engine(view=view, custom=custom)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.ranks)  # DeepSpeed averages over ranks; we want the sum

    def step(self) -> Stepped:
        if self.stage == 0:
            return self._step_unpartitioned()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None  # there was a step
        return Stepped(float(norm), self.engine.was_step_applied())

    def _step_unpartitioned(self) -> Stepped:
        """Stage 0 has neither a gradient norm nor a check of it: reduce, look, then let DeepSpeed
        clip and step.
        """
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if applied := math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        self.engine.set_gradient_accumulation_boundary(False)
        return Stepped(norm, applied)

    def choose_half(self, step: int) -> None:
        choose_half(self.module, self.inner, step)

    def set_optimizer(self, name: str) -> None:
        self.moments.use(name)

    def set_learning_rate(self, value: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = value

    def parameter_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) in the order of full_parameters; no communication."""
        shapes = []
        for tensor in hf_tensors(self.module):
            parameter = tensor.parameters[0]
            shapes.append((tensor.name, parameter.dtype, whole_shape(parameter)))
        return shapes

    def full_parameters(self, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """All parameters in full, on every rank: a collective at stage 3.

        A tensor is valid only until the next one is asked for.
        """
        tensors = adapter_tensors(self.module) if adapters else hf_tensors(self.module)
        if self.stage < 3:
            for tensor in tensors:
                yield tensor.name, tensor.value()
            return
        from deepspeed.runtime.zero import GatheredParameters

        for bucket in self._buckets(tensors):
            parts = [parameter for tensor in bucket for parameter in tensor.parameters]
            with GatheredParameters(parts):
                for tensor in bucket:
                    yield tensor.name, tensor.value()

    def _buckets(self, tensors: Iterator[HfTensor]) -> Iterator[list[HfTensor]]:
        """The tensors in portions that are gathered together, of at most `self.bucket` bytes or one
        tensor.
        """
        bucket, size = [], 0
        for tensor in tensors:
            parameter = tensor.parameters[0]
            bytes_ = math.prod(whole_shape(parameter)) * parameter.element_size()
            if bucket and size + bytes_ > self.bucket:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += bytes_
        if bucket:
            yield bucket

    def save(self, folder: str | Path) -> None:
        """All ranks write into the same folder: DeepSpeed's own checkpoint, and rank_R.pt with what
        DeepSpeed does not know of.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        # what never trains is read from the model again
        self.engine.save_checkpoint(
            str(folder), tag="zero", save_latest=False, exclude_frozen_parameters=self.frozen
        )
        torch.save(
            {"layout": self.layout, "moments": self.moments.state_dict(), "random": random_state()},
            Path(folder) / f"rank_{self.rank}.pt",
        )
        torch.distributed.barrier()

    def load(self, folder: str | Path) -> None:
        """Raises ConfigError if the checkpoint was written by another kind of learner."""
        state = read_state(folder, self.rank, self.layout)
        self.engine.load_checkpoint(
            str(folder),
            tag="zero",
            load_module_strict=not self.frozen,
            load_lr_scheduler_states=False,
        )
        follow(self.inner, self.learner)
        self.moments.load_state_dict(state["moments"])
        set_random_state(state["random"])

    def close(self) -> None:
        """Without this a ZeRO-3 process does not leave the interpreter."""
        self.engine.destroy()
        torch.distributed.destroy_process_group()


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Its shape on all ranks together: at stage 3 each holds a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_offload(stage: int) -> None:
    """Raise ConfigError if this DeepSpeed loses micro-batches when the optimizer is offloaded to
    the CPU. Call on all ranks, after `join`.

    A released DeepSpeed (PR 6550, repaired by PR 7967) gave the offloaded optimizer the gradients
    of the first micro-batch alone and thereby distorted published baselines, so we do not trust a
    version number: one SGD step over two micro-batches must move the weights by their sum.
    """
    import deepspeed

    ranks = torch.distributed.get_world_size()
    module = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        config=zero_config(stage, torch.float32, 0.0, True, 0),
        dist_init_required=False,
    )
    inputs = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 5.0, 6.0, 7.0, 8.0]],
        device=engine.device,
    )
    for x in inputs:
        engine.backward(engine(x).sum() * ranks)
    engine.step()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([module.weight], enabled=stage == 3):
        moved = -module.weight.detach().flatten().clone()
    engine.destroy()
    expected = inputs.sum(0) * ranks
    if not torch.equal(moved, expected):
        raise ConfigError(
            f"learner.offload_optimizer=true with zero_stage={stage}: DeepSpeed "
            f"{deepspeed.__version__} (torch {torch.__version__}) drops gradients of "
            f"micro-batches: two of them should move the weights by {expected.tolist()}, "
            f"they moved by {moved.tolist()}. "
            "Set learner.offload_optimizer=false or install another DeepSpeed"
        )
