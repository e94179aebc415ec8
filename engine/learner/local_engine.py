"""LocalEngine: the engine of one process (Accelerate), and what both engines share: AdamW, its
named sets of moments, random states, the layout of a checkpoint. The contract of both is
`protocol.TrainEngine`.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from tandem.engine.config.schema import LearnerConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.protocol import Stepped
from tandem.engine.model.adapters import adapter_tensors, hf_tensors
from tandem.engine.model.halves import ALWAYS
from tandem.engine.model.policy import Policy
from tandem.engine.model.view import View


class HalfAdamW(torch.optim.AdamW):
    """Leaves groups with `frozen` alone: their weights, moments and step counts."""

    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["frozen"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def adamw(parameters, learner: LearnerConfig, kind=torch.optim.AdamW) -> torch.optim.AdamW:
    """The optimizer of both engines. Its learning rate is set before every step."""
    return kind(parameters, lr=0.0, betas=learner.betas, weight_decay=learner.weight_decay)


def half_adamw(
    policy: Policy, weights: Sequence[Tensor], masters: Sequence[Tensor], learner: LearnerConfig
) -> torch.optim.AdamW:
    """AdamW with a group for each unit of a policy's halves."""
    assert policy.halves is not None
    groups: dict[int, list[Tensor]] = {}
    for weight, master in zip(weights, masters, strict=True):
        unit = policy.halves.unit_of.get(id(weight), ALWAYS)
        groups.setdefault(unit, []).append(master)
    parameters = [
        {"params": group, "unit": unit, "frozen": False} for unit, group in groups.items()
    ]
    return adamw(parameters, learner, HalfAdamW)


def choose_half(policy: Policy, optimizer: torch.optim.AdamW, step: int) -> None:
    """Let the half of this step train, where the policy has halves."""
    if policy.halves is None:
        return
    chosen = policy.halves.choose(step)
    for group in optimizer.param_groups:
        group["frozen"] = group["unit"] not in chosen


def follow(optimizer: torch.optim.AdamW, learner: LearnerConfig) -> None:
    """After a checkpoint was loaded: the config's settings, not those it was written with."""
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = learner.betas, learner.weight_decay


class Moments:
    """Named sets of one AdamW's moments.

    The set in use lives in the optimizer, the others are parked here.
    """

    def __init__(self, optimizer: torch.optim.AdamW, masters: list[Tensor]):
        self.optimizer, self.masters = optimizer, masters
        self.name, self.parked = "main", {}

    def use(self, name: str) -> None:
        if name != self.name:
            self.parked[self.name] = self.optimizer.state
            self.optimizer.state = self.parked.pop(name, defaultdict(dict))
            self.name = name

    def state_dict(self) -> dict:
        """The parked sets and the name of the one in use, which the engine saves itself."""
        parked = {}
        for name, state in self.parked.items():
            parked[name] = [dict(state.get(master, {})) for master in self.masters]
        return {"name": self.name, "parked": parked}

    def load_state_dict(self, saved: dict) -> None:
        self.name = saved["name"]
        self.parked = {}
        for name, states in saved["parked"].items():
            state = defaultdict(dict)
            for master, moments in zip(self.masters, states, strict=True):
                if moments:
                    state[master] = moments
            self.parked[name] = state


