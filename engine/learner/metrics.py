"""Metrics of an update: added up over micro-batches and ranks."""

from __future__ import annotations

import numpy as np
import torch

from tandem.engine.core.types import MicroBatch, Source, StepPlan
from tandem.engine.learner import terms as term_losses


def observe(
    micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What a micro-batch shows beside its losses: `observed/` for sums, which no term's name can
    meet, and `max/` for maxima. Indices are made on the host, so that the GPU is not waited for.
    """
    found = {
        "tokens/trained": torch.tensor(float(len(micro.index))),
        "tokens/real": torch.tensor(float(micro.real_tokens)),
        "tokens/padded": torch.tensor(float(micro.tokens.size)),
    }
    if entropy is not None:
        sampled = np.flatnonzero(micro.source == Source.POLICY)
        found["observed/entropy"] = entropy[torch.as_tensor(sampled, device=logp.device)].sum()
        found["observed/entropy_tokens"] = torch.tensor(float(len(sampled)))
    if "behaviour_logp" in micro.streams:
        fresh = np.flatnonzero(micro.fresh & ~np.isnan(micro.streams["behaviour_logp"]))
        if len(fresh):
            gap = (
                logp[torch.as_tensor(fresh, device=logp.device)]
                - torch.as_tensor(micro.streams["behaviour_logp"][fresh], device=logp.device)
            ).abs()
            found |= {
                "observed/gap": gap.sum(),
                "max/gap": gap.max(),
                "observed/gap_tokens": torch.tensor(float(len(fresh))),
            }
    return found


def merge(into: dict, more: dict) -> None:
    """Add sums, keep the larger of maxima."""
    for key, value in more.items():
        if key not in into:
            into[key] = value
        elif key.startswith("max/"):
            # both keep NaN
            into[key] = (
                torch.maximum(into[key], value)
                if isinstance(value, torch.Tensor)
                else float(np.maximum(into[key], value))
            )
        else:
            into[key] = into[key] + value


def numbers(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The one place where a step waits for the device: a single copy to the host."""
    device = next((v.device for v in sums.values() if v.device.type != "cpu"), "cpu")
    values = (
        torch.stack(
            [v.to(device, torch.float32, non_blocking=True) for v in sums.values()]
        ).tolist()
        if sums
        else []
    )
    return dict(zip(sums, values, strict=True))


def gather(mine: dict[str, float], ranks: int) -> dict[str, float]:
    """The same totals on every rank; ranks may have different keys (a rank without rows has none of
    a term's).
    """
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
    metrics["loss"] = sum(
        term.coefficient * totals.get(f"loss/{term.name}", 0.0) for term in plan.terms
    )
    metrics |= term_losses.means(totals)
    if totals.get("observed/entropy_tokens"):
        metrics["entropy"] = totals["observed/entropy"] / totals["observed/entropy_tokens"]
    if totals.get("observed/gap_tokens"):
        metrics |= {
            "gap/max": totals["max/gap"],
            "gap/mean": totals["observed/gap"] / totals["observed/gap_tokens"],
        }
    return metrics
