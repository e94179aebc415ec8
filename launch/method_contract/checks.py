"""What every method must do, whatever it optimises, each a check of its own: be finite on
degenerate batches, not depend on order or packing, survive a resume, draw by (seed, step).

The tests of the methods that come with Tandem and `tandem check-method` run the same checks.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from tandem.algorithms.base import Batch, Budget, Method
from tandem.algorithms.checks.method import check_metrics, check_state, title
from tandem.engine.core.types import Source
from tandem.engine.learner.inspect import Inspection, PerRow, describe
from tandem.launch.failure import raised
from tandem.launch.method_contract.batches import (
    EXPERTS,
    aligned,
    batch,
    degenerate,
    hinted,
    ids,
    look,
    ramp,
)
from tandem.launch.method_contract.differences import of_looks, of_runs
from tandem.launch.method_contract.driving import BUDGET, Carried, Driven, drive

PROBES = (3, 0, 90, 1, 1, -2)  # steps from the present one that a run might look at
SMALL = 12  # tokens of a micro-batch that holds a row or two


@dataclass(frozen=True)
class Subject:
    """What is checked. `make` gives the method as a new run has it."""

    make: Callable[[], Method]
    columns: Mapping[str, Any] = field(default_factory=dict)  # of every hand-made row
    budget: Budget = BUDGET

    def look(self, made: Batch, logp: PerRow = ramp, **more: Any) -> Inspection:
        return look(self.make(), made, logp, columns=self.columns, **more)

    def drive(
        self,
        method: Method,
        steps: range,
        carried: Carried | None = None,
        **more: Any,
    ) -> tuple[list[Driven], Carried]:
        return drive(method, steps, carried, self.budget, columns=self.columns, **more)


@dataclass(frozen=True)
class Finding:
    """A check that failed."""

    found: str
    expected: str
    change: str


Check = Callable[[Subject], Finding | None]


def same_draws(subject: Subject) -> Finding | None:
    """Two ranks, or two runs with one seed: the same rows and numbers."""
    one, _ = subject.drive(subject.make(), range(6))
    two, _ = subject.drive(subject.make(), range(6))
    found = of_runs(one, two)
    if not found:
        return None
    return Finding(
        f"two runs with one seed differ, in {found}",
        "the same numbers in both",
        "draw from np.random.default_rng([budget.seed, step]) (in rows() and terms() from "
        "batch.budget), never from a generator without a seed, from one that all share "
        "(np.random.rand, random, torch.rand) or from the clock",
    )


def finite(subject: Subject) -> Finding | None:
    for name, made in degenerate().items():
        method = subject.make()
        try:
            out = look(method, made, columns=subject.columns)
            metrics = check_metrics(method, method.metrics(0))
        except Exception as error:
            found = raised(error)
        else:
            found = not_finite(out, metrics)
        if found:
            return Finding(
                f"on a batch with {name}: {found}",
                "finite numbers on whatever a step may hold: groups are filtered, rewards all "
                "equal, demonstrations not asked for",
                "guard what divides by a count or a spread that may be 0, takes the mean or the "
                "largest of what may be empty, or the log of 0; a group without a demonstration "
                "has prompt.demonstration None",
            )
    return None


def not_finite(out: Inspection, metrics: Mapping[str, float]) -> str:
    if not math.isfinite(out.loss):
        return f"the loss is {out.loss}, by terms {out.terms}"
    for row, gradient in zip(out.rows, out.gradients, strict=True):
        if not np.isfinite(gradient).all():
            return f"the gradient of {describe(row)} is {gradient.tolist()}"
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"metrics() reports {name!r} as {value}"
    return ""


def empty_step(subject: Subject) -> Finding | None:
    out = subject.look(degenerate()["nothing"])
    if not out.rows and out.loss == 0.0:
        return None
    return Finding(
        f"a batch without rollouts and demonstrations gave {len(out.rows)} rows, loss {out.loss}",
        "no row and a loss of 0",
        "make rows of batch.groups and batch.experts alone",
    )


def trained_look(subject: Subject) -> Inspection:
    prefixed = aligned([0, 1, 0, 0], 1.0, prefix=True)
    given_hints = hinted((0, 1), 1)
    return subject.look(batch([prefixed, given_hints]))


def only_trained_tokens(subject: Subject) -> Finding | None:
    out = trained_look(subject)
    for row, gradient in zip(out.rows, out.gradients, strict=True):
        untrained = (row.source == Source.PROMPT) | ~row.trained
        if gradient[untrained].any():
            return Finding(
                f"the gradient of {describe(row)} by log-prob is {gradient.tolist()}, of source "
                f"{row.source.tolist()}",
                f"0 on tokens of the prompt (source {int(Source.PROMPT)}) and of no term",
                "set Row.weights[term] to 0 there, as expert_row and policy_row do",
            )
    return None


def own_weights(subject: Subject) -> Finding | None:
    for row in trained_look(subject).rows:
        for one, other in combinations(row.weights, 2):
            if np.shares_memory(row.weights[one], row.weights[other]):
                return Finding(
                    f"terms {one!r} and {other!r} have one array of weights in {describe(row)}",
                    "an array for each term: what changes one in place would change both",
                    "write mask.copy() for the second, or row.with_term(term, mask.copy())",
                )
    return None


def three_groups() -> Batch:
    """Groups whose rows are all different."""
    groups = []
    for number in range(3):
        rewards = [0, 1, 0, 2] if number else [0, 0, 0, 0]
        made = aligned(rewards, 1.0, number=number, prefix=number == 2)
        own = []
        for t in made.trajectories:
            is_sampled = t.source == Source.POLICY
            tokens = t.tokens + 20 * number * is_sampled
            own.append(replace(t, tokens=tokens))
        groups.append(replace(made, trajectories=tuple(own)))
    return batch(groups)


def turned(made: Batch) -> Batch:
    """Groups, the rollouts within each, and demonstrations the other way round."""
    groups = []
    for g in made.groups[::-1]:
        trajectories = g.trajectories[::-1]
        rewards = g.rewards[::-1]
        groups.append(replace(g, trajectories=trajectories, rewards=rewards))
    return replace(made, groups=tuple(groups), experts=EXPERTS[::-1])


def any_order(subject: Subject) -> Finding | None:
    made = three_groups()
    one = subject.look(made, ids)
    other = subject.look(turned(made), ids)
    found = of_looks(one, other)
    if not found:
        return None
    return Finding(
        f"with groups, rollouts and demonstrations the other way round: {found}",
        "the same terms and gradients: rollouts come in any order",
        "let nothing go by a place in batch.groups, group.trajectories or batch.experts; sort by "
        "group.group or prompt_id where an order is needed",
    )


def any_packing(subject: Subject) -> Finding | None:
    made = turned(three_groups())
    whole = subject.look(made, ids)
    split = subject.look(made, ids, micro_batch_tokens=SMALL, ranks=2)
    found = of_looks(whole, split)
    if not found:
        return None
    return Finding(
        f"in one micro-batch, then in small ones over two ranks: {found}",
        "the same terms and gradients, however the rows are packed",
        "an objective says one number for each token and leaves sums and means to Term.reduction: "
        "its tokens are those of one micro-batch. What concerns the whole step is computed in "
        "rows() or credit(); an objective that compares rows of a group is Term(together=True) or "
        "unit='group'",
    )


def demand_only_answers(subject: Subject, staleness: int) -> Finding | None:
    """The run asks for steps that it only looks at: however often, and in whatever order, nothing
    that follows changes.
    """
    plain, _ = subject.drive(subject.make(), range(10), staleness=staleness)
    probed, _ = subject.drive(subject.make(), range(10), staleness=staleness, probes=PROBES)
    found = of_runs(plain, probed)
    if not found:
        return None
    return Finding(
        f"once demand() and again() are asked without being used, {found}",
        "no difference: they are asked as often as the run likes",
        "let demand() and again() set nothing; what has to be remembered of a step goes into "
        "commit(step, demand, signals), which is called once for each",
    )


def resumes(subject: Subject, staleness: int) -> Finding | None:
    """14 steps equal 7, a checkpoint, a new object, and 7 more: demands, requests, rows, losses and
    metrics, to the bit.
    """
    whole, _ = subject.drive(subject.make(), range(14), staleness=staleness)
    first = subject.make()
    second = subject.make()
    before, carried = subject.drive(first, range(7), staleness=staleness)
    kept = pickle.dumps((check_state(first), carried))
    state, carried = pickle.loads(kept)
    second.load_state_dict(state)
    lost = lost_attributes(first, second)
    after, _ = subject.drive(second, range(7, 14), carried, staleness=staleness)
    found = of_runs(whole, before + after)
    if not found:
        return None
    held = f"state_dict() held {', '.join(state) or 'nothing'}"
    if lost:
        held += f"; a new object differs in {', '.join(lost)} after load_state_dict()"
    return Finding(
        f"without a resume, then with one behind step 6: {found}. {held}",
        "the same steps",
        "return from state_dict() all that later steps go by, and set it in load_state_dict()",
    )


def lost_attributes(first: Method, second: Method) -> list[str]:
    """Names of what the second has otherwise than the first, as far as it can be compared."""
    found = []
    for name, value in vars(first).items():
        other = vars(second).get(name)
        try:
            differs = pickle.dumps(value) != pickle.dumps(other)
        except Exception:  # nothing that a checkpoint could hold
            continue
        if differs:
            found.append(name)
    return found


def refuses_other_state(subject: Subject) -> Finding | None:
    method = subject.make()
    try:
        method.load_state_dict({"nonsense": 1})
    except (ValueError, KeyError):
        return None
    return Finding(
        f"{title(method)} took the state of another method, {{'nonsense': 1}}, without a word",
        "ValueError or KeyError, so that no run goes on from the wrong state",
        'read state["NAME"] in load_state_dict(), not state.get("NAME"); without a state of its '
        "own leave it out, the one of Method refuses all",
    )


CHECKS: dict[str, Check] = {
    "draws depend on seed and step alone": same_draws,
    "losses are finite on degenerate batches": finite,
    "an empty step trains nothing": empty_step,
    "only trained tokens have a gradient": only_trained_tokens,
    "every term has weights of its own": own_weights,
    "order changes nothing": any_order,
    "micro-batches and ranks change nothing": any_packing,
    "demand and again only answer": partial(demand_only_answers, staleness=0),
    "demand and again only answer, staleness 2": partial(demand_only_answers, staleness=2),
    "state survives a resume": partial(resumes, staleness=0),
    "state survives a resume, staleness 2": partial(resumes, staleness=2),
    "the state of another method is refused": refuses_other_state,
}


def run_check(check: Check, subject: Subject) -> Finding | None:
    """The check's finding, or one that says what the method raised."""
    try:
        return check(subject)
    except (Exception, SystemExit) as error:
        change = "see the place; tandem.inspect shows the same on a batch of your own"
        if isinstance(error, KeyError):
            change = (
                "if that is a column of your dataset, give it to the hand-made rows: "
                f"--column {error.args[0]}=VALUE"
            )
        return Finding(raised(error), "no error", change)
