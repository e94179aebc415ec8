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
from tandem.engine.method_checks import check_terms, naming
from tandem.engine.packing import pack
from tandem.engine.row_checks import ask_credit, ask_rows, check_rows
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
    check(method, batch, micro_batch_tokens, ranks)
    rows, terms = ask_rows(method, batch), method.terms(batch)
    terms = check_terms(method, terms)
    rows = check_rows(method, rows, terms)
    needs = {need: term.name for term in terms for need in term.needs}
    zeros = lambda row: np.zeros(len(row.tokens))
    if value is None and "value" in needs:
        value = zeros
    for name, argument, given, present in (("old_logp", "old", old, logp), ("old_value", "old_value", old_value, value),
                                           ("ref_logp", "reference", reference, None), ("entropy", "entropy", entropy, None)):
        per_row = given or (present if name in needs else None)
        if per_row is None and name in needs and rows:
            raise ValueError(f"term {needs[name]!r} needs {name!r}, which inspect was not given: pass {argument}=, a function from a row to float [T]")
        if per_row and name != "entropy":
            rows = [replace(r, **{name: numbers(argument, per_row, r, absent=True)}) for r in rows]
    rows = ask_credit(method, rows, batch, terms)
    with naming(method):
        z = denominators(terms, rows)
    leaf = lambda name, per_row: [torch.tensor(numbers(name, per_row, r), requires_grad=True) for r in rows]
    leaves, value_leaves = leaf("logp", logp), None if value is None else leaf("value", value)
    extra = {**{name: zeros for name in needs.keys() - set(Tokens.__dataclass_fields__)}, **extra}
    total, sums = torch.zeros(()), {}
    for micro in (m for rank in pack(rows, terms, ranks, micro_batch_tokens, batch.step) for m in rank):
        places = [(i, np.flatnonzero(rows[i].trained)) for i in micro.rows]
        gather = lambda per_row: torch.cat([per_row(i)[torch.as_tensor(t)] for i, t in places]) if places else torch.zeros(0, requires_grad=True)
        entropies = None if entropy is None else gather(lambda i: torch.tensor(numbers("entropy", entropy, rows[i]), requires_grad=True))
        values = None if value is None else gather(lambda i: value_leaves[i])
        extras = {name: gather(lambda i: torch.tensor(numbers(f"extra[{name!r}]", f, rows[i]), requires_grad=True)) for name, f in extra.items()}
        with naming(method):
            loss, parts = evaluate(terms, z, micro, streams(micro, gather(lambda i: leaves[i]), entropies, values, extras))
        total = total + loss
        for key, part in parts.items():
            sums[key] = sums.get(key, 0.0) + float(part)
    if total.requires_grad:
        total.backward()
    gradient = lambda leaves: [np.zeros(len(r.tokens), np.float32) if l.grad is None else l.grad.numpy() for r, l in zip(rows, leaves)]
    return Inspection(total.item(), {t.name: sums.get(f"loss/{t.name}", 0.0) for t in terms}, {t.name: t.coefficient for t in terms}, z, gradient(leaves),
                      gradient(value_leaves or leaves[:0]), means(sums), rows)


def numbers(name: str, per_row: PerRow, row: Row, absent: bool = False) -> np.ndarray:
    """float32 [T]: what the caller's function says of a row. NaN is no number where the row is trained, unless the stream may be `absent` there."""
    if not callable(per_row):
        raise ValueError(f"inspect: {name} is {type(per_row).__name__}, expected a function from a row to float [T], e.g. lambda row: np.full(len(row.tokens), -0.5)")
    try:
        found = np.asarray(per_row(row), np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"inspect: {name} of {describe(row)} cannot be had as float [T]: {error}") from error
    if found.shape != row.tokens.shape:
        raise ValueError(f"inspect: {name} of {describe(row)} has shape {found.shape}, expected {row.tokens.shape}: one number per token, those of the prompt too "
                         "(they are not read)")
    if not absent and np.isnan(found[row.trained]).any():
        raise ValueError(f"inspect: {name} of {describe(row)} is NaN at token {np.flatnonzero(np.isnan(found) & row.trained)[0]}, which is trained; only others may be NaN")
    return found


def describe(row: Row) -> str:
    return f"the row with tokens {row.tokens[:8].tolist()}{'...' if len(row.tokens) > 8 else ''} of prompt {row.prompt_id!r}"


