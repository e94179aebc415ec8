"""A method's full objective on hand-made rows and given per-token numbers: no model, no Ray, no GPU.

    from tandem.algorithms.inspect import inspect, trajectory, group
    g = group([trajectory(prompt=[1], response=[5, 6]), trajectory(prompt=[1], response=[7])], rewards=[1.0, 0.0])
    out = inspect(make_method("grpo", {}), Batch(0, (g,), ()), logp=lambda row: np.full(len(row.tokens), -0.5))
    out.loss, out.terms["policy"], out.gradients[0]

It takes the path that training takes: the method's rows and terms, the packer, the global denominators and `engine.terms.evaluate`. Only the numbers
that a model would give (log-probs, entropies) come from the caller. Unit tests, notebooks and comparisons with authors' code stand on it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tandem.algorithms.base import Batch, Method
from tandem.engine.packing import pack
from tandem.engine.terms import denominators, evaluate, streams
from tandem.engine.types import Finish, Prompt, Row, ScoredGroup, Source, Trajectory

PerRow = Callable[[Row], np.ndarray]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What an objective said. `gradients[i]` is d loss / d logp of row i, float32 [T], zero on tokens that are not trained."""

    loss: float
    terms: dict[str, float]             # value of each term, before its coefficient
    coefficients: dict[str, float]
    denominators: dict[str, float]
    gradients: list[np.ndarray]
    metrics: dict[str, float]           # TERM/METRIC, mean over the term's tokens
    rows: list[Row]


def inspect(method: Method, batch: Batch, logp: PerRow, entropy: PerRow | None = None, old: PerRow | None = None, reference: PerRow | None = None,
            micro_batch_tokens: int = 1 << 20, ranks: int = 1) -> Inspection:
    """Evaluate `method` on `batch`. logp, entropy, old and reference map a row to float [T]; old and reference become the row's streams."""
    rows = list(method.rows(batch))
    if old is not None:
        rows = [replace(r, old_logp=np.asarray(old(r), np.float32)) for r in rows]
    if reference is not None:
        rows = [replace(r, ref_logp=np.asarray(reference(r), np.float32)) for r in rows]
    terms = method.terms(batch)
    z = denominators(terms, rows)
    leaves = [torch.tensor(np.asarray(logp(r)), dtype=torch.float32, requires_grad=True) for r in rows]
    total, sums = torch.zeros(()), {}
    for micro in (m for rank in pack(rows, terms, ranks, micro_batch_tokens, batch.step) for m in rank):
        places = [(i, np.flatnonzero(rows[i].trained)) for i in micro.rows]
        gather = lambda per_row: torch.cat([per_row(i)[torch.as_tensor(t)] for i, t in places]) if places else torch.zeros(0, requires_grad=True)
        entropies = None if entropy is None else gather(lambda i: torch.tensor(np.asarray(entropy(rows[i])), dtype=torch.float32))
        loss, parts = evaluate(terms, z, micro, streams(micro, gather(lambda i: leaves[i]), entropies))
        total = total + loss
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    if total.requires_grad:
        total.backward()
    gradients = [np.zeros(len(r.tokens), np.float32) if l.grad is None else l.grad.numpy() for r, l in zip(rows, leaves)]
    metrics = {}
    for key, value in sums.items():
        if key.startswith("sum/"):
            term, metric = key[4:].split("/", 1)
            metrics[f"{term}/{metric}"] = value / max(sums[f"count/{term}"], 1.0)
    return Inspection(total.item(), {t.name: sums.get(f"loss/{t.name}", 0.0) for t in terms}, {t.name: t.coefficient for t in terms}, z, gradients,
                      metrics, rows)


def trajectory(prompt: Sequence[int], response: Sequence[int], behaviour_logp: Sequence[float] | None = None, expert: bool = False, version: int = 0,
               finish: Finish = Finish.STOP, prompt_id: str = "p", group: int = 0) -> Trajectory:
    """A hand-made sequence: prompt ids, response ids, and for rollouts the engine's log-prob of each response token (0 if not given)."""
    n, m = len(prompt), len(response)
    pad = lambda before, values: np.concatenate([np.full(n, before), values]).astype(np.float32)
    given = np.zeros(m) if behaviour_logp is None else np.asarray(behaviour_logp, float)
    return Trajectory(prompt_id, np.array([*prompt, *response], np.int32), np.array([Source.PROMPT] * n + [Source.EXPERT if expert else Source.POLICY] * m, np.int8),
                      finish, pad(np.nan, np.full(m, np.nan) if expert else given),
                      np.array([-1] * n + [-1 if expert else version] * m, np.int32), -1 if expert else group)


def group(trajectories: Sequence[Trajectory], rewards: Sequence[float], demonstration: Sequence[int] | None = None, number: int = 0) -> ScoredGroup:
    """Hand-made rollouts of one prompt with their rewards."""
    first = trajectories[0]
    prompt = Prompt(first.prompt_id, first.tokens[first.source == Source.PROMPT], "", {}, None if demonstration is None else np.array(demonstration, np.int32))
    return ScoredGroup(number, prompt, tuple(replace(t, group=number) for t in trajectories), np.array(rewards, np.float32))
