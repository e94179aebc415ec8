"""Producer: keeps rollouts flowing to the learner, never more than `staleness` steps ahead of it.

The rollouts of step k are requested when step k - staleness begins, so a token that step k trains on was sampled with weights at most
`staleness` steps old. Synchronous training is staleness 0, one-step-off is 1; there is no other code for it.

Groups are handed over in the order they were requested, so a run is reproducible whatever engine answers first. Scoring starts as soon as a
group is generated, while others still generate. Every request ends in exactly one way, and the books are checked each step:

    requested = trained or waiting (accepted) + filtered by the method + failed (no reward could be had) + running
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tandem.algorithms.base import Budget, Demand, Method
from tandem.engine.types import Finish, GenRequest, Prompt, RewardOutcome, Sampling, ScoredGroup, Source, Trajectory
from tandem.rollout.backend import EngineDied

REDRAWS = 8     # a step may draw this many times its prompts before it gives up on filling the batch


class RolloutsExhausted(RuntimeError):
    """A step could not be filled: the method filtered, or rewards failed on, too many groups."""


@dataclass(eq=False)
class Slot:
    """One group on its way: requested, generating, scoring, done."""

    request: GenRequest
    aligned: bool = False           # its prompt is from the prompts that have demonstrations
    generation: Future | None = None
    scoring: Future | None = None
    group: ScoredGroup | None = None


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
    reissued: int = 0       # after an engine died; not counted as requested again
    tokens: int = 0         # that the policy sampled in accepted and filtered groups


class Producer:
    """`decode(ids) -> text` is the tokenizer's; `recover()` restarts dead engines and gives them the present weights before they serve.

    `aligned` is the source of prompts that have demonstrations, for methods that roll out the prompts of their demonstrations.
    """

    def __init__(self, method: Method, prompts, pool, rewards, decode: Callable[[np.ndarray], str], budget: Budget, sampling: Sampling,
                 staleness: int, on_error: str, seed: int, recover: Callable[[], None], aligned=None):
        self.aligned = aligned
        self.method, self.prompts, self.pool, self.rewards, self.decode = method, prompts, pool, rewards, decode
        self.budget, self.sampling, self.staleness, self.on_error, self.seed, self.recover = budget, sampling, staleness, on_error, seed, recover
        self.tickets: list[Ticket] = []
        self.next_group = 0
        self.next_step = 0      # first step that has no ticket yet
        self.books = Books()
        self.scoring = threading.Lock()     # a group may be sent to the rewards by a callback or by the waiting loop, but once

    def ensure(self, step: int, signals: Mapping[str, float]) -> None:
        """Request the rollouts of every step up to `step + staleness` that was not requested before."""
        self.next_step = max(self.next_step, step)
        while self.next_step <= min(step + self.staleness, self.budget.steps - 1):
            demand = self.method.demand(self.next_step, self.budget, signals)
            ticket = Ticket(self.next_step, demand)
            ticket.slots = [self.draw(ticket.step, self.method.aligned and i < demand.experts) for i in range(demand.prompts)]
            self.tickets.append(ticket)
            self.next_step += 1

    def wants_weights(self, step: int, signals: Mapping[str, float]) -> bool:
        """Whether any rollout is running, or will be requested when step `step` begins: if not, engines may keep their old weights for now."""
        if any(slot.group is None for ticket in self.tickets for slot in ticket.slots):
            return True
        ahead = range(max(step, self.next_step), min(step + self.staleness, self.budget.steps - 1) + 1)
        return any(self.method.demand(s, self.budget, signals).prompts for s in ahead)

    def take(self, step: int) -> tuple[Demand, tuple[ScoredGroup, ...]]:
        """Wait for the groups of `step`, which `ensure` requested. Replaces filtered and failed groups by new prompts."""
        ticket = self.tickets[0]
        assert ticket.step == step, f"ticket of step {ticket.step} taken at step {step}"
        accepted: list[ScoredGroup] = []
        drawn = len(ticket.slots)
        while ticket.slots:
            slot = ticket.slots[0]
            if slot.group is None:
                slot.group = self.finish(slot)
            if slot.group is not None:
                self.books.tokens += sum(int((t.source == Source.POLICY).sum()) for t in slot.group.trajectories)
            if slot.group is not None and self.method.accept(slot.group):
                accepted.append(slot.group)
                self.books.accepted += 1
            else:
                self.books.filtered += slot.group is not None
                self.books.failed += slot.group is None
                if drawn >= REDRAWS * ticket.demand.prompts:
                    raise RolloutsExhausted(f"step {step}: drew {drawn} prompts and could use only {len(accepted)} of the {ticket.demand.prompts} it needs "
                                            f"({self.books.filtered} groups filtered, {self.books.failed} without rewards so far); "
                                            "the prompts are too easy or too hard for the filter, or the reward fails: see rollouts.jsonl")
                ticket.slots.append(self.draw(step, slot.aligned))
                drawn += 1
            ticket.slots.pop(0)
        self.tickets.pop(0)
        running = sum(len(t.slots) for t in self.tickets)
        b = self.books
        assert b.requested == b.accepted + b.filtered + b.failed + running, f"rollout books do not balance: {b}, running {running}"
        return ticket.demand, tuple(accepted)

    def draw(self, step: int, aligned: bool) -> Slot:
        """Request rollouts for the next prompt."""
        (prompt,) = (self.aligned if aligned else self.prompts).take(1)
        seed = int(np.random.SeedSequence([self.seed, self.next_group]).generate_state(1)[0] >> 1)
        request = self.method.request(self.next_group, prompt, replace(self.sampling, seed=seed), step, self.budget)
        self.next_group += 1
        self.books.requested += 1
        return self.issue(Slot(request, aligned))

    def issue(self, slot: Slot) -> Slot:
        slot.generation, slot.scoring = self.pool.submit(slot.request), None
        slot.generation.add_done_callback(lambda done: None if done.cancelled() or done.exception() else self.score(slot))
        return slot

    def score(self, slot: Slot) -> None:
        """Hand finished trajectories to the rewards; runs in whatever thread finished the generation."""
        with self.scoring:
            if slot.scoring is None:
                responses = [t.response for t in usable(slot.generation.result())]
                if self.scores_demonstration(slot.request.prompt):
                    responses.append(slot.request.prompt.demonstration)
                slot.scoring = self.rewards.submit(slot.request.prompt, [self.decode(r) for r in responses], responses)

    def finish(self, slot: Slot) -> ScoredGroup | None:
        """Wait for one group. None if no trajectory of it has a usable reward."""
        while True:
            try:
                kept = usable(slot.generation.result())
                break
            except EngineDied:
                self.recover()
                for waiting in [slot, *(s for t in self.tickets for s in t.slots if s is not slot)]:
                    if waiting.generation.done() and isinstance(waiting.generation.exception(), EngineDied):
                        waiting.request = replace(waiting.request, attempt=waiting.request.attempt + 1)
                        self.books.reissued += 1
                        self.issue(waiting)
        self.score(slot)
        outcomes = slot.scoring.result()
        group = scored_group(slot.request, kept, outcomes[:len(kept)], self.on_error, [self.decode(t.response) for t in kept])
        if group is not None and len(outcomes) > len(kept):
            group = replace(group, demonstration_reward=outcomes[-1].value)      # None where its reward failed: then it takes no part
        return group

    def scores_demonstration(self, prompt: Prompt) -> bool:
        return self.method.scores_demonstrations and prompt.demonstration is not None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on: groups that were accepted or scored are kept, requests still running are re-issued."""
        for slot in (s for t in self.tickets for s in t.slots):
            if slot.group is None and slot.scoring is not None and slot.scoring.done():
                slot.group = self.finish(slot)
        return {"next_group": self.next_group, "next_step": self.next_step, "books": replace(self.books),
                "tickets": [(t.step, t.demand, [(s.request, s.aligned, s.group) for s in t.slots]) for t in self.tickets]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next_group, self.next_step, self.books = state["next_group"], state["next_step"], replace(state["books"])
        self.tickets = [Ticket(step, demand, [Slot(request, aligned, group=group) for request, aligned, group in slots]) for step, demand, slots in state["tickets"]]

    def reissue(self) -> None:
        """After a resume, once the engines hold the present weights: ask again for what was running when the checkpoint was written."""
        for slot in (s for t in self.tickets for s in t.slots):
            if slot.group is None:
                self.issue(slot)


def usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    return [t for t in trajectories if t.finish != Finish.ABORT]


def scored_group(request: GenRequest, trajectories: Sequence[Trajectory], outcomes: Sequence[RewardOutcome], on_error: str,
                 texts: Sequence[str]) -> ScoredGroup | None:
    """Apply the policy for failed rewards: drop the sample, score it 0 (and keep the error beside it), or stop the run."""
    keep = []
    for i, outcome in enumerate(outcomes):
        if outcome.error is not None and on_error == "fail":
            raise RuntimeError(f"reward {outcome.error.function} failed on prompt {request.prompt.id!r} ({outcome.error.kind}): {outcome.error.message}; "
                               "reward.on_error is 'fail' (drop or zero would go on)")
        if outcome.error is None or on_error == "zero":
            keep.append(i)
    if not keep:
        return None
    rewards = np.array([outcomes[i].value if outcomes[i].error is None else 0.0 for i in keep], np.float32)
    return ScoredGroup(group=request.group, prompt=request.prompt, trajectories=tuple(trajectories[i] for i in keep), rewards=rewards,
                       outcomes=tuple(outcomes[i] for i in keep), texts=tuple(texts[i] for i in keep))


def oldest_version(groups: Sequence[ScoredGroup]) -> int | None:
    """The oldest weight version that sampled any token of these groups; None without rollouts."""
    versions = [int(t.version[t.source == Source.POLICY].min()) for g in groups for t in g.trajectories
                if t.version is not None and (t.source == Source.POLICY).any()]
    return min(versions, default=None)
