"""Waves: a method asks once more for a scored group; what comes back joins it or takes its place,
and every promise of the producer holds: counts, staleness, seeds, deaths, resumes.
"""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from producer_cases import Plain, Pool, Rewards, make

from tandem.engine.core.errors import ConfigError, EngineDied, MethodError
from tandem.engine.core.types import Prompt, RewardError, RewardOutcome, Sampling
from tandem.engine.loop.reporter import rollout_metrics
from tandem.engine.report.lines import plain, to_json
from tandem.engine.report.rollouts import rollout_record
from tandem.rollout.backends.replay import ReplayBackend

FAILED = RewardOutcome(None, error=RewardError("timeout", "10 s", "slow"))


@dataclass
class Hinted(Plain):
    """Asks again, behind a longer prompt, while the best sample of the group has no 1."""

    waves: int = 2
    samples: int = 2

    def again(self, group, wave, request, budget):
        if group.rewards.max() >= 1 or wave > self.waves:
            return None
        tokens = np.append(request.prompt.tokens, np.int32(40 + wave))
        prompt = replace(request.prompt, tokens=tokens)
        return replace(request, prompt=prompt, samples=self.samples)


@dataclass
class Joined(Hinted):
    waves_join: ClassVar[bool] = True


class BetterWithHints(Rewards):
    """0 without a hint; the second sample is right with as many hints as the prompt's number."""

    def submit(self, prompt, texts, ids):
        hints = len(prompt.tokens) - 1
        needed = int(prompt.id[1:]) % 3
        self.outcome = lambda _, i: RewardOutcome(float(i == 1 and hints >= needed))
        return super().submit(prompt, texts, ids)


def hints(trajectory):
    return [int(token) for token in trajectory.tokens if token > 40]


def collected(producer, step=0):
    producer.request_ahead(step, {})
    return producer.collect(step)


def test_the_last_wave_takes_the_place_of_those_before():
    pool = Pool()
    producer = make(pool, Hinted(), rewards=BetterWithHints())
    step = collected(producer)
    assert [len(group.earlier) for group in step.groups] == [0, 1, 2]
    assert [hints(group.trajectories[0]) for group in step.groups] == [[], [41], [41, 42]]
    assert [t.wave for group in step.groups for t in group.trajectories] == [0, 0, 1, 1, 2, 2]
    third = step.groups[2]
    assert [wave.rewards.tolist() for wave in (*third.earlier, third)] == [[0, 0], [0, 0], [0, 1]]
    assert all(not wave.earlier for wave in third.earlier)
    assert [len(wave.prompt.tokens) for wave in (*third.earlier, third)] == [1, 2, 3]
    # one group each, whatever it took; the tokens of every wave were generated
    assert producer.counts.requested == producer.counts.accepted == 3
    assert step.tokens == (1 + 2 + 3) * 2 * 2
    metrics = rollout_metrics(step.groups)
    assert metrics["wave/asked_again"] == pytest.approx(2 / 3) and metrics["wave/most"] == 2
    assert metrics["wave/first_reward"] == pytest.approx(1 / 6)
    assert metrics["reward/mean"] == pytest.approx(1 / 2)


def test_waves_may_join():
    producer = make(Pool(), Joined(samples=1, waves=1), rewards=BetterWithHints())
    groups = collected(producer).groups
    assert [len(group.trajectories) for group in groups] == [2, 3, 3]
    assert all(not group.earlier for group in groups)
    assert [t.wave for t in groups[1].trajectories] == [0, 0, 1]
    assert len(groups[1].prompt.tokens) == 1 and len(groups[1].outcomes) == 3
    assert rollout_metrics(groups)["wave/first_reward"] == pytest.approx(1 / 6)


def test_no_second_request_for_a_solved_group_and_no_metrics_without_waves():
    pool = Pool()
    groups = collected(make(pool, Hinted())).groups  # Rewards: the second sample has 1
    assert len(pool.requests) == 3
    assert not any(name.startswith("wave/") for name in rollout_metrics(groups))


def test_every_wave_has_a_seed_of_its_own_that_a_second_run_repeats():
    pools = Pool(), Pool()
    for pool in pools:
        collected(make(pool, Hinted(), rewards=BetterWithHints()))
    seeds = [[(r.group, r.wave, r.sampling.seed) for r in pool.requests] for pool in pools]
    assert seeds[0] == seeds[1] and len({seed for _, _, seed in seeds[0]}) == 6


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_staleness_holds_for_every_wave(staleness):
    pool = Pool()
    producer = make(pool, Hinted(), staleness=staleness, rewards=BetterWithHints())
    for step in range(10):
        pool.version = step
        producer.request_ahead(step, {})
        groups = producer.collect(step).groups
        for group in groups:
            for one in (*group.earlier, group):
                ages = [step - t.version[-1] for t in one.trajectories]
                assert min(ages) >= 0 and max(ages) <= staleness
    assert producer.counts.requested == producer.counts.accepted == 30


