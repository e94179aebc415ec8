"""The producer: staleness by construction, order, filtering, faults. Its pool and rewards are scripted here; the real ones have suites of their own."""
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest

from tandem.algorithms.base import Budget, Demand, Method
from tandem.algorithms.inspect import trajectory
from tandem.engine.producer import Producer, RolloutsExhausted
from tandem.engine.types import Prompt, RewardError, RewardOutcome, Sampling
from tandem.rollout.backend import EngineDied


class Prompts:
    def __init__(self):
        self.n = 0

    def take(self, n):
        self.n += n
        return [Prompt(f"p{i}", np.array([1], np.int32), "", {}) for i in range(self.n - n, self.n)]


class Pool:
    """Collects requests; the test says when and with which version they finish."""

    def __init__(self, instant=True):
        self.version, self.instant, self.waiting, self.requests = 0, instant, [], []

    def submit(self, request):
        future = Future()
        self.requests.append(request)
        self.waiting.append((request, future))
        if self.instant:
            self.finish()
        return future

    def finish(self, order=None):
        waiting, self.waiting = self.waiting, []
        for i in order or range(len(waiting)):
            request, future = waiting[i]
            future.set_result(tuple(trajectory([1], [5, 6], [-1.0, -1.0], version=self.version, prompt_id=request.prompt.id, group=request.group)
                                    for _ in range(request.samples)))


class Rewards:
    def __init__(self, outcome=lambda prompt, i: RewardOutcome(float(i))):
        self.outcome = outcome

    def submit(self, prompt, texts, ids):
        future = Future()
        future.set_result(tuple(self.outcome(prompt, i) for i in range(len(texts))))
        return future


@dataclass
class Plain(Method):
    def demand(self, step, budget, signals):
        return Demand(prompts=budget.prompts)


@dataclass
class DropsOdd(Plain):
    def accept(self, group):
        return int(group.prompt.id[1:]) % 2 == 0


def make(pool, method=None, staleness=0, rewards=None, on_error="drop", recover=lambda: None):
    return Producer(method or Plain(), Prompts(), pool, rewards or Rewards(), lambda ids: "", Budget(3, 2, 0, 10), Sampling(8), staleness, on_error, 7, recover)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_rollouts_are_at_most_staleness_steps_old_and_as_old_as_allowed(staleness):
    pool = Pool()
    producer = make(pool, staleness=staleness)
    ages = []
    for step in range(10):
        pool.version = step
        producer.ensure(step, {})
        _, groups = producer.take(step)
        ages += [step - t.version[-1] for g in groups for t in g.trajectories]
    assert max(ages) == staleness and len(ages) == 10 * 3 * 2
    assert producer.books.requested == producer.books.accepted == 30, "nothing is requested beyond the last step"


def test_groups_come_in_the_order_they_were_requested_whatever_finishes_first():
    pool = Pool(instant=False)
    producer = make(pool)
    producer.ensure(0, {})
    pool.finish(order=[2, 0, 1])
    _, groups = producer.take(0)
    assert [g.group for g in groups] == [0, 1, 2] and [g.prompt.id for g in groups] == ["p0", "p1", "p2"]


def test_every_request_has_a_seed_of_its_own_that_depends_on_run_seed_and_ordinal_only():
    pools = Pool(), Pool()
    for pool in pools:
        make(pool, staleness=2).ensure(0, {})
    seeds = [[r.sampling.seed for r in pool.requests] for pool in pools]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 9


def test_filtered_groups_are_replaced_and_counted():
    producer = make(Pool(), DropsOdd())
    producer.ensure(0, {})
    _, groups = producer.take(0)
    assert [g.prompt.id for g in groups] == ["p0", "p2", "p4"] and producer.books.filtered == 2


