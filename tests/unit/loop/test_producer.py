"""The producer: staleness by construction, order, filtering, faults.

Its pool and rewards are scripted here; the real ones have suites of their own.
"""

import threading
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from producer_cases import Plain, Pool, Prompts, Rewards, make

from tandem.algorithms.base import Demand
from tandem.engine.core.errors import EngineDied, RolloutsExhausted
from tandem.engine.core.types import RewardError, RewardOutcome


@dataclass
class DropsOdd(Plain):
    def accept(self, group):
        return int(group.prompt.id[1:]) % 2 == 0


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_rollouts_are_at_most_staleness_steps_old_and_as_old_as_allowed(staleness):
    pool = Pool()
    producer = make(pool, staleness=staleness)
    ages = []
    for step in range(10):
        pool.version = step
        producer.request_ahead(step, {})
        groups = producer.collect(step).groups
        ages += [step - t.version[-1] for g in groups for t in g.trajectories]
    assert max(ages) == staleness and len(ages) == 10 * 3 * 2
    assert producer.counts.requested == producer.counts.accepted == 30, (
        "nothing is requested beyond the last step"
    )


def test_groups_come_in_the_order_they_were_requested_whatever_finishes_first():
    pool = Pool(instant=False)
    producer = make(pool)
    producer.request_ahead(0, {})
    pool.finish(order=[2, 0, 1])
    groups = producer.collect(0).groups
    assert [g.group for g in groups] == [0, 1, 2] and [g.prompt.id for g in groups] == [
        "p0",
        "p1",
        "p2",
    ]


def test_every_request_has_a_seed_of_its_own_that_depends_on_run_seed_and_ordinal_only():
    pools = Pool(), Pool()
    for pool in pools:
        make(pool, staleness=2).request_ahead(0, {})
    seeds = [[r.sampling.seed for r in pool.requests] for pool in pools]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 9


def test_filtered_groups_are_replaced_and_counted():
    producer = make(Pool(), DropsOdd())
    producer.request_ahead(0, {})
    groups = producer.collect(0).groups
    assert [g.prompt.id for g in groups] == ["p0", "p2", "p4"] and producer.counts.filtered == 2


def test_a_filtered_prompt_with_a_demonstration_is_replaced_by_another_one_also_after_a_resume():
    class Aligned(Plain):
        prompts_from_experts = True

        def demand(self, step, budget, signals):
            return Demand(prompts=3, experts=2)

        def accept(self, group):
            return group.group > 1

    producer = make(Pool(), Aligned())
    producer.expert_prompts = Prompts()
    producer.request_ahead(0, {})
    resumed = make(Pool(), Aligned())
    resumed.load_state_dict(producer.state_dict())
    resumed.expert_prompts, resumed.prompts.n = Prompts(), 100
    resumed.expert_prompts.n = 10
    groups = producer.collect(0).groups
    assert (producer.expert_prompts.n, producer.prompts.n) == (4, 1), (
        "two aligned groups were filtered, two aligned prompts take their places"
    )
    groups = resumed.collect(0).groups
    assert sorted(g.prompt.id for g in groups) == ["p0", "p10", "p11"]


def test_tokens_of_filtered_groups_were_generated_too():
    producer = make(Pool(), DropsOdd())
    producer.request_ahead(0, {})
    producer.collect(0)
    assert producer.counts.tokens == (3 + 2) * 2 * 2, (
        "three accepted and two filtered groups of two samples of two tokens"
    )


def test_a_filter_that_nothing_passes_ends_in_an_error_not_in_a_loop():
    class Never(Plain):
        def accept(self, group):
            return False

    producer = make(Pool(), Never())
    producer.request_ahead(0, {})
    with pytest.raises(RolloutsExhausted, match="24 prompts"):
        producer.collect(0)


def test_an_engine_death_reissues_its_groups_once_the_engine_is_back():
    pool, calls = Pool(instant=False), []

    def restart_and_sync():
        calls.append(len(pool.waiting))
        pool.instant = True

    producer = make(pool, restart_and_sync=restart_and_sync)
    producer.request_ahead(0, {})
    for _request, future in pool.waiting[1:]:
        future.set_exception(EngineDied("engine 0"))
    pool.waiting = pool.waiting[:1]
    pool.finish()
    groups = producer.collect(0).groups
    assert calls == [0], "recovery runs once for all groups of the dead engine"
    assert [g.group for g in groups] == [0, 1, 2]
    assert [(r.group, r.attempt) for r in pool.requests] == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]


