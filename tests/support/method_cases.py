"""Hand-made batches for tests of the methods, and a loop that drives a method for some steps as the
engine would, without a model.
"""

import math
from dataclasses import replace
from zlib import crc32

import numpy as np

from tandem.algorithms.base import Batch, Budget
from tandem.algorithms.rows import demonstration
from tandem.engine.core.types import Finish, Prompt, Sampling, ScoredGroup, Source, Trajectory
from tandem.engine.learner.inspect import group, inspect, trajectory
from tandem.engine.loop.reporter import latest_signals

# Two demonstrations of three and two tokens, ids 5 6 3 and 7 3.
EXPERTS = (
    trajectory([1, 2], [5, 6, 3], expert=True, prompt_id="e0"),
    trajectory([1], [7, 3], expert=True, prompt_id="e1"),
)
# of EXPERTS under `ramp`: five tokens at positions 2, 3, 4 and 1, 2
SFT_LOSS = (0.3 + 0.4 + 0.5 + 0.2 + 0.3) / 5
# GRPO's advantage of rewards 1, 0: mean 1/2, unbiased std sqrt(1/2)
A = 0.5 / (math.sqrt(0.5) + 1e-6)
# of `rollouts()`: three tokens with A, one with -A
GRPO_LOSS = -(3 * A - A) / 4


def rollouts(
    rewards=(1.0, 0.0), behaviour=-1.0, demo=None, demo_reward=None, number=0, finish=Finish.STOP
) -> ScoredGroup:
    """Two rollouts of prompt [1], of three tokens and of one, and the prompt's demonstration if
    there is one.
    """
    g = group(
        [
            trajectory([1], [5, 6, 7], [behaviour] * 3, finish=finish),
            trajectory([1], [8], [behaviour], finish=finish),
        ],
        rewards,
        demo,
        number,
    )
    return replace(g, demonstration_reward=demo_reward)


def aligned(rewards, demonstration_reward, number=0, prefix=False) -> ScoredGroup:
    """Four rollouts of 1 to 4 tokens and a demonstration 9 8 7 3; with `prefix` the last one was
    made to start from 9 8.
    """
    g = group(
        [trajectory([1], range(5, 6 + k), [-1.0] * (k + 1)) for k in range(4)],
        rewards,
        demonstration=[9, 8, 7, 3],
        number=number,
    )
    if prefix:
        g = replace(
            g, trajectories=(*g.trajectories[:-1], forced(g.trajectories[-1], [9, 8], [5, 6]))
        )
    return replace(g, demonstration_reward=demonstration_reward)


def forced(t: Trajectory, given, continuation, source=Source.PREFIX) -> Trajectory:
    """Prompt [1], then `given` expert tokens, then a continuation by the policy."""
    n, m = len(given), len(continuation)
    return replace(
        t,
        tokens=np.array([1, *given, *continuation], np.int32),
        source=np.array([0] + [source] * n + [Source.POLICY] * m, np.int8),
        behaviour_logp=np.array([np.nan] * (1 + n) + [-1.0] * m, np.float32),
        version=np.array([-1] * (1 + n) + [0] * m, np.int32),
    )


def batch(groups=None, experts=EXPERTS, step=0, **more) -> Batch:
    return Batch(step, (rollouts(),) if groups is None else tuple(groups), experts, **more)


def ramp(row):
    """log p = -0.1, -0.2, ... by position."""
    return -0.1 * (1.0 + np.arange(len(row.tokens), dtype=np.float32))


def constant(value):
    return lambda row: np.full(len(row.tokens), value, np.float32)


def half(row):
    return constant(math.log(0.5))(row)


def ids(row):
    """A log-prob for every token that depends on the token and its place alone, whatever the row is
    called.
    """
    return -0.05 * (1 + row.tokens % 7) - 0.01 * np.arange(len(row.tokens), dtype=np.float32)


def look(
    method,
    b,
    logp=ramp,
    entropy=lambda row: 0.1 * np.arange(len(row.tokens), dtype=np.float32),
    reference=lambda row: ids(row) - 0.05,
    **more,
):
    """inspect, with the streams, columns and texts that any method may ask for."""
    experts = [replace(t, columns={"mean_logp": -0.4, **t.columns}) for t in b.experts]
    b = replace(b, groups=tuple(map(described, b.groups)), experts=answers(method, experts))
    return inspect(method, b, logp, entropy=entropy, reference=reference, **more)


def described(g: ScoredGroup) -> ScoredGroup:
    """A document of a query for rerankers; the texts are numbers from 0 to 10."""
    columns = {"query": "q", "positive": g.group % 2 == 0, "score": 3}
    texts = tuple(str(int(t.tokens.sum()) % 11) for t in g.trajectories)
    return replace(g, prompt=replace(g.prompt, columns=columns), texts=texts)


def answers(method, experts):
    """For methods that take pairs: each demonstration as the better of two answers."""
    if not (method.uses_pairs or method.takes_pairs):
        return tuple(experts)
    found = []
    for expert in experts:
        if expert.role:
            found.append(expert)
            continue
        other = expert.tokens + (expert.source == Source.EXPERT)
        number = 10_000 + crc32(expert.prompt_id.encode())
        found.append(replace(expert, role="chosen", group=number))
        found.append(replace(expert, role="rejected", group=number, tokens=other))
    return tuple(found)