def check(method: Method, batch: Batch, micro_batch_tokens: int, ranks: int) -> None:
    """Raise ValueError for what would otherwise be left out of the loss without a word, or fail far from its cause."""
    if not isinstance(method, Method):
        raise ValueError(f"inspect: method is {method!r}, expected a Method, e.g. make_method('grpo', {{}})")
    for name, found, kind in (("groups", batch.groups, ScoredGroup), ("experts", batch.experts, Trajectory)):
        if isinstance(found, kind) or not all(isinstance(x, kind) for x in found):
            raise ValueError(f"inspect: Batch.{name} must be a tuple of {kind.__name__}, found {type(found).__name__}; a tuple of one is written (x,)")
    if len({g.group for g in batch.groups}) < len(batch.groups):
        raise ValueError(f"inspect: the groups have numbers {[g.group for g in batch.groups]}; each needs one of its own: group(..., number=i)")
    for i, t in enumerate(batch.experts):
        if not (t.source == Source.EXPERT).any():
            raise ValueError(f"inspect: Batch.experts[{i}] has no token of the expert, so nothing of it would be trained; make it with trajectory(..., expert=True)")
    if micro_batch_tokens < 1 or ranks < 1:
        raise ValueError(f"inspect: micro_batch_tokens is {micro_batch_tokens} and ranks is {ranks}; both must be at least 1")


def trajectory(prompt: Sequence[int], response: Sequence[int], behaviour_logp: Sequence[float] | None = None, expert: bool = False, version: int = 0,
               finish: Finish = Finish.STOP, prompt_id: str = "p", group: int = 0) -> Trajectory:
    """A hand-made sequence: prompt ids (one at least: the first token has no log-prob), response ids, and for rollouts the engine's log-prob of each response
    token (0 if not given)."""
    n, m = len(prompt), len(response)
    if n == 0:
        raise ValueError("trajectory: the prompt is empty, expected at least one token: the first of a sequence has no log-prob, so it cannot be trained")
    if behaviour_logp is not None and len(behaviour_logp) != m:
        raise ValueError(f"trajectory: behaviour_logp has {len(behaviour_logp)} entries, expected {m}: one per token of the response, none for the prompt")
    pad = lambda before, values: np.concatenate([np.full(n, before), values]).astype(np.float32)
    given = np.zeros(m) if behaviour_logp is None else np.asarray(behaviour_logp, float)
    return Trajectory(prompt_id, np.array([*prompt, *response], np.int32), np.array([Source.PROMPT] * n + [Source.EXPERT if expert else Source.POLICY] * m, np.int8),
                      finish, pad(np.nan, np.full(m, np.nan) if expert else given),
                      np.array([-1] * n + [-1 if expert else version] * m, np.int32), -1 if expert else group)


def group(trajectories: Sequence[Trajectory], rewards: Sequence[float], demonstration: Sequence[int] | None = None, number: int = 0,
          demonstration_reward: float | None = None) -> ScoredGroup:
    """Hand-made rollouts of one prompt with their rewards; response ids of the prompt's demonstration, and its reward for methods that score it (LUFFY, SRFT,
    ViSurf: without one it takes no part, as where its reward function fails). `number` tells the groups of a batch apart."""
    if not trajectories:
        raise ValueError("group: no trajectories, expected at least one; a prompt that nothing was sampled for is no group")
    prompts = [t.tokens[t.source == Source.PROMPT].tolist() for t in trajectories]
    for i, (t, prompt) in enumerate(zip(trajectories, prompts)):
        if prompt != prompts[0]:
            raise ValueError(f"group: trajectory {i} continues prompt {prompt}, trajectory 0 prompt {prompts[0]}; a group is of one prompt")
        if (t.source == Source.EXPERT).any():
            raise ValueError(f"group: trajectory {i} is a demonstration; give its response as demonstration=[...] here, or the whole of it in Batch.experts")
    values = np.array(rewards, np.float32)
    if values.shape != (len(trajectories),) or not np.isfinite(values).all():
        raise ValueError(f"group: rewards are {values.tolist()}, expected one finite number for each of the {len(trajectories)} trajectories")
    if demonstration is not None and len(demonstration) == 0:
        raise ValueError("group: the demonstration is empty, expected at least one token, or None for a prompt that has none")
    first = trajectories[0]
    prompt = Prompt(first.prompt_id, np.array(prompts[0], np.int32), "", {}, None if demonstration is None else np.array(demonstration, np.int32))
    return ScoredGroup(number, prompt, tuple(replace(t, group=number) for t in trajectories), values, demonstration_reward=demonstration_reward)
