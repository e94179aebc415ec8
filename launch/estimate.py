"""`tandem plan`: memory, split, step time, bottleneck and cost of a run on machines one does not
have yet, from a model with named constants.

    rollout   a decode step reads the weights and all live keys and values, or multiplies, whichever
              takes longer; live sequences thin out towards max_tokens
    learn     6 FLOPs per parameter and token (8 with gradient checkpointing) and attention, against
              the ZeRO traffic, whichever takes longer; then AdamW
    sync      the weights once over the slowest link on their way
    step      staleness 0: rollout + learn + sync; from 1 on: max(rollout, learn) + sync

Engines and learner ranks have GPUs of their own, as `cluster:` places them without `colocate`.
Every split that fits in memory is tried, the fastest is taken. The model knows no stragglers,
failures or slow rewards: it is for choosing between shapes, not for promises. Its small-scale
predictions are tested against measured steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import closest
from tandem.launch.machine import GIB
from tandem.launch.shapes import DEVICES, MODELS, Device, Shape, Work

# Shares of a device's peak that real programs reach.
# Of peak FLOP/s, forward and backward of a packed micro-batch: the goal of benchmarks/gpu.py, not
# measured on a GPU yet.
TRAIN_EFFICIENCY = 0.45
PREFILL_EFFICIENCY = 0.5  # of peak FLOP/s, forward of prompts and of large decode batches
MEMORY_EFFICIENCY = 0.7  # of peak bandwidth, decode steps and AdamW
LINK_EFFICIENCY = 0.7  # of peak link bandwidth, collectives of tens of MB

USABLE = 0.90  # of a device's memory; the rest is context, fragmentation, communication buffers
# Activations kept per layer, token and hidden unit: bytes, 16-bit, attention not materialised;
# Korthikanti et al., arXiv 2205.05198.
LAYER_BYTES = 34
CHECKPOINT_BYTES = 2  # the same with gradient checkpointing: the layer's input
MAX_SEQUENCES = 512  # that an engine decodes at once
HEAD_CHUNK = 1024  # tokens whose logits exist at a time, in two float32 copies

TAIL_POINTS = 64  # at which the thinning out of live sequences is looked at

T = TypeVar("T")

# -- rollout


def weight_bytes(model: Shape, work: Work) -> float:
    return work.width * model.parameters


def cache_bytes(model: Shape, work: Work) -> float:
    """Keys and values of one token."""
    return 2 * work.width * model.layers * model.kv


def decode_seconds(
    model: Shape, device: Device, work: Work, batch: float, context: float, tp: int
) -> float:
    """One token for each of `batch` sequences with `context` tokens behind them, on an engine of
    `tp` devices.
    """
    cached = batch * cache_bytes(model, work) * context
    read = weight_bytes(model, work) + cached
    memory = read / tp / (device.bandwidth * MEMORY_EFFICIENCY)
    flops = 2 * model.parameters * batch
    compute = flops / tp / (device.flops * PREFILL_EFFICIENCY)
    # two small all-reduces a layer cost about as much as the layer
    launches = 1 if tp == 1 else 3
    overhead = model.layers * device.layer_seconds * launches
    return max(memory, compute) + overhead


def rollout_seconds(model: Shape, device: Device, work: Work, engines: int, tp: int) -> float:
    """All responses of a step, spread evenly over the engines; requests beyond what an engine
    decodes at once wait their turn.
    """
    own = work.prompts * work.samples / engines
    at_once = min(own, concurrency(model, device, work, tp))
    context = work.prompt + work.response / 2
    full = decode_seconds(model, device, work, at_once, context, tp)
    waiting = own - at_once
    steady = waiting * work.response / at_once * full
    tail = 0.0
    for point in range(TAIL_POINTS):
        length = (point + 0.5) / TAIL_POINTS * work.longest
        batch = max(1.0, at_once * work.alive(length))
        context = work.prompt + length
        tail += decode_seconds(model, device, work, batch, context, tp)
    flops = 2 * model.parameters * work.prompts / engines * work.prompt
    prefill = flops / tp / (device.flops * PREFILL_EFFICIENCY)
    return prefill + steady + tail * work.longest / TAIL_POINTS


def concurrency(model: Shape, device: Device, work: Work, tp: int) -> float:
    """Sequences whose keys and values fit beside the weights; 0 if the weights do not."""
    free = device.memory * USABLE * tp - weight_bytes(model, work)
    tokens = work.prompt + work.longest
    sequence = cache_bytes(model, work) * tokens
    return max(0.0, min(MAX_SEQUENCES, free / sequence))


def engine_bytes(model: Shape, device: Device, work: Work, engines: int, tp: int) -> float:
    """Per device: weights, and keys and values of what is decoded at once."""
    own = work.prompts * work.samples / engines
    at_once = min(own, concurrency(model, device, work, tp))
    tokens = work.prompt + work.longest
    cached = at_once * cache_bytes(model, work) * tokens
    return (weight_bytes(model, work) + cached) / tp


# -- learner


def trained(model: Shape, work: Work) -> float:
    """Numbers that have a gradient and optimizer states."""
    return model.adapters(work.lora) if work.lora else model.parameters


def learner_bytes(model: Shape, work: Work, ranks: int, stage: int, checkpointing: bool) -> float:
    """Per rank: weights, float32 gradients, float32 master and moments, activations of a
    micro-batch, logits of a chunk. float32 weights are their own master.
    """

    def split(since: int) -> float:
        return 1.0 / ranks if stage >= since else 1.0

    weights = model.parameters * work.width * split(3)
    optimizer = 12 if work.width == 2 else 8
    each = 4 * split(2) + optimizer * split(1)
    states = weights + trained(model, work) * each
    per_token = LAYER_BYTES * model.layers
    if checkpointing:
        per_token = CHECKPOINT_BYTES * model.layers + LAYER_BYTES
    longest = max(work.micro_batch_tokens, work.prompt + work.longest)
    activations = longest * model.hidden * per_token * work.width / 2
    logits = 2 * 4 * HEAD_CHUNK * model.vocabulary
    return states + activations + logits


def learn_seconds(
    model: Shape, device: Device, work: Work, ranks: int, stage: int, checkpointing: bool
) -> float:
    """Forward, backward and optimizer of one step."""
    passes = 8 if checkpointing else 6
    # frozen weights have no gradient
    through_weights = passes - 2 if work.lora else passes
    # causal, per token: 2 matmuls of half the context
    context = work.prompt + work.response
    attention = passes * model.layers * model.hidden * context
    per_token = through_weights * model.parameters + attention
    flops = work.tokens * per_token
    compute = flops / ranks / (device.flops * TRAIN_EFFICIENCY)
    micro_batches = max(1.0, work.tokens / ranks / work.micro_batch_tokens)
    gradients = work.width * trained(model, work)
    sent = zero_traffic(weight_bytes(model, work), gradients, ranks, stage, micro_batches)
    traffic = sent / wire(device, ranks)
    # AdamW reads and writes master, moments, gradient
    share = 1.0 / ranks if stage else 1.0
    states = trained(model, work) * 4 * 7 * share
    optimizer = states / (device.bandwidth * MEMORY_EFFICIENCY)
    launches = 0.0
    if device.per_node == 1:
        launches = micro_batches * 3 * model.layers * device.layer_seconds
    return max(compute, traffic) + optimizer + launches


def zero_traffic(
    weights: float, gradients: float, ranks: int, stage: int, micro_batches: float
) -> float:
    """Bytes that a rank sends in a step: gathered weights and reduced gradients, as many numbers as
    train.
    """
    if ranks == 1:
        return 0.0
    if stage == 3:  # weights forward and backward, gradients, per micro-batch
        return (weights * 2 + gradients) * micro_batches
    return gradients * 1 + gradients * 2


def wire(device: Device, devices: int) -> float:
    """Bytes per second between so many devices, over the slowest link among them."""
    peak = device.link if devices <= device.per_node else device.network
    return peak * LINK_EFFICIENCY


def sync_seconds(model: Shape, device: Device, work: Work, devices: int) -> float:
    return weight_bytes(model, work) / wire(device, devices)


# -- the search


@dataclass(frozen=True)
class Estimate:
    """One split of the devices, and what is expected of it: bytes per device, seconds per step."""

    engines: int
    tensor_parallel: int
    ranks: int
    zero_stage: int
    checkpointing: bool
    engine_bytes: float
    learner_bytes: float
    rollout: float
    learn: float
    sync: float
    step: float
    dollars: float  # per million tokens that the learner ran through

    @property
    def bottleneck(self) -> str:
        seconds = {"rollout": self.rollout, "learning": self.learn, "weight sync": self.sync}
        return max(seconds, key=lambda side: seconds[side])


@dataclass(frozen=True)
class LearnerChoice:
    zero_stage: int
    checkpointing: bool
    seconds: float


def estimates(model: Shape, device: Device, work: Work, devices: int) -> Iterator[Estimate]:
    """Every split that fits into memory, the learner with what is fastest for it."""
    for tp in (1, 2, 4, 8):
        if tp > device.per_node or concurrency(model, device, work, tp) < 1:
            continue
        most_engines = max(1, (devices - 1) // tp)
        for engines in range(1, most_engines + 1):
            taken = engines * tp
            ranks = devices - taken
            many_nodes = devices > 2 * device.per_node
            partial_node = many_nodes and taken % device.per_node
            if ranks < 1 or partial_node:  # on many nodes, whole ones
                continue
            learner = fastest_learner(model, device, work, ranks)
            if learner is not None:
                yield estimate(model, device, work, devices, engines, tp, learner)


def fastest_learner(model: Shape, device: Device, work: Work, ranks: int) -> LearnerChoice | None:
    """Of equally fast choices the least ZeRO stage, without gradient checkpointing; None if no
    choice fits.
    """
    found = []
    for checkpointing in (False, True):
        for stage in (1, 2, 3):
            needed = learner_bytes(model, work, ranks, stage, checkpointing)
            if needed <= device.memory * USABLE:
                seconds = learn_seconds(model, device, work, ranks, stage, checkpointing)
                found.append(LearnerChoice(stage, checkpointing, seconds))
    return min(found, key=lambda choice: choice.seconds, default=None)


def estimate(
    model: Shape,
    device: Device,
    work: Work,
    devices: int,
    engines: int,
    tp: int,
    learner: LearnerChoice,
) -> Estimate:
    ranks = devices - engines * tp
    stage = learner.zero_stage
    checkpointing = learner.checkpointing
    rollout = rollout_seconds(model, device, work, engines, tp)
    sync = sync_seconds(model, device, work, devices)
    busy = max(rollout, learner.seconds)
    if work.staleness == 0:
        busy = rollout + learner.seconds
    step = busy + sync + device.fixed_seconds
    cost = devices * device.dollars * step / 3600
    return Estimate(
        engines=engines,
        tensor_parallel=tp,
        ranks=ranks,
        zero_stage=stage,
        checkpointing=checkpointing,
        engine_bytes=engine_bytes(model, device, work, engines, tp),
        learner_bytes=learner_bytes(model, work, ranks, stage, checkpointing),
        rollout=rollout,
        learn=learner.seconds,
        sync=sync,
        step=step,
        dollars=cost / (work.tokens / 1e6),
    )


def fastest(model: Shape, device: Device, work: Work, devices: int) -> Estimate:
    """The split with the shortest step. Raises ConfigError if nothing fits."""
    splits = estimates(model, device, work, devices)
    found = min(splits, key=lambda split: split.step, default=None)
    if found is None:
        raise ConfigError(
            f"{devices} device(s) of {device.memory / 1e9:.0f} GB cannot hold an engine and a "
            f"learner of {model.parameters / 1e9:.1f} B parameters side by side: weights take "
            f"{weight_bytes(model, work) / 1e9:.0f} GB on each side, optimizer states "
            f"{12 * trained(model, work) / 1e9:.0f} GB; use more or larger ones"
        )
    return found


# -- the command


def known(name: str, table: Mapping[str, T], what: str) -> T:
    key = name.lower()
    if key not in table:
        raise ConfigError(
            f"unknown {what} {name!r}{closest(name, table)}; known: {', '.join(table)}"
        )
    return table[key]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="7b", help=", ".join(MODELS))
    parser.add_argument("--gpu", default="h100", help=", ".join(DEVICES))
    parser.add_argument("--gpus", type=int, default=8)
    for name, value, help in (
        ("prompts", 128, "per step"),
        ("samples", 8, "per prompt (group size)"),
        ("prompt-tokens", 512, "mean"),
        ("response-tokens", 2048, "mean"),
        ("max-tokens", 8192, "per response"),
        ("micro-batch-tokens", 16384, "per learner rank"),
        ("staleness", 1, ""),
        ("lora", 0, "rank of adapters on every linear layer; 0: all weights train"),
    ):
        help = f"{help} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=value, help=help)
    parser.add_argument("--dollars", type=float, help="per GPU and hour")


def describe(args: argparse.Namespace) -> str:
    """What `tandem plan` prints. Raises ConfigError."""
    model = known(args.model, MODELS, "model")
    device = known(args.gpu, DEVICES, "GPU")
    if args.dollars is not None:
        device = replace(device, dollars=args.dollars)
    work = read_work(args)
    best = fastest(model, device, work, args.gpus)
    checkpointing = ", gradient checkpointing" if best.checkpointing else ""
    lora = f", LoRA of rank {work.lora}" if work.lora else ""
    rollout_idle = 100 * max(0.0, 1 - best.rollout / best.step)
    learn_idle = 100 * max(0.0, 1 - best.learn / best.step)
    return (
        f"{args.model} on {args.gpus} x {args.gpu}: "
        f"{work.prompts} prompts x {work.samples} samples, "
        f"{work.prompt:g} + {work.response:g} tokens (up to {work.longest:g}), "
        f"staleness {work.staleness}{lora}\n"
        f"  split        {best.engines} engine(s) of {best.tensor_parallel} GPU(s), "
        f"{best.ranks} learner rank(s) with ZeRO-{best.zero_stage}{checkpointing}\n"
        f"  memory       engine {best.engine_bytes / GIB:.0f} GiB, "
        f"learner {best.learner_bytes / GIB:.0f} GiB per GPU, of {device.memory / GIB:.0f}\n"
        f"  step         {best.step:.1f} s: "
        f"rollout {best.rollout:.1f} (idle {rollout_idle:.0f} %), "
        f"learning {best.learn:.1f} (idle {learn_idle:.0f} %), weight sync {best.sync:.1f}\n"
        f"  bottleneck   {best.bottleneck}\n"
        f"  cost         ${best.dollars:.2f} per million trained tokens at "
        f"${device.dollars:g} per GPU and hour ({work.tokens / 1e6:.2f} M tokens a step)\n"
        "an estimate from data-sheet peaks and the efficiencies at the top of "
        "launch/estimate.py; nothing was run"
    )


def read_work(args: argparse.Namespace) -> Work:
    counts = (
        args.gpus,
        args.prompts,
        args.samples,
        args.prompt_tokens,
        args.response_tokens,
        args.micro_batch_tokens,
    )
    if min(counts) < 1 or args.staleness < 0 or args.lora < 0:
        raise ConfigError(
            "plan: counts and lengths must be at least 1, staleness and lora at least 0"
        )
    if args.response_tokens > args.max_tokens:
        raise ConfigError(
            f"--response-tokens is {args.response_tokens}, more than --max-tokens "
            f"{args.max_tokens}: a mean is no larger than the limit"
        )
    return Work(
        prompts=args.prompts,
        samples=args.samples,
        prompt=args.prompt_tokens,
        response=args.response_tokens,
        longest=args.max_tokens,
        micro_batch_tokens=args.micro_batch_tokens,
        staleness=args.staleness,
        lora=args.lora,
    )
