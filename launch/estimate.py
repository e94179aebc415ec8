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
from collections.abc import Iterator
from dataclasses import dataclass

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import closest

GIB = 2**30
# Shares of a device's peak that real programs reach.
# of peak FLOP/s, forward and backward of a packed micro-batch (the goal of benchmarks/gpu.py; not
# measured on a GPU yet)
TRAIN_EFFICIENCY = 0.45
PREFILL_EFFICIENCY = 0.5  # of peak FLOP/s, forward of prompts and of large decode batches
MEMORY_EFFICIENCY = 0.7  # of peak bandwidth, decode steps and AdamW
LINK_EFFICIENCY = 0.7  # of peak link bandwidth, collectives of tens of MB
# Memory.
# of the device; the rest is context, fragmentation, communication buffers
USABLE = 0.90
# activations kept per layer, token and hidden unit (bytes, 16-bit, attention not materialised);
# Korthikanti et al., arXiv 2205.05198
LAYER_BYTES = 34
CHECKPOINT_BYTES = 2  # the same with gradient checkpointing: the layer's input
MAX_SEQUENCES = 512  # an engine decodes at once
HEAD_CHUNK = 1024  # tokens whose logits exist at a time, in two float32 copies
FIXED_SECONDS = 0.5  # per step and cluster: rewards, packing, Ray calls, metrics