def random_state() -> dict:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def read_state(folder: str | Path, rank: int, layout: dict) -> dict:
    """rank_R.pt of a checkpoint.

    Raises ConfigError if it was written with another layout (ranks, ZeRO stage, dtype), which
    cannot be read back exactly.
    """
    path = Path(folder) / f"rank_{rank}.pt"
    if not path.is_file():
        path = Path(folder) / "rank_0.pt"
    if not path.is_file():
        raise ConfigError(
            f"checkpoint {folder} has no {path.name}: it is not a learner's checkpoint"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["layout"] != layout:
        raise ConfigError(
            f"checkpoint {folder} was written with {state['layout']}, this run has {layout}: "
            "set mode, cluster.learner_ranks, learner.zero_stage, "
            "learner.offload_optimizer, model.dtype and method as they were to resume, or "
            "start a new run from an exported model"
        )
    return state


def master_of(weight: Tensor) -> Tensor:
    """The fp32 tensor that AdamW works on: the weight itself, or a copy of a bfloat16 one."""
    if weight.dtype == torch.float32:
        return weight
    return weight.detach().float().requires_grad_()


class LocalEngine:
    """One process, no DeepSpeed: for mode=inline, and the yardstick that ZeroEngine is tested
    against.
    """

    splits_weights = False

    def __init__(self, policy: Policy, learner: LearnerConfig, gpu: bool = False):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=not gpu, mixed_precision="no")
        self.layout = {
            "engine": "inline",
            "dtype": str(next(policy.parameters()).dtype),
            "critic": policy.critic is not None,
        }
        self.device: torch.device = self.accelerator.device
        self.clip, self.learner = learner.grad_clip, learner
        self.module = self.accelerator.prepare(policy)
        self.weights = [p for p in policy.parameters() if p.requires_grad]
        self.masters = [master_of(weight) for weight in self.weights]
        if policy.halves is None:
            self.optimizer = adamw(self.masters, learner)
        else:
            self.optimizer = half_adamw(policy, self.weights, self.masters, learner)
        self.moments = Moments(self.optimizer, self.masters)

    def forward(self, view: View, custom: Callable | None = None) -> Mapping[str, Tensor]:
        return self.module(view=view, custom=custom)

    @torch.no_grad()
    def _collect(self) -> None:
        """Add gradients of bfloat16 weights to their masters' in fp32, so that many micro-batches
        do not round each other away.
        """
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is master or weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        self._collect()

    def step(self) -> Stepped:
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.clip or math.inf))
        if applied := math.isfinite(norm):
            self.optimizer.step()
            self._refresh()
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(norm, applied)

    @torch.no_grad()
    def _refresh(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    def choose_half(self, step: int) -> None:
        choose_half(self.module, self.optimizer, step)

    def set_optimizer(self, name: str) -> None:
        self.moments.use(name)

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def full_parameters(self, adapters: bool = False) -> Iterator[tuple[str, Tensor]]:
        tensors = adapter_tensors if adapters else hf_tensors
        for tensor in tensors(self.module):
            yield tensor.name, tensor.value()

    def save(self, folder: str | Path) -> None:
        """Everything that an exact resume needs: weights.safetensors (fp32 masters of what trains),
        rank_0.pt.
        """
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(
            {str(i): master.detach().contiguous() for i, master in enumerate(self.masters)},
            Path(folder) / "weights.safetensors",
        )
        state = {
            "layout": self.layout,
            "optimizer": self.optimizer.state_dict(),
            "moments": self.moments.state_dict(),
            "random": random_state(),
        }
        torch.save(state, Path(folder) / "rank_0.pt")

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Raises ConfigError if the checkpoint was written by another kind of learner."""
        from safetensors.torch import load_file

        state = read_state(folder, 0, self.layout)
        saved = load_file(Path(folder) / "weights.safetensors")
        for i, master in enumerate(self.masters):
            master.copy_(saved[str(i)])
        self._refresh()
        self.optimizer.load_state_dict(state["optimizer"])
        follow(self.optimizer, self.learner)
        self.moments.load_state_dict(state["moments"])
        set_random_state(state["random"])

    def close(self) -> None:
        self.accelerator.free_memory()


def join(rank: int, ranks: int, address: str, port: int, timeout: float, gpu: bool = False) -> None:
    """Join the learner's process group: NCCL with a GPU per rank, else gloo. Once per process,
    before any ZeroEngine.
    """
    if not gpu:  # also on a machine that has some
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    import logging

    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory collective first. A build that was killed leaves a
    # lock file behind, on which every later start waits forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo",
        rank=rank,
        world_size=ranks,
        init_method=f"tcp://{address}:{port}",
        timeout=timedelta(seconds=timeout),
        auto_mpi_discovery=False,
        verbose=False,
    )