def test_a_wave_without_a_reward_leaves_the_group_as_it_was():
    class FailsWithHints(Rewards):
        def submit(self, prompt, texts, ids):
            failed = len(prompt.tokens) > 1
            self.outcome = lambda _, i: FAILED if failed else RewardOutcome(0.5)
            return super().submit(prompt, texts, ids)

    pool = Pool()
    step = collected(make(pool, Hinted(waves=1), rewards=FailsWithHints()))
    assert [group.rewards.tolist() for group in step.groups] == [[0.5, 0.5]] * 3
    assert all(not group.earlier for group in step.groups) and len(pool.requests) == 6


class FailsBehindTwo(Rewards):
    """The first sample is right behind three hints; behind two every reward fails."""

    def submit(self, prompt, texts, ids):
        hints = len(prompt.tokens) - 1
        self.outcome = lambda _, i: FAILED if hints == 2 else RewardOutcome(float(hints == 3))
        return super().submit(prompt, texts, ids)


class Replayed(Pool):
    def __init__(self, file):
        super().__init__(instant=False)
        config = SimpleNamespace(rollout=SimpleNamespace(record=str(file)))
        self.backend = ReplayBackend("", config, 0)

    def submit(self, request):
        self.requests.append(request)
        future = Future()
        future.set_result(self.backend.serve(request))
        return future


def recorded(groups, file):
    lines = []
    for group in groups:
        for wave in (*group.earlier, group):
            for sample in range(len(wave.trajectories)):
                lines.append(to_json(plain(rollout_record(wave, sample))) + "\n")
    file.write_text("".join(lines))
    return file


@pytest.mark.parametrize("kind", [Hinted, Joined])
@pytest.mark.parametrize("waves, kept", [(2, [0, 1]), (3, [0, 1, 3])])
def test_a_wave_without_a_reward_is_counted_and_replayed(tmp_path, kind, waves, kept):
    step = collected(make(Pool(), kind(waves=waves), rewards=FailsBehindTwo()))
    assert step.tokens == 3 * (1 + waves) * 2 * 2
    metrics = rollout_metrics(step.groups)
    assert metrics["wave/asked_again"] == 1 and metrics["wave/most"] == waves
    file = recorded(step.groups, tmp_path / "rollouts.jsonl")
    again = collected(make(Replayed(file), kind(waves=waves), rewards=FailsBehindTwo()))
    assert [described(group) for group in again.groups] == [described(g) for g in step.groups]
    assert rollout_metrics(again.groups) == metrics
    for group in again.groups:
        found = {t.wave for one in (*group.earlier, group) for t in one.trajectories}
        assert sorted(found) == kept


def test_a_replay_has_no_wave_that_was_not_asked_for(tmp_path):
    groups = collected(make(Pool(), Hinted(waves=1), rewards=FailsBehindTwo())).groups
    file = recorded(groups, tmp_path / "rollouts.jsonl")
    with pytest.raises(
        ConfigError, match=r"wave 2 of group 0 .* asked for 1 times after the first"
    ):
        collected(make(Replayed(file), Hinted(waves=2), rewards=FailsBehindTwo()))


def test_a_joined_trajectory_is_recorded_with_its_own_prompt():
    class Written(Joined):
        def again(self, group, wave, request, budget):
            asked = super().again(group, wave, request, budget)
            if asked is None:
                return None
            return replace(asked, prompt=replace(asked.prompt, content=f"hint {wave}"))

    (group, *_) = collected(make(Pool(), Written(), rewards=FailsBehindTwo())).groups
    prompts = [rollout_record(group, i)["prompt"] for i in range(4)]
    assert prompts == ["", "", "hint 1", "hint 1"]
    assert group.prompt.content == "" and group.prompt_of(3).tokens.tolist() == [1, 41]


def test_an_engine_that_dies_over_a_wave_is_asked_again_for_that_wave():
    pool = Pool()
    died = []

    def die_once(request):
        if request.wave == 1 and not died:
            died.append(request.group)
            return EngineDied("engine 0")
        return None

    submit = pool.submit

    def flaky(request):
        error = die_once(request)
        future = submit(request)
        if error is None:
            return future
        broken = type(future)()
        broken.set_exception(error)
        return broken

    pool.submit = flaky
    groups = collected(make(pool, Hinted(), rewards=BetterWithHints())).groups
    assert died and [len(group.earlier) for group in groups] == [0, 1, 2]
    again = [r for r in pool.requests if r.attempt == 1]
    assert [(r.group, r.wave) for r in again] == [(died[0], 1)]


def test_a_filter_sees_the_group_as_the_waves_left_it():
    class Solved(Hinted):
        def accept(self, group):
            return group.rewards.max() == 1

    producer = make(Pool(), Solved(waves=1), rewards=BetterWithHints())
    groups = collected(producer).groups
    assert [group.prompt.id for group in groups] == ["p0", "p1", "p3"]
    assert producer.counts.filtered == 1
    assert producer.counts.tokens == (1 + 2 + 2 + 1) * 2 * 2


