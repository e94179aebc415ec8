"""A method's full objective on hand-made rows and given per-token numbers: no model, Ray or GPU.

    from tandem import group, inspect, trajectory
    g = group([trajectory(prompt=[1], response=[5, 6]), trajectory(prompt=[1], response=[7])],
              rewards=[1.0, 0.0])
    out = inspect(make_method("grpo", {}), Batch(0, (g,), ()),
                  logp=lambda row: np.full(len(row.tokens), -0.5))
    out.loss, out.terms["policy"], out.gradients[0]

It takes the path that training takes: the method's rows, terms and credit, the packer, the global
denominators and `terms.micro_batch_loss`. Only the numbers that a model would give (log-probs,
entropies, values) come from the caller. Unit tests, notebooks and comparisons with authors' code
stand on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.algorithms.base import Batch, Method, quantities_of
from tandem.algorithms.checks.method import naming
from tandem.algorithms.checks.rows import ask_credit, ask_rows, ask_score, check_rows
from tandem.algorithms.checks.terms import ask_probes, check_terms
from tandem.algorithms.parts.objectives.tokens import MODEL_STREAMS
from tandem.engine.config.names import REFERENCE, model_of
from tandem.engine.core.types import (
    MicroBatch,
    Row,
    ScoredGroup,
    Source,
    Trajectory,
)
from tandem.engine.learner.metrics import StepMetrics
from tandem.engine.learner.packing import pack
from tandem.engine.learner.terms import denominators, make_tokens, micro_batch_loss

PerRow = Callable[[Row], np.ndarray]
NO_EXTRA: Mapping[str, PerRow] = {}


@dataclass(frozen=True, eq=False)
class Inspection:
    """What an objective said.

    `gradients[i]` is d loss / d logp of row i, float32 [T], zero on tokens that are not trained.
    """

    loss: float
    terms: dict[str, float]  # value of each term, before its coefficient
    coefficients: dict[str, float]
    denominators: dict[str, float]
    gradients: list[np.ndarray]
    value_gradients: list[np.ndarray]  # d loss / d value, the same way
    extra_gradients: dict[str, list[np.ndarray]]  # d loss / d each of `extra`
    # TERM/METRIC, mean over the term's tokens; TERM/PART/METRIC over those of a part, e.g.
    # policy/expert/p
    metrics: dict[str, float]
    rows: list[Row]


def inspect(
    method: Method,
    batch: Batch,
    logp: PerRow,
    entropy: PerRow | None = None,
    old: PerRow | None = None,
    reference: PerRow | None = None,
    models: Mapping[str, PerRow] = NO_EXTRA,
    value: PerRow | None = None,
    old_value: PerRow | None = None,
    extra: Mapping[str, PerRow] = NO_EXTRA,
    micro_batch_tokens: int = 1 << 20,
    ranks: int = 1,
) -> Inspection:
    """Evaluate `method` on `batch`.

    logp, entropy, old, reference, value and old_value map a row to float [T], and so do `models`,
    {NAME or NAME@VIEW: of that model}; all but logp, entropy and value become the row's streams,
    unless the method's rows bring these themselves.
    For a term that needs old log-probs or values and is given none, the present ones are the old
    ones, as before a first update; the present value is 0 if not given, as of a new critic. `extra`
    are the quantities that terms and probes ask for, and the streams that a custom forward would
    give, 0 if not given. Raises ValueError for input that does not fit.
    """
    check(method, batch, micro_batch_tokens, ranks)
    batch = ask_score(method, batch)
    rows, terms = ask_rows(method, batch), method.terms(batch)
    terms = check_terms(method, terms, batch.budget.models)
    rows = check_rows(method, rows, terms)
    needs = {need: term.name for term in terms for need in term.needs}
    if value is None and "value" in needs:
        value = zeros
    if entropy is None and "entropy" in needs and rows:
        raise not_given("entropy", "entropy", needs)
    rows = with_stream(rows, "old_logp", "old", old, logp, needs)
    rows = with_stream(rows, "old_value", "old_value", old_value, value, needs)
    rows = with_stream(rows, "ref_logp", "reference", reference, None, needs)
    for need in sorted(needs):
        model = model_of(need)
        lacking = any(need not in row.streams for row in rows)
        if model in (None, REFERENCE) or not lacking:
            continue
        of_model = models.get(model)
        if of_model is None:
            raise ValueError(
                f"term {needs[need]!r} needs {need!r}, which inspect was not given: pass "
                f"models={{{model!r}: a function from a row to float [T]}}"
            )
        rows = with_stream(rows, need, f"models[{model!r}]", of_model, None, needs)
    probes = ask_probes(method, batch, rows)
    for name in probes:
        rows = with_stream(rows, name, f"extra[{name!r}]", extra.get(name, zeros), None, needs)
    extra = {name: per_row for name, per_row in extra.items() if name not in probes}
    rows = ask_credit(method, rows, batch, terms)
    with naming(method):
        z = denominators(terms, rows)
    brought = {name for row in rows for name in row.streams}
    of_forward = needs.keys() - brought - set(MODEL_STREAMS) | quantities_of(terms).keys()
    given = Given(rows, {"logp": logp, **dict.fromkeys(of_forward, zeros), **extra})
    given.add("entropy", entropy)
    given.add("value", value)
    total, metrics = torch.zeros(()), StepMetrics()
    for micro_batches in pack(rows, terms, ranks, micro_batch_tokens, batch.step):
        for micro in micro_batches:
            with naming(method):
                loss, found = micro_batch_loss(terms, z, micro, make_tokens(micro, given.of(micro)))
            total = total + loss
            metrics.merge(found.on_host())
    if total.requires_grad:
        total.backward()
    losses = metrics.report()
    return Inspection(
        loss=total.item(),
        terms={term.name: losses.get(f"loss/{term.name}", 0.0) for term in terms},
        coefficients={term.name: term.coefficient for term in terms},
        denominators=z,
        gradients=gradients_of(given.leaves["logp"]),
        value_gradients=gradients_of(given.leaves.get("value", [])),
        extra_gradients={
            name: gradients_of(leaves)
            for name, leaves in given.leaves.items()
            if name in of_forward | extra.keys()
        },
        metrics=metrics.means(),
        rows=rows,
    )


def zeros(row: Row) -> np.ndarray:
    return np.zeros(len(row.tokens))


def not_given(stream: str, argument: str, needs: Mapping[str, str]) -> ValueError:
    return ValueError(
        f"term {needs[stream]!r} needs {stream!r}, which inspect was not given: pass {argument}=, "
        "a function from a row to float [T]"
    )


def with_stream(
    rows: Sequence[Row],
    name: str,
    argument: str,
    given: PerRow | None,
    present: PerRow | None,
    needs: Mapping[str, str],
) -> list[Row]:
    """The rows with the stream `name`: their own, or as given, or, where a term needs it, the
    present numbers.
    """
    per_row = given
    if per_row is None and name in needs:
        per_row = present
    found = []
    for row in rows:
        if name not in row.streams:
            if per_row is not None:
                stream = numbers(argument, per_row, row, absent=True)
                row = row.with_streams(**{name: stream})
            elif name in needs:
                raise not_given(name, argument, needs)
        found.append(row)
    return found


class Given:
    """The caller's numbers as leaves of the graph: one tensor [T] per row and name."""

    def __init__(self, rows: Sequence[Row], outputs: Mapping[str, PerRow]):
        self.rows = rows
        self.leaves: dict[str, list[Tensor]] = {}
        for name, per_row in outputs.items():
            self.add(name, per_row)

    def add(self, name: str, per_row: PerRow | None) -> None:
        if per_row is None:
            return
        found = [numbers(name, per_row, row) for row in self.rows]
        self.leaves[name] = [torch.tensor(values, requires_grad=True) for values in found]

    def of(self, micro: MicroBatch) -> dict[str, Tensor]:
        """As if a model had said it of this micro-batch."""
        return {name: self.gather(micro, leaves) for name, leaves in self.leaves.items()}

    def gather(self, micro: MicroBatch, leaves: Sequence[Tensor]) -> Tensor:
        parts = [leaves[i][torch.as_tensor(self.rows[i].trained)] for i in micro.rows]
        return torch.cat(parts) if parts else torch.zeros(0, requires_grad=True)