def test_failed_rewards_follow_the_policy():
    error = RewardError("timeout", "10 s", "slow")

    def outcome(prompt, i):
        return (
            RewardOutcome(None, error=error) if prompt.id == "p0" or i == 0 else RewardOutcome(1.0)
        )

    producer = make(Pool(), rewards=Rewards(outcome))
    producer.request_ahead(0, {})
    groups = producer.collect(0).groups
    assert [g.prompt.id for g in groups] == ["p1", "p2", "p3"] and all(
        len(g.trajectories) == 1 for g in groups
    )
    assert producer.counts.failed == 1
    zero = make(Pool(), rewards=Rewards(outcome), on_error="zero")
    zero.request_ahead(0, {})
    group = zero.collect(0).groups[1]
    assert list(group.rewards) == [0.0, 1.0] and group.outcomes[0].error is error, (
        "scored 0, and still visible as an error"
    )
    fail = make(Pool(), rewards=Rewards(outcome), on_error="fail")
    fail.request_ahead(0, {})
    with pytest.raises(RuntimeError, match=r"slow.*timeout"):
        fail.collect(0)


def test_resume_keeps_scored_groups_and_asks_again_for_the_rest():
    pool = Pool(instant=False)
    producer = make(pool, staleness=1)
    producer.request_ahead(0, {})
    pool.finish(order=[0, 1, 2, 4])
    producer.collect(0)
    state = producer.state_dict()
    again = Pool()
    resumed = make(again, staleness=1)
    resumed.load_state_dict(state)
    resumed.resubmit_pending()
    assert [r.group for r in again.requests] == [3, 5], "group 4 was scored before the checkpoint"
    assert [r.sampling.seed for r in again.requests] == [
        pool.requests[3].sampling.seed,
        pool.requests[5].sampling.seed,
    ]
    resumed.prompts.n = producer.prompts.n
    resumed.request_ahead(1, {})
    groups = resumed.collect(1).groups
    assert [g.group for g in groups] == [3, 4, 5] and again.requests[-1].group == 8


def test_idle_engines_need_no_weights():
    class SFTFirst(Plain):
        def demand(self, step, budget, signals):
            return Demand(prompts=0 if step < 3 else 2)

    producer = make(Pool(), SFTFirst())
    wants = []
    for step in range(5):
        wants.append(producer.wants_weights(step, {}))
        producer.request_ahead(step, {})
        producer.collect(step)
    assert wants == [False, False, False, True, True]


# -- over-sampling: a budget of 3 prompts, so `over_sample=2` asks for 5


def taken(producer, step):
    """`take` in a thread of its own, as the pool's answers come from another one."""
    result = Future()
    threading.Thread(target=lambda: fulfil(result, producer, step), daemon=True).start()
    return result


def fulfil(result, producer, step):
    try:
        result.set_result([g.group for g in producer.collect(step).groups])
    except BaseException as error:
        result.set_exception(error)


def balance(producer):
    counts, running = producer.counts, sum(len(t.slots) for t in producer.tickets)
    return (
        counts.requested
        == counts.accepted + counts.filtered + counts.failed + counts.aborted + running
    )


