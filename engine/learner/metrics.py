"""Numbers of one optimizer step while they are added up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from tandem.engine.core.types import MicroBatch, Source, StepPlan

Number: TypeAlias = torch.Tensor | float  # a scalar: on the device while a step runs, then a float


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
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_max(self, name: str, value: Number) -> None:
        self.maxima[name] = larger(self.maxima[name], value) if name in self.maxima else value

    def add_count(self, name: str, count: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + count

    def add_mean(self, name: str, total: Number, count_of: str) -> None:
        """`count_of` names the count, which `add_count` counts."""
        self.totals[name] = self.totals[name] + total if name in self.totals else total
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
        kinds = (self.sums, self.maxima, self.totals)
        floats = iter(to_floats(value for kind in kinds for value in kind.values()))
        sums, maxima, totals = (named(kind, floats) for kind in kinds)
        return StepMetrics(sums, maxima, totals, dict(self.count_of), dict(self.counts))

    def means(self) -> dict[str, float]:
        """0 where nothing was counted."""
        found = {}
        for name, total in self.totals.items():
            count = self.counts[self.count_of[name]]
            found[name] = float(total) / count if count else 0.0
        return found

    def report(self) -> dict[str, float]:
        """Sums, maxima and means."""
        found = {name: float(value) for name, value in {**self.sums, **self.maxima}.items()}
        return found | self.means()


def larger(a: Number, b: Number) -> Number:
    """NaN if one of them is."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.maximum(a, b)
    return float(np.maximum(float(a), float(b)))


def to_floats(values: Iterable[Number]) -> list[float]:
    """In float32, by one copy from the device."""
    values = [torch.as_tensor(value) for value in values]
    if not values:
        return []
    device = next((v.device for v in values if v.device.type != "cpu"), torch.device("cpu"))
    together = [value.to(device, torch.float32, non_blocking=True) for value in values]
    return torch.stack(together).tolist()


def named(names: Iterable[str], values: Iterator[float]) -> dict[str, Number]:
    """The next values, one under each name."""
    return {name: next(values) for name in names}


def observe(
    metrics: StepMetrics, micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor | None
) -> None:
    """Add what a micro-batch shows beside its losses. Indices are computed on the host to avoid a
    device sync.
    """
    metrics.add_sum("tokens/trained", float(len(micro.index)))
    metrics.add_sum("tokens/real", float(micro.real_tokens))
    metrics.add_sum("tokens/padded", float(micro.tokens.size))
    if entropy is not None:
        sampled = np.flatnonzero(micro.source == Source.POLICY)
        if len(sampled):
            total = entropy.detach()[torch.as_tensor(sampled, device=logp.device)].sum()
            metrics.add_mean("entropy", total, count_of="entropy")
            metrics.add_count("entropy", len(sampled))
    behaviour = micro.streams.get("behaviour_logp")
    if behaviour is None:
        return
    fresh = np.flatnonzero(micro.fresh & ~np.isnan(behaviour))
    if len(fresh):
        here = logp.detach()[torch.as_tensor(fresh, device=logp.device)]
        gap = (here - torch.as_tensor(behaviour[fresh], device=logp.device)).abs()
        metrics.add_max("gap/max", gap.max())
        metrics.add_mean("gap/mean", gap.sum(), count_of="gap")
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
    found["loss"] = sum(
        term.coefficient * found.get(f"loss/{term.name}", 0.0) for term in plan.terms
    )
    return found