@dataclass(frozen=True)
class Device:
    """Data-sheet peaks of one device: bytes, dense 16-bit FLOP/s, bytes/s to its memory, to a
    device of its node, and to another node.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    per_node: int
    dollars: float  # per hour, an assumption: give your own with --dollars
    # per layer and forward that no arithmetic explains: kernel launches in a CUDA graph, small
    # kernels
    layer_seconds: float = 6e-6
    fixed_seconds: float = FIXED_SECONDS


DEVICES = {
    "a100-80g": Device(80e9, 312e12, 2.04e12, 300e9, 25e9, 8, 1.6),
    "h100": Device(80e9, 989e12, 3.35e12, 450e9, 50e9, 8, 2.5),
    "h200": Device(141e9, 989e12, 4.8e12, 450e9, 50e9, 8, 3.2),
    "b200": Device(180e9, 2250e12, 8.0e12, 900e9, 50e9, 8, 4.5),
}


def cpu(flops: float, bandwidth: float, width: int) -> Device:
    """A CPU with mode=inline, from the matmul and copy rates measured beside a benchmark:
    everything in one process, one after the other.

    The constants were fitted to the steps that the test compares with. bfloat16 matmuls are so fast
    with AMX that a step reaches a smaller share of their peak.
    """
    return Device(
        64e9,
        flops * (0.4 if width == 2 else 1.0),
        bandwidth,
        bandwidth,
        bandwidth,
        1,
        0.05,
        layer_seconds=3.0e-3,
        fixed_seconds=0.03,
    )


@dataclass(frozen=True)
class Shape:
    """A decoder. `kv` is key-value heads times head size."""

    parameters: float
    layers: int
    hidden: int
    kv: int
    vocabulary: int


MODELS = {
    "0.5b": Shape(0.494e9, 24, 896, 128, 151_936),
    "1.5b": Shape(1.54e9, 28, 1536, 256, 151_936),
    "3b": Shape(3.09e9, 36, 2048, 256, 151_936),
    "7b": Shape(7.62e9, 28, 3584, 512, 152_064),
    "14b": Shape(14.8e9, 48, 5120, 1024, 152_064),
    "32b": Shape(32.8e9, 64, 5120, 1024, 152_064),
    "70b": Shape(70.6e9, 80, 8192, 1024, 128_256),
}


@dataclass(frozen=True)
class Work:
    """One step. Lengths in tokens; `response` is the mean, `longest` the limit."""

    prompts: int
    samples: int
    prompt: float
    response: float
    longest: float
    micro_batch_tokens: int = 16384
    staleness: int = 1
    width: int = 2  # bytes per number of weights and activations

    @property
    def tokens(self) -> float:
        """That the learner runs through, prompts included."""
        return self.prompts * self.samples * (self.prompt + self.response)

    def alive(self, t: float) -> float:
        """Share of responses longer than t: 1 - t/longest to the power that gives the right mean
        (all equally long: 1 up to the end).
        """
        return (1.0 - t / self.longest) ** (self.longest / self.response - 1.0)


# -- rollout


def decode_seconds(m: Shape, d: Device, w: Work, batch: float, context: float, tp: int) -> float:
    """One token for each of `batch` sequences with `context` tokens behind them, on an engine of
    `tp` devices.
    """
    cached = 2 * w.width * m.layers * m.kv * context
    memory = (w.width * m.parameters + batch * cached) / tp / (d.bandwidth * MEMORY_EFFICIENCY)
    compute = 2 * m.parameters * batch / tp / (d.flops * PREFILL_EFFICIENCY)
    # two small all-reduces a layer cost about as much as it
    return max(memory, compute) + m.layers * d.layer_seconds * (1 if tp == 1 else 3)


def rollout_seconds(m: Shape, d: Device, w: Work, engines: int, tp: int) -> float:
    """All responses of a step, spread evenly over the engines; requests beyond what an engine
    decodes at once wait their turn.
    """
    mine = w.prompts * w.samples / engines
    at_once = min(mine, concurrency(m, d, w, tp))
    context = w.prompt + w.response / 2
    steady = (mine - at_once) * w.response / at_once * decode_seconds(m, d, w, at_once, context, tp)
    points = 64
    tail = sum(
        decode_seconds(
            m,
            d,
            w,
            max(1.0, at_once * w.alive((i + 0.5) / points * w.longest)),
            w.prompt + (i + 0.5) / points * w.longest,
            tp,
        )
        for i in range(points)
    )
    prefill = (
        2 * m.parameters * w.prompts / engines * w.prompt / tp / (d.flops * PREFILL_EFFICIENCY)
    )
    return prefill + steady + tail * w.longest / points


def concurrency(m: Shape, d: Device, w: Work, tp: int) -> float:
    """Sequences whose keys and values fit beside the weights; 0 if the weights do not."""
    room = d.memory * USABLE * tp - w.width * m.parameters
    return max(
        0.0, min(MAX_SEQUENCES, room / (2 * w.width * m.layers * m.kv * (w.prompt + w.longest)))
    )


def engine_bytes(m: Shape, d: Device, w: Work, engines: int, tp: int) -> float:
    """Per device: weights, and keys and values of what is decoded at once."""
    at_once = min(w.prompts * w.samples / engines, concurrency(m, d, w, tp))
    return (
        w.width * m.parameters + at_once * 2 * w.width * m.layers * m.kv * (w.prompt + w.longest)
    ) / tp


# -- learner


def learner_bytes(m: Shape, w: Work, ranks: int, stage: int, checkpointing: bool) -> float:
    """Per rank: weights, float32 gradients, float32 master and moments, activations of a
    micro-batch, logits of a chunk. float32 weights are their own master.
    """

    def split(since):
        return 1.0 / ranks if stage >= since else 1.0

    optimizer = 12 if w.width == 2 else 8
    model = m.parameters * (w.width * split(3) + 4 * split(2) + optimizer * split(1))
    longest = max(w.micro_batch_tokens, w.prompt + w.longest)
    kept = (
        (CHECKPOINT_BYTES * m.layers + LAYER_BYTES if checkpointing else LAYER_BYTES * m.layers)
        * w.width
        / 2
    )
    return model + longest * m.hidden * kept + 2 * 4 * HEAD_CHUNK * m.vocabulary


def learn_seconds(
    m: Shape, d: Device, w: Work, ranks: int, stage: int, checkpointing: bool
) -> float:
    """Forward, backward and optimizer of one step."""
    passes = 8 if checkpointing else 6
    # causal, per token: 2 matmuls of half the context
    attention = passes * m.layers * m.hidden * (w.prompt + w.response)
    compute = w.tokens * (passes * m.parameters + attention) / ranks / (d.flops * TRAIN_EFFICIENCY)
    micros = max(1.0, w.tokens / ranks / w.micro_batch_tokens)
    wire = (d.link if ranks <= d.per_node else d.network) * LINK_EFFICIENCY
    # stage 3: weights forward and backward, gradients, per micro-batch
    gathered = w.width * m.parameters * (0 if ranks == 1 else 3 * micros if stage == 3 else 1)
    reduced = w.width * m.parameters * (0 if ranks == 1 or stage == 3 else 2)
    # AdamW reads and writes master, moments, gradient
    states = m.parameters * 4 * 7 * (1.0 / ranks if stage else 1.0)
    launches = 0.0 if d.per_node > 1 else micros * 3 * m.layers * d.layer_seconds
    return (
        max(compute, (gathered + reduced) / wire)
        + states / (d.bandwidth * MEMORY_EFFICIENCY)
        + launches
    )


def sync_seconds(m: Shape, d: Device, w: Work, devices: int) -> float:
    return (
        w.width
        * m.parameters
        / ((d.link if devices <= d.per_node else d.network) * LINK_EFFICIENCY)
    )


# -- the plan


@dataclass(frozen=True)
class Plan:
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
        return max(
            ("rollout", self.rollout),
            ("learning", self.learn),
            ("weight sync", self.sync),
            key=lambda side: side[1],
        )[0]


def plans(m: Shape, d: Device, w: Work, devices: int) -> Iterator[Plan]:
    """Every split that fits into memory, with the least ZeRO stage and without gradient
    checkpointing where possible.
    """
    for tp in (1, 2, 4, 8):
        if tp > d.per_node or concurrency(m, d, w, tp) < 1:
            continue
        for engines in range(1, max(1, (devices - 1) // tp) + 1):
            ranks = devices - engines * tp
            # whole nodes, on many nodes
            if ranks < 1 or (devices > 2 * d.per_node and engines * tp % d.per_node):
                continue
            fits = (
                (stage, checkpointing)
                for checkpointing in (False, True)
                for stage in (1, 2, 3)
                if learner_bytes(m, w, ranks, stage, checkpointing) <= d.memory * USABLE
            )
            if (
                best := min(
                    fits, key=lambda choice: learn_seconds(m, d, w, ranks, *choice), default=None
                )
            ) is None:
                continue
            rollout, learn = (
                rollout_seconds(m, d, w, engines, tp),
                learn_seconds(m, d, w, ranks, *best),
            )
            sync = sync_seconds(m, d, w, devices)
            step = (
                (rollout + learn if w.staleness == 0 else max(rollout, learn))
                + sync
                + d.fixed_seconds
            )
            yield Plan(
                engines,
                tp,
                ranks,
                *best,
                engine_bytes(m, d, w, engines, tp),
                learner_bytes(m, w, ranks, *best),
                rollout,
                learn,
                sync,
                step,
                devices * d.dollars * step / 3600 / (w.tokens / 1e6),
            )


def best_plan(m: Shape, d: Device, w: Work, devices: int) -> Plan:
    """The fastest plan. Raises ConfigError if nothing fits."""
    plan = min(plans(m, d, w, devices), key=lambda p: p.step, default=None)
    if plan is None:
        raise ConfigError(
            f"{devices} device(s) of {d.memory / 1e9:.0f} GB cannot hold an engine and a "
            f"learner of {m.parameters / 1e9:.1f} B parameters side by side: "
            f"weights take {w.width * m.parameters / 1e9:.0f} GB on each side, optimizer "
            f"states {12 * m.parameters / 1e9:.0f} GB; use more or larger ones"
        )
    return plan


def inline_seconds(m: Shape, d: Device, w: Work) -> tuple[float, float, float]:
    """(rollout, learn, step) of mode=inline, for the test against measured steps."""
    rollout, learn = rollout_seconds(m, d, w, 1, 1), learn_seconds(m, d, w, 1, 1, False)
    return rollout, learn, rollout + learn + d.fixed_seconds


def known(name: str, table: dict, what: str):
    if name.lower() not in table:
        raise ConfigError(
            f"unknown {what} {name!r}{closest(name, table)}; known: {', '.join(table)}"
        )
    return table[name.lower()]


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
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"{help} (default: %(default)s)"
        )
    parser.add_argument("--dollars", type=float, help="per GPU and hour")


def describe(args: argparse.Namespace) -> str:
    """What `tandem plan` prints. Raises ConfigError."""
    m, d = known(args.model, MODELS, "model"), known(args.gpu, DEVICES, "GPU")
    d = d if args.dollars is None else Device(**{**vars(d), "dollars": args.dollars})
    if (
        min(
            args.gpus,
            args.prompts,
            args.samples,
            args.prompt_tokens,
            args.response_tokens,
            args.micro_batch_tokens,
        )
        < 1
        or args.staleness < 0
    ):
        raise ConfigError("plan: counts and lengths must be at least 1, staleness at least 0")
    if args.response_tokens > args.max_tokens:
        raise ConfigError(
            f"--response-tokens is {args.response_tokens}, more than --max-tokens "
            f"{args.max_tokens}: a mean is no larger than the limit"
        )
    w = Work(
        args.prompts,
        args.samples,
        args.prompt_tokens,
        args.response_tokens,
        args.max_tokens,
        args.micro_batch_tokens,
        args.staleness,
    )
    p = best_plan(m, d, w, args.gpus)

    def idle(busy):
        return 100 * max(0.0, 1 - busy / p.step)

    return "\n".join(
        [
            (
                f"{args.model} on {args.gpus} x {args.gpu}: {w.prompts} prompts x {w.samples} "
                f"samples, {w.prompt:g} + {w.response:g} tokens (up to {w.longest:g}), staleness "
                f"{w.staleness}"
            ),
            (
                f"  split        {p.engines} engine(s) of {p.tensor_parallel} GPU(s), {p.ranks} "
                f"learner rank(s) with ZeRO-{p.zero_stage}"
            )
            + (", gradient checkpointing" if p.checkpointing else ""),
            (
                f"  memory       engine {p.engine_bytes / GIB:.0f} GiB, learner "
                f"{p.learner_bytes / GIB:.0f} GiB per GPU, of {d.memory / GIB:.0f}"
            ),
            (
                f"  step         {p.step:.1f} s: rollout {p.rollout:.1f} (idle "
                f"{idle(p.rollout):.0f} %), learning {p.learn:.1f} (idle {idle(p.learn):.0f} %), "
                f"weight sync {p.sync:.1f}"
            ),
            f"  bottleneck   {p.bottleneck}",
            (
                f"  cost         ${p.dollars:.2f} per million trained tokens at ${d.dollars:g} "
                f"per GPU and hour ({w.tokens / 1e6:.2f} M tokens a step)"
            ),
            (
                "an estimate from data-sheet peaks and the efficiencies at the top of "
                "launch/estimate.py; nothing was run"
            ),
        ]
    )