def test_the_groups_that_end_first_are_taken_in_order_and_the_tail_is_aborted():
    pool, rewards = Pool(instant=False), Rewards()
    producer = make(pool, over_sample=2, rewards=rewards)
    producer.request_ahead(0, {})
    assert len(pool.requests) == 5
    result, slow = taken(producer, 0), [pool.waiting[i] for i in (1, 2)]
    pool.finish(order=[4, 0, 3])
    assert result.result(10) == [0, 3, 4], "by number, whichever ended first"
    assert (
        [r.group for r in pool.aborted] == [1, 2]
        and producer.counts.aborted == 2
        and balance(producer)
    )
    assert producer.metrics() == {"rollout/aborted": 2.0}
    assert producer.counts.tokens == 3 * 2 * 2, (
        "the engine has not said yet how far the aborted groups had come"
    )
    pool.waiting = slow
    pool.answer_aborted()
    producer.request_ahead(1, {})
    pool.finish()
    producer.collect(1)
    assert producer.counts.tokens == 3 * 2 * 2 + 2 * (2 + 1) + 5 * 2 * 2, (
        "now it has; and of the five groups of step 1 two were not needed"
    )
    assert rewards.prompts == ["p4", "p0", "p3"] + [f"p{i}" for i in range(5, 10)], (
        "samples of aborted groups are not scored, and their prompts not asked again"
    )
    assert balance(producer)


def test_of_groups_that_are_there_already_the_lowest_numbers_are_taken():
    pool = Pool()
    producer = make(pool, over_sample=2)
    producer.request_ahead(0, {})
    assert [g.group for g in producer.collect(0).groups] == [0, 1, 2]
    assert producer.counts.aborted == 2 and not pool.aborted, "nothing was running any more"
    assert producer.counts.tokens == 5 * 2 * 2


def test_over_sampled_groups_fill_in_for_filtered_ones_before_new_prompts_are_drawn():
    pool = Pool()
    producer = make(pool, DropsOdd(), over_sample=2)  # p0 p2 p4 pass
    producer.request_ahead(0, {})
    assert [g.prompt.id for g in producer.collect(0).groups] == ["p0", "p2", "p4"]
    assert (producer.counts.requested, producer.counts.filtered, producer.counts.aborted) == (
        5,
        2,
        0,
    )
    producer = make(pool, DropsOdd(), over_sample=1)  # of four, two pass
    producer.request_ahead(0, {})
    assert [g.prompt.id for g in producer.collect(0).groups] == ["p0", "p2", "p4"]
    assert (producer.counts.requested, producer.counts.filtered, producer.counts.aborted) == (
        5,
        2,
        0,
    )

    class Never(Plain):
        def accept(self, group):
            return False

    producer = make(pool, Never(), over_sample=2)
    producer.request_ahead(0, {})
    with pytest.raises(RolloutsExhausted, match="26 prompts"):
        producer.collect(0)


def test_over_sampling_waits_for_rewards_not_only_for_generation():
    waiting = {}

    class Slow(Rewards):
        def submit(self, prompt, texts, ids):
            return waiting.setdefault(prompt.id, Future())

    pool, rewards = Pool(), Slow()
    producer = make(pool, rewards=rewards, over_sample=2)
    producer.request_ahead(0, {})
    result = taken(producer, 0)
    for name in ("p4", "p2", "p1"):
        waiting[name].set_result((RewardOutcome(1.0),) * 2)
    assert result.result(10) == [1, 2, 4] and producer.counts.aborted == 2 and not pool.aborted


def test_a_failed_reward_runner_is_an_error_not_a_wait_for_ever():
    class Broken(Rewards):
        def submit(self, prompt, texts, ids):
            raise RuntimeError("too many failures")

    producer = make(Pool(), rewards=Broken(), over_sample=2)
    producer.request_ahead(0, {})
    with pytest.raises(RuntimeError, match="too many failures"):
        taken(producer, 0).result(10)


def test_over_sampled_tickets_of_later_steps_are_left_alone():
    pool = Pool(instant=False)
    producer = make(pool, staleness=1, over_sample=2)
    producer.request_ahead(0, {})
    result, tail = taken(producer, 0), pool.waiting[3:5]
    pool.finish(order=[5, 0, 1, 2, 9, 8])
    assert result.result(10) == [0, 1, 2]
    assert [r.group for r in pool.aborted] == [3, 4] == [r.group for r, _ in tail] and balance(
        producer
    )
    assert [s.request.group for s in producer.tickets[0].slots] == [5, 6, 7, 8, 9]
    producer.request_ahead(1, {})
    assert (
        taken(producer, 1).result(10) == [5, 8, 9]
        and [r.group for r in pool.aborted] == [3, 4, 6, 7]
        and balance(producer)
    )