def by_source(out, source) -> list[np.ndarray]:
    """The gradients of the rows that have tokens of `source`."""
    return [
        g for g, row in zip(out.gradients, out.rows, strict=True) if (row.source == source).any()
    ]


SOURCES = {"experts": 30, "general": 12}
BUDGET = Budget(prompts=4, samples=4, experts=3, steps=100, seed=7, sources=SOURCES)


def drive(method, steps, signals=None, budget=BUDGET, staleness=0, tickets=None, probes=()):
    """What a run does, on random numbers that depend on the step alone: [(demand, rows, loss,
    gradients, metrics)] and what a checkpoint would hold.

    `probes` are steps, counted from the present one, whose demand is asked for and not used.
    """
    signals, tickets, record = dict(signals or {}), dict(tickets or {}), []
    for step in steps:
        for distance in probes:
            method.demand(max(0, step + distance), budget, {"reward/mean": 0.9, "entropy": 2.0})
        for ahead in range(step, min(step + staleness, budget.steps - 1) + 1):
            if ahead not in tickets:
                demand = method.demand(ahead, budget, signals)
                method.commit(ahead, demand, signals)
                tickets[ahead] = (
                    demand,
                    [
                        make_group(
                            method,
                            ahead,
                            i,
                            i < demonstrations(demand) and method.prompts_from_experts,
                            budget,
                        )
                        for i in range(demand.prompts)
                    ],
                )
        demand, groups = tickets.pop(step)
        experts = (
            tuple(demonstration_of(step, i) for i in range(demonstrations(demand)))
            if not method.prompts_from_experts
            else ()
        )
        b = Batch(
            step,
            tuple(g for g in groups if method.accept(g)),
            experts,
            signals,
            off_policy=staleness > 0,
        )
        out = look(method, b, ids)
        metrics = {
            "grad_norm": math.sqrt(sum(float((g**2).sum()) for g in out.gradients)),
            "entropy": 0.3 + 0.01 * step,
        }
        metrics |= {
            f"loss/{name}": value
            for name, value in out.terms.items()
            if any(name in row.weights for row in out.rows)
        }
        if groups:
            metrics["reward/mean"] = float(np.mean([g.rewards.mean() for g in groups]))
        method.observe(step, metrics)
        metrics |= method.metrics(step)
        signals = latest_signals(signals, metrics)
        record.append((demand, out.rows, out.loss, out.gradients, metrics))
    return record, (signals, tickets)


def demonstrations(demand) -> int:
    return sum(demand.by_source.values())


def commit(method, step, signals):
    """The demand of a step that is going to be made."""
    demand = method.demand(step, BUDGET, signals)
    method.commit(step, demand, signals)
    return demand


def kind_of(demand) -> str:
    """rl: a step with rollouts; sft: one without."""
    return "rl" if demand.prompts else "sft"


def make_group(method, step, i, has_demonstration, budget) -> ScoredGroup:
    number = step * 100 + i
    rng = np.random.default_rng([1, number])
    response = np.append(rng.integers(4, 20, rng.integers(3, 8)), 3).astype(np.int32)
    prompt = Prompt(
        f"p{number}", np.array([1, 2], np.int32), "", {}, response if has_demonstration else None
    )
    request = method.request(number, prompt, Sampling(8, seed=number), step, budget)
    ts = []
    for prefix in request.prefixes or [()] * request.samples:
        new = rng.integers(4, 20, rng.integers(1, 6))
        source = np.repeat(
            np.array([Source.PROMPT, request.prefix_source, Source.POLICY], np.int8),
            [2, len(prefix), len(new)],
        )
        sampled = source == Source.POLICY
        ts.append(
            Trajectory(
                prompt.id,
                np.concatenate([prompt.tokens, prefix, new]).astype(np.int32),
                source,
                Finish.STOP,
                np.where(sampled, -0.2, np.nan).astype(np.float32),
                np.where(sampled, step, -1).astype(np.int32),
                number,
            )
        )
    rewards = (rng.random(len(ts)) < 0.3).astype(np.float32) * (rng.random() < 0.6)
    return ScoredGroup(
        number,
        prompt,
        tuple(ts),
        rewards,
        demonstration_reward=1.0 if has_demonstration and method.scores_demonstrations else None,
    )


def demonstration_of(step, i) -> Trajectory:
    rng = np.random.default_rng([2, step, i])
    return trajectory(
        [1, 2], [*rng.integers(4, 20, rng.integers(2, 7)), 3], expert=True, prompt_id=f"d{step}.{i}"
    )


def without_rollouts(demo, reward, number=0) -> ScoredGroup:
    """A group that holds nothing but its prompt's demonstration."""
    prompt = Prompt("p", np.array([1], np.int32), "", {}, np.array(demo, np.int32))
    return ScoredGroup(number, prompt, (), np.zeros(0, np.float32), demonstration_reward=reward)


def as_expert(g: ScoredGroup) -> Trajectory:
    """The group's demonstration as an ordinary one of the expert stream."""
    return demonstration(g)
