"""Producer: keeps rollouts flowing to the learner, never more than `staleness` steps ahead of it.

The rollouts of step k are requested when step k - staleness begins, so a token that step k trains
on was sampled with weights at most `staleness` steps old. Synchronous training is staleness 0,
one-step-off is 1; there is no other code for it.

Groups are handed over in the order they were requested, so a run is reproducible whatever engine
answers first. Scoring starts as soon as a group is generated, while others still generate. With
over-sampling a step asks for more groups than it needs, takes those that are there first, and
aborts the rest; then it depends on the engines' speed which groups it trains on. Every request ends
in exactly one way, and the books are checked each step:

    requested = trained or waiting (accepted) + filtered by the method + failed (no reward could be
    had) + aborted (not needed any more) + running
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tandem.algorithms.base import Budget, Demand, Method
from tandem.algorithms.checks.method import check_accept, check_demand, check_request
from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied, RolloutsExhausted
from tandem.engine.core.types import (
    Finish,
    GenRequest,
    Prompt,
    RewardOutcome,
    Sampling,
    ScoredGroup,
    Source,
    Trajectory,
)

# a step may draw this many times its prompts before it gives up on filling the batch
REDRAWS = 8


@dataclass(eq=False)
class Slot:
    """One group on its way: requested, generating, scoring, done."""

    request: GenRequest
    aligned: bool = False  # its prompt is from the prompts that have demonstrations
    generation: Future | None = None
    scoring: Future | None = None
    group: ScoredGroup | None = None
    aborted: bool = False


@dataclass(eq=False)
class Ticket:
    """What one step asked for."""

    step: int
    demand: Demand
    slots: list[Slot] = field(default_factory=list)


@dataclass
class Books:
    requested: int = 0
    accepted: int = 0
    filtered: int = 0
    failed: int = 0
    aborted: int = 0  # over-sampled: in flight or finished when the step had its groups
    reissued: int = 0  # after an engine died; not counted as requested again
    tokens: int = 0  # that the policy sampled in accepted, filtered and aborted groups


class Producer:
    """`decode(ids, finish) -> text` is that of decoding.py; `recover()` restarts dead engines and
    gives them the present weights before they serve.

    `aligned` is the source of prompts that have demonstrations, for methods that roll out the
    prompts of their demonstrations. `over_sample` groups per step are requested beyond the demand;
    only groups without a demonstration compete, and the pool then needs `abort(request)`.
    """

    def __init__(
        self,
        method: Method,
        prompts,
        pool,
        rewards,
        decode: Callable[[np.ndarray, Finish], str],
        budget: Budget,
        sampling: Sampling,
        staleness: int,
        on_error: str,
        seed: int,
        recover: Callable[[], None],
        aligned=None,
        over_sample: int = 0,
    ):
        self.aligned, self.over_sample = aligned, over_sample
        self.method, self.prompts, self.pool, self.rewards, self.decode = (
            method,
            prompts,
            pool,
            rewards,
            decode,
        )
        self.budget, self.sampling, self.staleness, self.on_error, self.seed, self.recover = (
            budget,
            sampling,
            staleness,
            on_error,
            seed,
            recover,
        )
        self.tickets: list[Ticket] = []
        self.next_group = 0
        self.next_step = 0  # first step that has no ticket yet
        self.books = Books()
        # aborted, the tokens not booked yet: an engine says a moment later how far it had come
        self.dropped: list[Slot] = []
        self.aborted_in_step = 0
        # a group may be sent to the rewards by a callback or by the waiting loop, but once
        self.scoring = threading.Lock()

    def ensure(self, step: int, signals: Mapping[str, float]) -> None:
        """Request the rollouts of every step up to `step + staleness` that was not requested
        before.
        """
        self.next_step = max(self.next_step, step)
        while self.next_step <= min(step + self.staleness, self.budget.steps - 1):
            demand = self.demand(self.next_step, signals)
            ticket, needed = Ticket(self.next_step, demand), self.needed(demand)
            extra = self.over_sample if needed[False] else 0
            ticket.slots = [
                self.draw(ticket.step, i < needed[True]) for i in range(demand.prompts + extra)
            ]
            self.tickets.append(ticket)
            self.next_step += 1

    def wants_weights(self, step: int, signals: Mapping[str, float]) -> bool:
        """Whether any rollout is running, or will be requested when step `step` begins: if not,
        engines may keep their old weights for now.
        """
        if any(slot.group is None for ticket in self.tickets for slot in ticket.slots):
            return True
        ahead = range(
            max(step, self.next_step), min(step + self.staleness, self.budget.steps - 1) + 1
        )
        return any(self.demand(s, signals).prompts for s in ahead)

    def demand(self, step: int, signals: Mapping[str, float]) -> Demand:
        """What the method needs in `step`. Raises MethodError if that cannot be."""
        return check_demand(self.method, self.method.demand(step, self.budget, signals))

    def needed(self, demand: Demand) -> dict[bool, int]:
        """How many groups a step takes whose prompts have a demonstration (True), and of the others
        (False).
        """
        aligned = min(demand.experts, demand.prompts) if self.method.aligned else 0
        return {True: aligned, False: demand.prompts - aligned}

    def take(self, step: int) -> tuple[Demand, tuple[ScoredGroup, ...]]:
        """Wait for the groups of `step`, which `ensure` requested.

        Replaces filtered and failed groups by new prompts, once no over-sampled group is left.

        Raises Stopped if a signal ends the wait. What was requested stays so, and nothing counts as
        taken: a resumed run takes the step anew.
        """
        self.book_dropped()
        before = replace(self.books)
        try:
            return self.collect(step)
        except stop.Stopped:
            self.books = replace(
                before, requested=self.books.requested, reissued=self.books.reissued
            )
            raise

    def collect(self, step: int) -> tuple[Demand, tuple[ScoredGroup, ...]]:
        ticket = self.tickets[0]
        assert ticket.step == step, f"ticket of step {ticket.step} taken at step {step}"
        accepted: list[ScoredGroup] = []
        drawn, most = len(ticket.slots), REDRAWS * ticket.demand.prompts + self.over_sample
        needed, aborted_before = self.needed(ticket.demand), self.books.aborted
        open_slots = {kind: {s for s in ticket.slots if s.aligned == kind} for kind in needed}
        turns: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in ticket.slots:
            turns.put(slot)
        while any(needed.values()):
            stop.check()
            slot = self.first_finished(turns) if self.over_sample else turns.get()
            # a ticket with more than it needs, of a checkpoint from before over-sampling was
            # switched off
            if slot.aborted:
                continue
            if slot.group is None:
                slot.group = self.finish(slot)
            open_slots[slot.aligned].remove(slot)
            if slot.group is not None:
                self.books.tokens += sampled(slot.group.trajectories)
            if slot.group is not None and check_accept(self.method, self.method.accept(slot.group)):
                accepted.append(slot.group)
                self.books.accepted += 1
                needed[slot.aligned] -= 1
                if not needed[slot.aligned]:
                    self.abort(open_slots[slot.aligned])
            else:
                self.books.filtered += slot.group is not None
                self.books.failed += slot.group is None
                if len(open_slots[slot.aligned]) >= needed[slot.aligned]:
                    continue
                if drawn >= most:
                    raise RolloutsExhausted(
                        f"step {step}: drew {drawn} prompts and could use only "
                        f"{len(accepted)} of the {ticket.demand.prompts} it needs "
                        f"({self.books.filtered} groups filtered, {self.books.failed} "
                        "without rewards so far); "
                        "the prompts are too easy or too hard for the filter, or the reward "
                        "fails: see rollouts.jsonl"
                    )
                another = self.draw(step, slot.aligned)
                ticket.slots.append(another)
                open_slots[another.aligned].add(another)
                turns.put(another)
                drawn += 1
        self.tickets.pop(0)
        running = sum(len(t.slots) for t in self.tickets)
        b = self.books
        assert b.requested == b.accepted + b.filtered + b.failed + b.aborted + running, (
            f"rollout books do not balance: {b}, running {running}"
        )
        self.aborted_in_step = b.aborted - aborted_before
        return ticket.demand, tuple(sorted(accepted, key=lambda group: group.group))

    def first_finished(self, turns: queue.SimpleQueue[Slot]) -> Slot:
        """The next slot that can be finished without waiting; of those that are there, the one with
        the lowest number. A slot has its turn again when what it waits for has come: its generation
        (a new one if the engine died), then its rewards.
        """
        while True:
            stop.check()
            try:
                slot = turns.get(timeout=stop.LOOK_SECONDS)
            except queue.Empty:
                continue
            if slot.aborted:
                continue
            if slot.group is not None:
                return slot
            if slot.generation.done():
                if isinstance(slot.generation.exception(), EngineDied):
                    self.replace_engines()
                elif slot.generation.exception() is not None:
                    return slot
                else:
                    self.score(slot)
                    if slot.scoring.done():
                        return slot
            awaited = slot.generation if slot.scoring is None else slot.scoring
            awaited.add_done_callback(lambda _, slot=slot: turns.put(slot))

    def abort(self, slots: Iterable[Slot]) -> None:
        """Drop these groups: what is still in flight ends on its engine, what is there is not
        looked at. Their prompts are gone like those that were trained on.
        """
        for slot in sorted(slots, key=lambda s: s.request.group):
            with self.scoring:
                slot.aborted = True
            if slot.group is None and not slot.generation.done():
                self.pool.abort(slot.request)
            self.books.aborted += 1
            self.dropped.append(slot)
        self.book_dropped()

    def book_dropped(self) -> None:
        """Count the tokens of aborted groups as far as they are known.

        Those lost with an engine, or known only after the last step's groups, never are.
        """
        waiting = []
        for slot in self.dropped:
            if slot.group is not None:
                self.books.tokens += sampled(slot.group.trajectories)
            elif not slot.generation.done():
                waiting.append(slot)
            elif slot.generation.exception() is None:
                self.books.tokens += sampled(slot.generation.result())
        self.dropped = waiting

    def metrics(self) -> dict[str, float]:
        """For the report of the step whose groups were taken last."""
        return {"rollout/aborted": float(self.aborted_in_step)} if self.over_sample else {}

    def draw(self, step: int, aligned: bool) -> Slot:
        """Request rollouts for the next prompt."""
        (prompt,) = (self.aligned if aligned else self.prompts).take(1)
        seed = int(np.random.SeedSequence([self.seed, self.next_group]).generate_state(1)[0] >> 1)
        request = check_request(
            self.method,
            self.method.request(
                self.next_group, prompt, replace(self.sampling, seed=seed), step, self.budget
            ),
        )
        self.next_group += 1
        self.books.requested += 1
        return self.issue(Slot(request, aligned))

    def issue(self, slot: Slot) -> Slot:
        slot.generation, slot.scoring = self.pool.submit(slot.request), None
        slot.generation.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() else self.score(slot)
        )
        return slot

    def score(self, slot: Slot) -> None:
        """Hand finished trajectories to the rewards; runs in whatever thread finished the
        generation.
        """
        with self.scoring:
            if slot.scoring is None and not slot.aborted:
                kept = usable(slot.generation.result())
                responses = [t.response for t in kept]
                texts = [self.decode(t.response, t.finish) for t in kept]
                if self.scores_demonstration(slot.request.prompt):
                    responses.append(slot.request.prompt.demonstration)
                    texts.append(self.decode(slot.request.prompt.demonstration, Finish.STOP))
                slot.scoring = self.rewards.submit(slot.request.prompt, texts, responses)

    def finish(self, slot: Slot) -> ScoredGroup | None:
        """Wait for one group. None if no trajectory of it has a usable reward."""
        while True:
            try:
                kept = usable(stop.result(slot.generation))
                break
            except EngineDied:
                self.replace_engines()
        self.score(slot)
        outcomes = stop.result(slot.scoring)
        group = scored_group(
            slot.request,
            kept,
            outcomes[: len(kept)],
            self.on_error,
            [self.decode(t.response, t.finish) for t in kept],
        )
        if group is not None and len(outcomes) > len(kept):
            # None where its reward failed: then it takes no part
            group = replace(group, demonstration_reward=outcomes[-1].value)
        return group

    def replace_engines(self) -> None:
        """Restart what died, and ask again for what died with it."""
        self.recover()
        for slot in (s for t in self.tickets for s in t.slots if s.group is None and not s.aborted):
            if slot.generation.done() and isinstance(slot.generation.exception(), EngineDied):
                slot.request = replace(slot.request, attempt=slot.request.attempt + 1)
                self.books.reissued += 1
                self.issue(slot)

    def scores_demonstration(self, prompt: Prompt) -> bool:
        return self.method.scores_demonstrations and prompt.demonstration is not None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on: groups that were accepted or scored are kept,
        requests still running are re-issued.
        """
        for slot in (s for t in self.tickets for s in t.slots):
            if slot.group is None and scored(slot.scoring):
                slot.group = self.finish(slot)
        return {
            "next_group": self.next_group,
            "next_step": self.next_step,
            "books": replace(self.books),
            "tickets": [
                (t.step, t.demand, [(s.request, s.aligned, s.group) for s in t.slots])
                for t in self.tickets
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next_group, self.next_step, self.books = (
            state["next_group"],
            state["next_step"],
            replace(state["books"]),
        )
        self.tickets = [
            Ticket(
                step,
                demand,
                [Slot(request, aligned, group=group) for request, aligned, group in slots],
            )
            for step, demand, slots in state["tickets"]
        ]

    def reissue(self) -> None:
        """After a resume, once the engines hold the present weights: ask again for what was running
        when the checkpoint was written.
        """
        for slot in (s for t in self.tickets for s in t.slots):
            if slot.group is None:
                self.issue(slot)


def scored(scoring: Future | None) -> bool:
    """Whether the rewards have answered, and with rewards."""
    return (
        scoring is not None
        and scoring.done()
        and not scoring.cancelled()
        and scoring.exception() is None
    )


def sampled(trajectories: Sequence[Trajectory]) -> int:
    """Tokens that the policy sampled."""
    return sum(int((t.source == Source.POLICY).sum()) for t in trajectories)


def usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    return [t for t in trajectories if t.finish != Finish.ABORT]


def scored_group(
    request: GenRequest,
    trajectories: Sequence[Trajectory],
    outcomes: Sequence[RewardOutcome],
    on_error: str,
    texts: Sequence[str],
) -> ScoredGroup | None:
    """Apply the policy for failed rewards: drop the sample, score it 0 (and keep the error beside
    it), or stop the run.
    """
    keep = []
    for i, outcome in enumerate(outcomes):
        if outcome.error is not None and on_error == "fail":
            raise RuntimeError(
                f"reward {outcome.error.function} failed on prompt {request.prompt.id!r} "
                f"({outcome.error.kind}): {outcome.error.message}; "
                "reward.on_error is 'fail' (drop or zero would go on)"
            )
        if outcome.error is None or on_error == "zero":
            keep.append(i)
    if not keep:
        return None
    rewards = np.array(
        [outcomes[i].value if outcomes[i].error is None else 0.0 for i in keep], np.float32
    )
    return ScoredGroup(
        group=request.group,
        prompt=request.prompt,
        trajectories=tuple(trajectories[i] for i in keep),
        rewards=rewards,
        outcomes=tuple(outcomes[i] for i in keep),
        texts=tuple(texts[i] for i in keep),
    )


def oldest_version(groups: Sequence[ScoredGroup]) -> int | None:
    """The oldest weight version that sampled any token of these groups; None without rollouts."""
    versions = [
        int(t.version[t.source == Source.POLICY].min())
        for g in groups
        for t in g.trajectories
        if t.version is not None and (t.source == Source.POLICY).any()
    ]
    return min(versions, default=None)