def test_a_filtered_prompt_with_a_demonstration_is_replaced_by_another_one_also_after_a_resume():
    class Aligned(Plain):
        aligned = True

        def demand(self, step, budget, signals):
            return Demand(prompts=3, experts=2)

        def accept(self, group):
            return group.group > 1
    producer = make(Pool(), Aligned())
    producer.aligned = Prompts()
    producer.ensure(0, {})
    resumed = make(Pool(), Aligned())
    resumed.load_state_dict(producer.state_dict())
    resumed.aligned, resumed.prompts.n = Prompts(), 100
    resumed.aligned.n = 10
    _, groups = producer.take(0)
    assert (producer.aligned.n, producer.prompts.n) == (4, 1), "two aligned groups were filtered, two aligned prompts take their places"
    _, groups = resumed.take(0)
    assert sorted(g.prompt.id for g in groups) == ["p0", "p10", "p11"]


def test_tokens_of_filtered_groups_were_generated_too():
    producer = make(Pool(), DropsOdd())
    producer.ensure(0, {})
    producer.take(0)
    assert producer.books.tokens == (3 + 2) * 2 * 2, "three accepted and two filtered groups of two samples of two tokens"


def test_a_filter_that_nothing_passes_ends_in_an_error_not_in_a_loop():
    class Never(Plain):
        def accept(self, group):
            return False
    producer = make(Pool(), Never())
    producer.ensure(0, {})
    with pytest.raises(RolloutsExhausted, match="24 prompts"):
        producer.take(0)


def test_an_engine_death_reissues_its_groups_once_the_engine_is_back():
    pool, calls = Pool(instant=False), []

    def recover():
        calls.append(len(pool.waiting))
        pool.instant = True
    producer = make(pool, recover=recover)
    producer.ensure(0, {})
    for request, future in pool.waiting[1:]:
        future.set_exception(EngineDied("engine 0"))
    pool.waiting = pool.waiting[:1]
    pool.finish()
    _, groups = producer.take(0)
    assert calls == [0], "recovery runs once for all groups of the dead engine"
    assert [g.group for g in groups] == [0, 1, 2]
    assert [(r.group, r.attempt) for r in pool.requests] == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]
    assert producer.books.reissued == 2


def test_failed_rewards_follow_the_policy():
    error = RewardError("timeout", "10 s", "slow")
    outcome = lambda prompt, i: RewardOutcome(None, error=error) if prompt.id == "p0" or i == 0 else RewardOutcome(1.0)
    producer = make(Pool(), rewards=Rewards(outcome))
    producer.ensure(0, {})
    _, groups = producer.take(0)
    assert [g.prompt.id for g in groups] == ["p1", "p2", "p3"] and all(len(g.trajectories) == 1 for g in groups)
    assert producer.books.failed == 1
    zero = make(Pool(), rewards=Rewards(outcome), on_error="zero")
    zero.ensure(0, {})
    group = zero.take(0)[1][1]
    assert list(group.rewards) == [0.0, 1.0] and group.outcomes[0].error is error, "scored 0, and still visible as an error"
    fail = make(Pool(), rewards=Rewards(outcome), on_error="fail")
    fail.ensure(0, {})
    with pytest.raises(RuntimeError, match="slow.*timeout"):
        fail.take(0)


def test_resume_keeps_scored_groups_and_asks_again_for_the_rest():
    pool = Pool(instant=False)
    producer = make(pool, staleness=1)
    producer.ensure(0, {})
    pool.finish(order=[0, 1, 2, 4])
    producer.take(0)
    state = producer.state_dict()
    again = Pool()
    resumed = make(again, staleness=1)
    resumed.load_state_dict(state)
    resumed.reissue()
    assert [r.group for r in again.requests] == [3, 5], "group 4 was scored before the checkpoint"
    assert [r.sampling.seed for r in again.requests] == [pool.requests[3].sampling.seed, pool.requests[5].sampling.seed]
    resumed.prompts.n = producer.prompts.n
    resumed.ensure(1, {})
    _, groups = resumed.take(1)
    assert [g.group for g in groups] == [3, 4, 5] and again.requests[-1].group == 8


def test_idle_engines_need_no_weights():
    class SFTFirst(Plain):
        def demand(self, step, budget, signals):
            return Demand(prompts=0 if step < 3 else 2)
    producer = make(Pool(), SFTFirst())
    wants = []
    for step in range(5):
        wants.append(producer.wants_weights(step, {}))
        producer.ensure(step, {})
        producer.take(step)
    assert wants == [False, False, False, True, True]