def gradients_of(leaves: Sequence[Tensor]) -> list[np.ndarray]:
    """float32 [T] per row, 0 where nothing depends on it."""
    found = []
    for leaf in leaves:
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found.append(grad.numpy())
    return found


def numbers(name: str, per_row: PerRow, row: Row, absent: bool = False) -> np.ndarray:
    """float32 [T]: what the caller's function says of a row.

    NaN is no number where the row is trained, unless the stream may be `absent` there.
    """
    if not callable(per_row):
        raise ValueError(
            f"inspect: {name} is {type(per_row).__name__}, expected a function from a row to float "
            "[T], e.g. lambda row: np.full(len(row.tokens), -0.5)"
        )
    try:
        found = np.asarray(per_row(row), np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"inspect: {name} of {describe(row)} cannot be read as float [T]: {error}"
        ) from error
    if found.shape != row.tokens.shape:
        raise ValueError(
            f"inspect: {name} of {describe(row)} has shape {found.shape}, expected "
            f"{row.tokens.shape}: one number per token, those of the prompt too (they are not read)"
        )
    missing = np.flatnonzero(np.isnan(found) & row.trained)
    if not absent and len(missing):
        raise ValueError(
            f"inspect: {name} of {describe(row)} is NaN at token {missing[0]}, which is trained; "
            "only others may be NaN"
        )
    return found


def describe(row: Row) -> str:
    tokens = ", ".join(map(str, row.tokens[:8]))
    more = ", ..." if len(row.tokens) > 8 else ""
    return f"the row with tokens [{tokens}{more}] of prompt {row.prompt_id!r}"


def check(method: Method, batch: Batch, micro_batch_tokens: int, ranks: int) -> None:
    """Raise ValueError for what would otherwise be left out of the loss silently, or fail far from
    its cause.
    """
    if not isinstance(method, Method):
        raise ValueError(
            f"inspect: method is {method!r}, expected a Method, e.g. make_method('grpo', {{}})"
        )
    check_tuple("groups", batch.groups, ScoredGroup)
    check_tuple("experts", batch.experts, Trajectory)
    ordinals = [group.group for group in batch.groups]
    if len(set(ordinals)) < len(ordinals):
        raise ValueError(
            f"inspect: the groups have numbers {ordinals}; each needs one of its own: "
            "group(..., number=i)"
        )
    for i, expert in enumerate(batch.experts):
        if not (expert.source == Source.EXPERT).any():
            raise ValueError(
                f"inspect: Batch.experts[{i}] has no token of the expert, so nothing of it would "
                "be trained; make it with trajectory(..., expert=True)"
            )
    if micro_batch_tokens < 1 or ranks < 1:
        raise ValueError(
            f"inspect: micro_batch_tokens is {micro_batch_tokens} and ranks is {ranks}; both must "
            "be at least 1"
        )


def check_tuple(name: str, found, kind: type) -> None:
    if isinstance(found, kind) or not all(isinstance(item, kind) for item in found):
        raise ValueError(
            f"inspect: Batch.{name} must be a tuple of {kind.__name__}, found "
            f"{type(found).__name__}; a tuple of one is written (x,)"
        )