def test_groups_with_a_demonstration_are_never_aborted_and_never_in_excess():
    class Aligned(Plain):
        prompts_from_experts = True

        def demand(self, step, budget, signals):
            return Demand(prompts=3, experts=1 if step == 0 else 3)

    pool = Pool(instant=False)
    producer = make(pool, Aligned(), over_sample=2)
    producer.expert_prompts = Prompts()
    producer.request_ahead(0, {})
    assert (producer.expert_prompts.n, producer.prompts.n) == (1, 4)
    late, result = pool.waiting[0], taken(producer, 0)
    pool.finish(order=[4, 2])
    while len(pool.aborted) < 2:
        assert not result.done()  # it waits for group 0, but no longer for 1 and 3
    pool.waiting = [late]
    pool.finish()
    assert (
        result.result(10) == [0, 2, 4]
        and [r.group for r in pool.aborted] == [1, 3]
        and balance(producer)
    )
    producer.request_ahead(1, {})
    assert len(pool.waiting) == 3, (
        "a step whose groups all have a demonstration has nothing to over-sample"
    )


def test_a_dead_engine_is_replaced_while_the_fastest_groups_are_waited_for():
    pool, calls = Pool(instant=False), []

    def restart_and_sync():
        calls.append([r.group for r, _ in pool.waiting])

    producer = make(pool, staleness=1, restart_and_sync=restart_and_sync, over_sample=2)
    producer.request_ahead(0, {})
    result, first = taken(producer, 0), pool.waiting
    pool.waiting = []
    for i in (0, 1, 6):  # its engine had these three
        first[i][1].set_exception(EngineDied("engine 0"))
    while len(pool.waiting) < 3:
        assert not result.done()
    again = pool.waiting
    assert calls == [[]] and [(r.group, r.attempt) for r, _ in again] == [(0, 1), (1, 1), (6, 1)]
    pool.waiting = [first[3], again[1], first[4]]
    pool.finish()
    assert result.result(10) == [1, 3, 4], "a group that was asked for again counts like any other"
    assert [(r.group, r.attempt) for r in pool.aborted] == [(0, 1), (2, 0)], (
        "and is aborted under the attempt that runs"
    )
    assert balance(producer)
    again[0][1].set_exception(EngineDied("engine 1"))
    pool.waiting = [again[2], *first[5:6], *first[7:8]]
    pool.finish()
    producer.request_ahead(1, {})
    assert taken(producer, 1).result(10) == [5, 6, 7] and len(calls) == 1, (
        "an aborted group that dies is nobody's loss"
    )


def test_an_over_sampled_run_resumes_with_what_was_scored():
    pool = Pool(instant=False)
    producer = make(pool, staleness=1, over_sample=2)
    producer.request_ahead(0, {})
    pool.finish(order=[0, 1, 2, 9])
    assert taken(producer, 0).result(10) == [0, 1, 2]
    state = producer.state_dict()
    again = Pool(instant=False)
    resumed = make(again, staleness=1, over_sample=2)
    resumed.load_state_dict(state)
    resumed.resubmit_pending()
    assert [r.group for r in again.requests] == [5, 6, 7, 8], (
        "group 9 was scored before the checkpoint, groups 3 and 4 were aborted"
    )
    resumed.prompts.n = producer.prompts.n
    resumed.request_ahead(1, {})
    result = taken(resumed, 1)
    again.finish(order=[3, 1])
    assert result.result(10) == [6, 8, 9] and resumed.counts.aborted == 4 and balance(resumed)


def test_an_engine_that_dies_after_a_resume_takes_only_its_own_groups_with_it():
    pool = Pool(instant=False)
    producer = make(pool)
    producer.request_ahead(0, {})
    pool.finish(order=[1])
    resumed = make(pool)
    resumed.load_state_dict(producer.state_dict())
    resumed.resubmit_pending()
    (_, first), (second_request, second) = pool.waiting
    first.set_exception(EngineDied("engine 0"))
    pool.waiting = [(second_request, second)]
    pool.finish()
    pool.instant = True
    assert [g.group for g in resumed.collect(0).groups] == [0, 1, 2]
    assert sum(request.attempt for request in pool.requests) == 1
