"""Producer: keeps rollouts flowing to the learner, never more than `staleness` steps ahead of it.

The rollouts of step k are requested when step k - staleness begins, so a token that step k trains
on was sampled with weights at most `staleness` steps old. Synchronous training is staleness 0,
one-step-off is 1; there is no other code for it.

Groups are handed over in the order they were requested, so a run is reproducible whatever engine
answers first. Scoring starts as soon as a group is generated, while others still generate. With
over-sampling a step asks for more groups than it needs, takes those that are there first, and
aborts the rest; then it depends on the engines' speed which groups it trains on. Every request ends
in exactly one way, and the counts are checked each step:

    requested = trained or waiting (accepted) + filtered by the method + failed (no reward) +
    aborted (not needed any more) + running
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.algorithms.base import Budget, Demand, Method
from tandem.algorithms.checks.method import check_accept, check_demand, check_request
from tandem.engine.config.names import DEFAULT_SOURCE
from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied, RolloutsExhausted
from tandem.engine.core.types import Sampling, ScoredGroup, Source
from tandem.engine.data.sources import PromptSource
from tandem.engine.learner.protocol import Pool
from tandem.engine.loop.scoring import Scorer
from tandem.engine.loop.tickets import GroupSlot, RolloutCounts, Ticket, sampled_tokens
from tandem.engine.loop.waves import (
    after_wave,
    every_trajectory,
    next_wave,
    sampling_seed,
)
from tandem.rollout.backends.replay import RecordedPrompts

# a step may draw this many times its prompts before it gives up on filling the batch
REDRAWS = 8


@dataclass(frozen=True, eq=False)
class StepRollouts:
    """What a step trains on."""

    demand: Demand
    groups: tuple[ScoredGroup, ...]
    tokens: int  # that the policy sampled for it, also in groups that were left out


@dataclass(eq=False, kw_only=True)
class Producer:
    """Asks for the rollouts of a step, and waits for them.

    `restart_and_sync()` restarts dead engines and gives them the present weights before they serve.

    `expert_prompts` is the source of prompts that have demonstrations, for methods that roll out
    the prompts of their demonstrations. `over_sample` groups per step are requested beyond the
    demand; only groups without a demonstration compete.
    """

    method: Method
    prompts: PromptSource | RecordedPrompts | None
    pool: Pool
    scorer: Scorer
    budget: Budget
    sampling: Sampling
    staleness: int
    seed: int
    restart_and_sync: Callable[[], None]
    expert_prompts: PromptSource | None = None
    over_sample: int = 0

    tickets: list[Ticket] = field(default_factory=list, init=False)
    next_group: int = field(default=0, init=False)
    next_step: int = field(default=0, init=False)  # first step that has no ticket yet
    counts: RolloutCounts = field(default_factory=RolloutCounts, init=False)
    # the method's last step, once it has ended the run
    last_step: int | None = field(default=None, init=False)
    # aborted, the tokens not counted yet: an engine says a moment later how far it had come
    dropped: list[GroupSlot] = field(default_factory=list, init=False)
    aborted_in_step: int = field(default=0, init=False)

    # -- what a step asks for

    def request_ahead(self, step: int, signals: Mapping[str, float]) -> None:
        """Request the rollouts of every step up to `step + staleness` that was not requested
        before.
        """
        for number in self.steps_ahead(step):
            demand = self.demand(number, signals)
            self.method.commit(number, demand, signals)
            needed = self.needed(demand)
            extra = self.over_sample if needed[False] else 0
            ticket = Ticket(number, demand)
            for i in range(demand.prompts + extra):
                ticket.slots.append(self.draw(number, from_experts=i < needed[True]))
            self.tickets.append(ticket)
            self.next_step = number + 1
            if demand.stop:
                self.last_step = number
                break
        self.next_step = max(self.next_step, step)

    def wants_weights(self, step: int, signals: Mapping[str, float]) -> bool:
        """Whether any rollout is running, or will be requested when step `step` begins: if not,
        engines may keep their old weights for now.
        """
        if any(slot.group is None for slot in self.slots()):
            return True
        for number in self.steps_ahead(step):
            demand = self.demand(number, signals)
            if demand.prompts or demand.stop:
                return bool(demand.prompts)
        return False

    def steps_ahead(self, step: int) -> range:
        """The steps that have no ticket yet and may have one when step `step` begins."""
        last = min(step + self.staleness, self.budget.steps - 1)
        if self.last_step is not None:
            last = min(last, self.last_step)
        return range(max(step, self.next_step), last + 1)

    def demand(self, step: int, signals: Mapping[str, float]) -> Demand:
        """What the method needs in `step`. Raises MethodError if that cannot be."""
        demand = self.method.demand(step, self.budget, signals)
        return check_demand(self.method, demand, self.budget.sources)

    def needed(self, demand: Demand) -> dict[bool, int]:
        """How many groups a step takes whose prompts are from the experts (True), and of the others
        (False).
        """
        from_experts = 0
        if self.method.prompts_from_experts:
            from_experts = min(demand.by_source.get(DEFAULT_SOURCE, 0), demand.prompts)
        return {True: from_experts, False: demand.prompts - from_experts}

    def draw(self, step: int, from_experts: bool) -> GroupSlot:
        """Request rollouts for the next prompt."""
        source = self.expert_prompts if from_experts else self.prompts
        assert source is not None, "the method asks for prompts that no dataset has"
        (prompt,) = source.take(1)
        sampling = replace(self.sampling, seed=sampling_seed(self.seed, self.next_group))
        request = self.method.request(self.next_group, prompt, sampling, step, self.budget)
        slot = GroupSlot(check_request(self.method, request), from_experts)
        self.next_group += 1
        self.counts.requested += 1
        self.issue(slot)
        return slot

    def issue(self, slot: GroupSlot) -> None:
        """Send the slot's request to the pool."""

        def score(done: Future) -> None:
            if not done.cancelled() and done.exception() is None:
                self.scorer.submit(slot)

        slot.generation, slot.scoring = self.pool.submit(slot.request), None
        slot.generation.add_done_callback(score)

    def slots(self) -> Iterator[GroupSlot]:
        for ticket in self.tickets:
            yield from ticket.slots

    # -- what a step gets

    def collect(self, step: int) -> StepRollouts:
        """Wait for the groups of `step`, which `request_ahead` requested.

        Replaces filtered and failed groups by new prompts, once no over-sampled group is left.

        Raises Stopped if a signal ends the wait. What was requested stays so, and nothing counts as
        collected: a resumed run collects the step anew.
        """
        before = replace(self.counts)
        self.count_dropped()
        at_start = replace(self.counts)
        ticket = self.tickets[0]
        assert ticket.step == step, f"ticket of step {ticket.step} collected at step {step}"
        try:
            accepted = self.fill(ticket)
        except stop.Stopped:
            self.counts = replace(at_start, requested=self.counts.requested)
            raise
        self.tickets.pop(0)
        self.counts.check(running=len(list(self.slots())))
        self.aborted_in_step = self.counts.aborted - before.aborted
        groups = sorted(accepted, key=lambda group: group.group)
        return StepRollouts(ticket.demand, tuple(groups), self.counts.tokens - before.tokens)

    def fill(self, ticket: Ticket) -> list[ScoredGroup]:
        """The groups that a ticket's step trains on, in the order in which they were finished."""
        accepted: list[ScoredGroup] = []
        needed = self.needed(ticket.demand)
        waiting: dict[bool, set[GroupSlot]] = {True: set(), False: set()}
        turns: queue.SimpleQueue[GroupSlot] = queue.SimpleQueue()
        for slot in ticket.slots:
            waiting[slot.from_experts].add(slot)
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
            if slot.group is not None and self.asks_again(slot, slot.group):
                turns.put(slot)
                continue
            kind = slot.from_experts
            waiting[kind].remove(slot)
            if slot.group is not None and self.accepts(slot.group):
                accepted.append(slot.group)
                needed[kind] -= 1
                if not needed[kind]:
                    self.abort(waiting[kind])
                continue
            self.counts.failed += slot.group is None
            if len(waiting[kind]) < needed[kind]:
                self.check_redraws(ticket, len(accepted))
                another = self.draw(ticket.step, kind)
                ticket.slots.append(another)
                waiting[kind].add(another)
                turns.put(another)
        return accepted

    def asks_again(self, slot: GroupSlot, group: ScoredGroup) -> bool:
        """Whether the method wants another wave of the group; it is requested then."""
        request = next_wave(self.method, group, slot.request, self.budget)
        if request is None:
            return False
        slot.request, slot.earlier, slot.group = request, group, None
        self.issue(slot)
        return True

    def accepts(self, group: ScoredGroup) -> bool:
        """Whether the method trains on the group; counted."""
        self.counts.tokens += sampled_tokens(every_trajectory(group))
        accepted = check_accept(self.method, self.method.accept(group))
        self.counts.accepted += accepted
        self.counts.filtered += not accepted
        return accepted

    def check_redraws(self, ticket: Ticket, accepted: int) -> None:
        """Raise RolloutsExhausted if the step has drawn all the prompts that it may."""
        drawn, wanted = len(ticket.slots), ticket.demand.prompts
        if drawn >= REDRAWS * wanted + self.over_sample:
            raise RolloutsExhausted(
                f"step {ticket.step}: drew {drawn} prompts and could use only {accepted} of the "
                f"{wanted} it needs ({self.counts.filtered} groups filtered, "
                f"{self.counts.failed} without rewards so far); "
                "the prompts are too easy or too hard for the filter, or the reward "
                "fails: see rollouts.jsonl"
            )

    def finish(self, slot: GroupSlot) -> ScoredGroup | None:
        """Wait for one group. None if no trajectory of it has a usable reward."""
        while True:
            try:
                stop.result(slot.generation)
                group = self.scorer.finish(slot)
            except EngineDied:
                self.restart_and_resubmit()
                continue
            return after_wave(slot, group, self.method.waves_join)

    def first_finished(self, turns: queue.SimpleQueue[GroupSlot]) -> GroupSlot:
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
                error = slot.generation.exception()
                if isinstance(error, EngineDied):
                    self.restart_and_resubmit()
                elif error is not None:
                    return slot
                else:
                    self.scorer.submit(slot)
                    if slot.scoring is not None and slot.scoring.done():
                        return slot
            awaited = slot.generation if slot.scoring is None else slot.scoring
            awaited.add_done_callback(lambda _, slot=slot: turns.put(slot))

    # -- what is not needed any more

    def abort(self, slots: Iterable[GroupSlot]) -> None:
        """Drop these groups: what is still in flight ends on its engine, what is there is not
        looked at. Their prompts are gone like those that were trained on.
        """
        for slot in sorted(slots, key=lambda s: s.request.group):
            self.scorer.abort(slot)
            if slot.group is None and not slot.generation.done():
                self.pool.abort(slot.request)
            self.counts.aborted += 1
            if slot.group is None and slot.earlier is not None:
                self.counts.tokens += sampled_tokens(every_trajectory(slot.earlier))
            self.dropped.append(slot)
        self.count_dropped()

    def count_dropped(self) -> None:
        """Count the tokens of aborted groups as far as they are known.

        Those lost with an engine, or known only after the last step's groups, never are.
        """
        waiting = []
        for slot in self.dropped:
            if slot.group is not None:
                self.counts.tokens += sampled_tokens(every_trajectory(slot.group))
            elif not slot.generation.done():
                waiting.append(slot)
            elif slot.generation.exception() is None:
                self.counts.tokens += sampled_tokens(slot.generation.result())
        self.dropped = waiting

    def metrics(self) -> dict[str, float]:
        """For the report of the step whose groups were collected last."""
        return {"rollout/aborted": float(self.aborted_in_step)} if self.over_sample else {}

    # -- deaths and resumes

    def restart_and_resubmit(self) -> None:
        """Restart what died, and ask again for what died with it."""
        self.restart_and_sync()
        for slot in self.slots():
            if slot.group is not None or slot.aborted or not slot.generation.done():
                continue
            if isinstance(slot.generation.exception(), EngineDied):
                slot.request = replace(slot.request, attempt=slot.request.attempt + 1)
                self.issue(slot)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on: groups that were accepted or scored are kept,
        requests still running are re-issued.
        """
        for slot in self.slots():
            if slot.group is None and slot.scored:
                slot.group = self.finish(slot)
        tickets = []
        for ticket in self.tickets:
            slots = []
            for slot in ticket.slots:
                slots.append((slot.request, slot.from_experts, slot.group, slot.earlier))
            tickets.append((ticket.step, ticket.demand, slots))
        return {
            "next_group": self.next_group,
            "next_step": self.next_step,
            "books": self.counts.state_dict(),  # its name in version 0.1.0
            "tickets": tickets,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next_group, self.next_step = state["next_group"], state["next_step"]
        self.counts = RolloutCounts.of_state(state["books"])
        self.tickets = []
        for step, demand, slots in state["tickets"]:
            ticket = Ticket(step, demand)
            if demand.stop:
                self.last_step = step
            for request, from_experts, group, *waves in slots:
                earlier = waves[0] if waves else None  # none before version 0.2.0
                slot = GroupSlot(request, from_experts, group=group, earlier=earlier)
                ticket.slots.append(slot)
            self.tickets.append(ticket)

    def resubmit_pending(self) -> None:
        """After a resume, once the engines hold the present weights: ask again for what was running
        when the checkpoint was written.
        """
        for slot in self.slots():
            if slot.group is None:
                self.issue(slot)


def oldest_version(groups: Sequence[ScoredGroup]) -> int | None:
    """The oldest weight version that sampled any token of these groups; None without rollouts."""
    versions = []
    for group in groups:
        for trajectory in group.trajectories:
            sampled = trajectory.source == Source.POLICY
            if trajectory.version is not None and sampled.any():
                versions.append(int(trajectory.version[sampled].min()))
    return min(versions, default=None)
