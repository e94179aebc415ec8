"""What an estimate starts from: devices by their data sheets, models by their shapes, and the work
of one step.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    # per layer and forward, beside the arithmetic: kernel launches in a CUDA graph, small kernels
    layer_seconds: float = 6e-6
    fixed_seconds: float = 0.5  # per step and cluster: rewards, packing, Ray calls, metrics


DEVICES = {
    "a100-80g": Device(80e9, 312e12, 2.04e12, 300e9, 25e9, 8, 1.6),
    "h100": Device(80e9, 989e12, 3.35e12, 450e9, 50e9, 8, 2.5),
    "h200": Device(141e9, 989e12, 4.8e12, 450e9, 50e9, 8, 3.2),
    "b200": Device(180e9, 2250e12, 8.0e12, 900e9, 50e9, 8, 4.5),
}


def cpu(flops: float, bandwidth: float, width: int) -> Device:
    """A CPU with mode=inline: everything in one process, one after the other.

    flops, bandwidth: the matmul and copy rates measured beside a benchmark. width: bytes per
    number. The other constants were fitted to the steps that the test compares with. bfloat16
    matmuls are so fast with AMX that a step reaches a smaller share of their peak.
    """
    share = 0.4 if width == 2 else 1.0
    return Device(
        memory=64e9,
        flops=flops * share,
        bandwidth=bandwidth,
        link=bandwidth,
        network=bandwidth,
        per_node=1,
        dollars=0.05,
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

    def adapters(self, rank: int) -> float:
        """Numbers in LoRA adapters of that rank beside every linear layer: rank times what goes in
        and out of it. The MLP's width follows from the count of parameters, with embeddings that
        are not tied.
        """
        embeddings = 2 * self.vocabulary * self.hidden
        attention = 2 * self.hidden * (self.hidden + self.kv)
        mlp = (self.parameters - embeddings) / self.layers - attention
        wide = mlp / 3 / self.hidden
        around_attention = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + self.kv)
        around_mlp = 3 * (self.hidden + wide)
        return rank * self.layers * (around_attention + around_mlp)


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
    lora: int = 0  # rank of LoRA's adapters; 0: all weights train

    @property
    def tokens(self) -> float:
        """That the learner runs through, prompts included."""
        row = self.prompt + self.response
        return self.prompts * self.samples * row

    def alive(self, t: float) -> float:
        """Share of responses longer than t: 1 - t/longest to the power that gives the right mean
        (all equally long: 1 up to the end).
        """
        left = 1.0 - t / self.longest
        power = self.longest / self.response - 1.0
        return left**power
