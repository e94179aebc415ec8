"""A method's full objective on hand-made rows and given per-token numbers: no model, no Ray, no GPU.

    from tandem.algorithms.inspect import inspect, trajectory, group
    g = group([trajectory(prompt=[1], response=[5, 6]), trajectory(prompt=[1], response=[7])], rewards=[1.0, 0.0])
    out = inspect(make_method("grpo", {}), Batch(0, (g,), ()), logp=lambda row: np.full(len(row.tokens), -0.5))
    out.loss, out.terms["policy"], out.gradients[0]

It takes the path that training takes: the method's rows, terms and credit, the packer, the global denominators and `engine.terms.evaluate`. Only the
numbers that a model would give (log-probs, entropies, values) come from the caller. Unit tests, notebooks and comparisons with authors' code stand on it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tandem.algorithms.base import Batch, Method
from tandem.algorithms.objectives import Tokens
from tandem.engine.packing import pack
from tandem.engine.terms import denominators, evaluate, means, streams
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
    value_gradients: list[np.ndarray]   # d loss / d value, the same way
    metrics: dict[str, float]           # TERM/METRIC, mean over the term's tokens; TERM/PART/METRIC over those of a part, e.g. policy/expert/p
    rows: list[Row]


def inspect(method: Method, batch: Batch, logp: PerRow, entropy: PerRow | None = None, old: PerRow | None = None, reference: PerRow | None = None,
            value: PerRow | None = None, old_value: PerRow | None = None, extra: Mapping[str, PerRow] = {}, micro_batch_tokens: int = 1 << 20, ranks: int = 1) -> Inspection:
    """Evaluate `method` on `batch`. logp, entropy, old, reference, value and old_value map a row to float [T]; all but logp, entropy and value become the
    row's streams. For a term that needs old log-probs or values and is given none, the present ones are the old ones, as before a first update; the
    present value is 0 if not given, as of a new critic. `extra` are the streams that a custom forward would give, 0 if not given."""
    rows, terms = list(method.rows(batch)), method.terms(batch)
    needs = frozenset().union(*(term.needs for term in terms))
    if value is None and "value" in needs:
        value = lambda row: np.zeros(len(row.tokens))
    for name, given, present in (("old_logp", old, logp), ("old_value", old_value, value), ("ref_logp", reference, None)):
        if per_row := given or (present if name in needs else None):
            rows = [replace(r, **{name: np.asarray(per_row(r), np.float32)}) for r in rows]
        elif name in needs and rows:
            raise ValueError(f"a term needs {name!r}, which inspect was not given")
    rows = list(method.credit(rows, batch))
    z = denominators(terms, rows)
    leaf = lambda per_row: [torch.tensor(np.asarray(per_row(r)), dtype=torch.float32, requires_grad=True) for r in rows]
    leaves, value_leaves = leaf(logp), None if value is None else leaf(value)
    extra = {**{name: lambda row: np.zeros(len(row.tokens)) for name in needs - set(Tokens.__dataclass_fields__)}, **extra}
    total, sums = torch.zeros(()), {}
    for micro in (m for rank in pack(rows, terms, ranks, micro_batch_tokens, batch.step) for m in rank):
        places = [(i, np.flatnonzero(rows[i].trained)) for i in micro.rows]
        gather = lambda per_row: torch.cat([per_row(i)[torch.as_tensor(t)] for i, t in places]) if places else torch.zeros(0, requires_grad=True)
        entropies = None if entropy is None else gather(lambda i: torch.tensor(np.asarray(entropy(rows[i])), dtype=torch.float32))
        values = None if value is None else gather(lambda i: value_leaves[i])
        extras = {name: gather(lambda i: torch.tensor(np.asarray(f(rows[i])), dtype=torch.float32)) for name, f in extra.items()}
        loss, parts = evaluate(terms, z, micro, streams(micro, gather(lambda i: leaves[i]), entropies, values, extras))
        total = total + loss
        for key, part in parts.items():
            sums[key] = sums.get(key, 0.0) + float(part)
    if total.requires_grad:
        total.backward()
    gradient = lambda leaves: [np.zeros(len(r.tokens), np.float32) if l.grad is None else l.grad.numpy() for r, l in zip(rows, leaves)]
    return Inspection(total.item(), {t.name: sums.get(f"loss/{t.name}", 0.0) for t in terms}, {t.name: t.coefficient for t in terms}, z, gradient(leaves),
                      gradient(value_leaves or leaves[:0]), means(sums), rows)


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