def test_a_resume_in_the_middle_of_a_wave_ends_as_the_run_would_have():
    """The checkpoint is written while step 1's first waves are done and step 0 was collected."""
    whole = make(Pool(), Hinted(), staleness=1, rewards=BetterWithHints())
    collected(whole)
    saved = whole.state_dict()
    resumed = make(Pool(), Hinted(), staleness=1, rewards=BetterWithHints())
    resumed.load_state_dict(saved)
    resumed.prompts.n = whole.prompts.n
    resumed.resubmit_pending()
    a, b = collected(whole, 1).groups, collected(resumed, 1).groups
    assert [described(group) for group in a] == [described(group) for group in b]
    assert resumed.counts == whole.counts


def test_a_request_of_a_wave_that_was_running_is_made_again_with_the_group_before_it():
    pool = Pool(instant=False)
    producer = make(pool, Hinted(), rewards=BetterWithHints())
    producer.request_ahead(0, {})
    pool.finish()
    slots = producer.tickets[0].slots
    second = slots[1]
    second.group = producer.finish(second)
    assert producer.asks_again(second, second.group)
    resumed = make(Pool(), Hinted(), rewards=BetterWithHints())
    resumed.load_state_dict(producer.state_dict())
    resumed.resubmit_pending()
    groups = resumed.collect(0).groups
    assert [len(group.earlier) for group in groups] == [0, 1, 2]
    assert [(r.group, r.wave) for r in resumed.pool.requests] == [(1, 1), (2, 1), (2, 2)]


def described(group):
    waves = (*group.earlier, group)
    return [(w.prompt.tokens.tolist(), w.rewards.tolist()) for w in waves], group.group


def test_tickets_of_version_0_1_0_have_no_waves():
    producer = make(Pool(), Hinted())
    producer.request_ahead(0, {})
    saved = producer.state_dict()
    ((step, demand, slots),) = saved["tickets"]
    saved["tickets"] = [(step, demand, [slot[:3] for slot in slots])]
    old = make(Pool(), Hinted())
    old.load_state_dict(saved)
    assert len(old.collect(0).groups) == 3


def test_over_sampling_with_waves_counts_every_token():
    pool = Pool()
    producer = make(pool, Hinted(), rewards=BetterWithHints(), over_sample=1)
    step = collected(producer)
    assert len(step.groups) == 3 and producer.counts.aborted == 1
    generated = sum(2 * request.samples for request in pool.requests)
    assert producer.counts.tokens == generated


class Always(Plain):
    def again(self, group, wave, request, budget):
        return request


class Other(Plain):
    def again(self, group, wave, request, budget):
        return replace(request, group=request.group + 1)


class Changed(Plain):
    """Asks again with some of the request changed."""

    def __init__(self, **changes):
        self.changes = changes

    def again(self, group, wave, request, budget):
        return replace(request, **self.changes)


def behind(tokens):
    return Changed(prompt=Prompt("p0", np.array(tokens, np.int64), ""))


def started(prefix):
    return Changed(prefixes=(np.array(prefix, np.int32), np.zeros(0, np.int32)))


class NoRequest(Plain):
    def again(self, group, wave, request, budget):
        return request.prompt


@pytest.mark.parametrize(
    "method, words",
    [
        (Always(), r"Always: again\(\) asked more than 16 times for prompt 'p0'; expected None"),
        (Other(), r"Other: again\(\) asks for 2 samples of group 1, .*expected .*of group 0"),
        (NoRequest(), r"NoRequest: again\(\) returned a Prompt, expected a GenRequest"),
        (Changed(prompt="words"), "has a str as prompt, expected a Prompt: dataclasses.replace"),
        (Changed(sampling=Sampling(8, temperature=2.0)), "temperature=2.0.*; expected that of the"),
        (Changed(sampling=Sampling(9)), r"max_tokens=9, .*expected .*max_tokens=8"),
        (behind([1] * 21), "has 21 tokens, more than data.max_prompt_tokens=20; return None"),
        (behind([]), "prompt.tokens is empty"),
        (behind([1, 50]), "prompt.tokens has the id 50 at position 1, expected .* below 50"),
        (behind([1, -1]), "has the id -1 at position 1"),
        (behind([[1]]), "expected token ids: a numpy array of integers"),
        (started([5] * 8), r"prefix 0 has 8 tokens, expected fewer than rollout.max_tokens=8"),
        (started([50]), "prefix 0 has the id 50 at position 0"),
    ],
)
def test_waves_that_cannot_be(method, words):
    producer = make(Pool(), method)
    producer.budget = replace(producer.budget, max_prompt_tokens=20, vocabulary=50)
    with pytest.raises(MethodError, match=words):
        collected(producer)


@pytest.mark.parametrize(
    "changes",
    [{"sampling": Sampling(8, seed=3)}, {"prefixes": (np.array([]), np.full(7, 49, np.int32))}],
)
def test_waves_that_can_be(changes):
    class Once(Changed):
        def again(self, group, wave, request, budget):
            return super().again(group, wave, request, budget) if wave == 1 else None

    producer = make(Pool(), Once(**changes))
    producer.budget = replace(producer.budget, max_prompt_tokens=20, vocabulary=50)
    assert all(group.waves == 1 for group in collected(producer).groups)
