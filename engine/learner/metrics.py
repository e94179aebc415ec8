"""Numbers of one optimizer step while they are added up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tandem.engine.core.types import MicroBatch, Source, StepPlan

Number: TypeAlias = Tensor | float  # a scalar: on the device while a step runs, then a float


@dataclass
class StepMetrics:
    """Sums, maxima, and means with their counts, by the names they are reported under.

    A mean is a total divided by a count, which other means may share: those of a term's metrics are
    all over the term's tokens. Names of counts are not reported.
    """

    sums: dict[str, Number] = field(default_factory=dict)
    maxima: dict[str, Number] = field(default_factory=dict)
    totals: dict[str, Number] = field(default_factory=dict)  # of means
    count_of: dict[str, str] = field(default_factory=dict)  # {mean: its count}
    counts: dict[str, int] = field(default_factory=dict)

    def add_sum(self, name: str, value: Number) -> None:
        add(self.sums, name, value)

    def add_max(self, name: str, value: Number) -> None:
        if name in self.maxima:
            value = larger(self.maxima[name], value)
        self.maxima[name] = value

    def add_count(self, name: str, count: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + count

    def add_mean(self, name: str, total: Number, count_of: str) -> None:
        """`count_of` names the count, which `add_count` counts."""
        add(self.totals, name, total)
        self.count_of[name] = count_of

    def merge(self, other: StepMetrics) -> None:
        for name, value in other.sums.items():
            self.add_sum(name, value)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, count in other.counts.items():
            self.add_count(name, count)
        for name, total in other.totals.items():
            self.add_mean(name, total, other.count_of[name])

    def on_host(self) -> StepMetrics:
        """The same in floats. The one place where a step waits for the device: a single copy."""
        values = list(self.sums.values())
        values.extend(self.maxima.values())
        values.extend(self.totals.values())
        floats = iter(to_floats(values))
        return StepMetrics(
            sums=named(self.sums, floats),
            maxima=named(self.maxima, floats),
            totals=named(self.totals, floats),
            count_of=dict(self.count_of),
            counts=dict(self.counts),
        )

    def means(self) -> dict[str, float]:
        """0 where nothing was counted."""
        found = {}
        for name, total in self.totals.items():
            count_of = self.count_of[name]
            count = self.counts[count_of]
            found[name] = float(total) / count if count else 0.0
        return found

    def report(self) -> dict[str, float]:
        """Sums, maxima and means."""
        measured = self.sums | self.maxima
        found = {name: float(value) for name, value in measured.items()}
        return found | self.means()


def add(numbers: dict[str, Number], name: str, value: Number) -> None:
    if name in numbers:
        value = numbers[name] + value
    numbers[name] = value


def larger(a: Number, b: Number) -> Number:
    """NaN if one of them is."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    larger_one = np.maximum(float(a), float(b))
    return float(larger_one)


def to_floats(values: Sequence[Number]) -> list[float]:
    """In float32, by one copy from the device."""
    if not values:
        return []
    tensors = [torch.as_tensor(value) for value in values]
    device = torch.device("cpu")
    for tensor in tensors:
        if tensor.device.type != "cpu":
            device = tensor.device
            break
    together = []
    for tensor in tensors:
        there = tensor.to(device, torch.float32, non_blocking=True)
        together.append(there)
    return torch.stack(together).tolist()


def named(names: Iterable[str], values: Iterator[float]) -> dict[str, Number]:
    """The next values, one under each name."""
    found: dict[str, Number] = {}
    for name in names:
        found[name] = next(values)
    return found


def observe(metrics: StepMetrics, micro: MicroBatch, logp: Tensor, entropy: Tensor | None) -> None:
    """Add what a micro-batch shows beside its losses. Indices are computed on the host to avoid a
    device sync.
    """
    trained = float(len(micro.index))
    real = float(micro.real_tokens)
    padded = float(micro.tokens.size)
    metrics.add_sum("tokens/trained", trained)
    metrics.add_sum("tokens/real", real)
    metrics.add_sum("tokens/padded", padded)
    if entropy is not None:
        observe_entropy(metrics, micro, entropy.detach())
    if "behaviour_logp" in micro.streams:
        observe_gap(metrics, micro, logp.detach())


def observe_entropy(metrics: StepMetrics, micro: MicroBatch, entropy: Tensor) -> None:
    """The mean entropy [n] of the tokens that the policy sampled."""
    sampled = np.flatnonzero(micro.source == Source.POLICY)
    if len(sampled) == 0:
        return
    index = torch.as_tensor(sampled, device=entropy.device)
    total = entropy[index].sum()
    metrics.add_mean("entropy", total, count_of="entropy")
    metrics.add_count("entropy", len(sampled))


def observe_gap(metrics: StepMetrics, micro: MicroBatch, logp: Tensor) -> None:
    """How far the learner's log-probs [n] are from the rollout engine's, at the same weights."""
    behaviour = micro.streams["behaviour_logp"]
    was_sampled = ~np.isnan(behaviour)
    fresh = np.flatnonzero(micro.fresh & was_sampled)
    if len(fresh) == 0:
        return
    index = torch.as_tensor(fresh, device=logp.device)
    engine_logp = torch.as_tensor(behaviour[fresh], device=logp.device)
    gap = (logp[index] - engine_logp).abs()
    metrics.add_max("gap/max", gap.max())
    total = gap.sum()
    metrics.add_mean("gap/mean", total, count_of="gap")
    metrics.add_count("gap", len(fresh))


def gather(mine: StepMetrics, ranks: int) -> StepMetrics:
    """The same totals on every rank; ranks may have different names (a rank without rows has none
    of a term's).
    """
    if ranks == 1:
        return mine
    everyone: list = [None] * ranks
    torch.distributed.all_gather_object(everyone, mine)
    totals = StepMetrics()
    for one in everyone:
        totals.merge(one)
    return totals


def step_report(plan: StepPlan, totals: StepMetrics) -> dict[str, float]:
    """The metrics of the global batch, and the loss of all terms together."""
    found = totals.report()
    losses = []
    for term in plan.terms:
        loss = found.get(f"loss/{term.name}", 0.0)
        losses.append(term.coefficient * loss)
    found["loss"] = sum(losses)
    return found
