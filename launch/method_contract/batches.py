"""Hand-made batches, and numbers that a model might say of their rows: what the contract of a
method is checked on, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np

from tandem.algorithms.base import Batch, Method
from tandem.engine.core.types import Finish, Prompt, Row, ScoredGroup, Source, Trajectory
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import Inspection, PerRow, inspect
from tandem.engine.loop.group_numbers import PAIRS

NO_COLUMNS: Mapping[str, Any] = {}
WORDS = "abcdefghijklmnop"  # of the tokens from 4 on
LONGEST = 60  # tokens of a prompt
# Two demonstrations of three and two tokens, ids 5 6 3 and 7 3.
EXPERTS = (
    trajectory([1, 2], [5, 6, 3], expert=True, prompt_id="e0"),
    trajectory([1], [7, 3], expert=True, prompt_id="e1"),
)


class Letters:
    """A Codec: a token for each character."""

    def encode(self, content: Any) -> np.ndarray | None:
        text = content
        if not isinstance(content, str):
            text = "".join(message["content"] for message in content)
        if len(text) > LONGEST:
            return None
        return np.array([4 + ord(letter) % len(WORDS) for letter in text], np.int32)

    def decode(self, response: np.ndarray) -> str:
        return "".join(WORDS[int(token) % len(WORDS)] for token in response)


class AnyModel(dict[str, PerRow]):
    """A model of whatever name, at whatever view."""

    def get(self, key: str, default: Any = None) -> PerRow:
        return teacher_ids


def rollouts(
    rewards: Sequence[float] = (1.0, 0.0),
    behaviour: float = -1.0,
    demo: Sequence[int] | None = None,
    demo_reward: float | None = None,
    number: int = 0,
    finish: Finish = Finish.STOP,
) -> ScoredGroup:
    """Two rollouts of prompt [1], of three tokens and of one, and the prompt's demonstration if
    there is one.
    """
    long = trajectory([1], [5, 6, 7], [behaviour] * 3, finish=finish)
    short = trajectory([1], [8], [behaviour], finish=finish)
    made = group([long, short], rewards, demo, number)
    return replace(made, demonstration_reward=demo_reward)


def aligned(
    rewards: Sequence[float],
    demonstration_reward: float | None,
    number: int = 0,
    prefix: bool = False,
) -> ScoredGroup:
    """Four rollouts of 1 to 4 tokens and a demonstration 9 8 7 3; with `prefix` the last one was
    made to start from 9 8.
    """
    sampled = []
    for tokens in range(1, 5):
        response = range(5, 5 + tokens)
        sampled.append(trajectory([1], response, [-1.0] * tokens))
    made = group(sampled, rewards, demonstration=[9, 8, 7, 3], number=number)
    if prefix:
        *others, last = made.trajectories
        hybrid = forced(last, [9, 8], [5, 6])
        made = replace(made, trajectories=(*others, hybrid))
    return replace(made, demonstration_reward=demonstration_reward)


def forced(
    t: Trajectory,
    given: Sequence[int],
    continuation: Sequence[int],
    source: Source = Source.PREFIX,
) -> Trajectory:
    """Prompt [1], then `given` expert tokens, then a continuation by the policy."""
    start = 1 + len(given)
    tokens = np.array([1, *given, *continuation], np.int32)
    sources = np.full(len(tokens), Source.POLICY, np.int8)
    sources[0] = Source.PROMPT
    sources[1:start] = source
    behaviour_logp = np.full(len(tokens), -1.0, np.float32)
    behaviour_logp[:start] = np.nan
    version = np.zeros(len(tokens), np.int32)
    version[:start] = -1
    return replace(
        t,
        tokens=tokens,
        source=sources,
        behaviour_logp=behaviour_logp,
        version=version,
    )


def hinted(rewards: Sequence[float], number: int = 0) -> ScoredGroup:
    """A group with prompt [1] in which both rollouts were given 9 8."""
    made = rollouts(rewards, demo=[9, 8, 4, 3], demo_reward=1.0, number=number)
    given = []
    for i, t in enumerate(made.trajectories):
        continuation = [5 + i]
        given.append(forced(t, [9, 8], continuation, Source.HINT))
    return replace(made, trajectories=tuple(given))


def without_rollouts(demo: Sequence[int], reward: float, number: int = 0) -> ScoredGroup:
    """A group that holds nothing but its prompt's demonstration."""
    tokens = np.array([1], np.int32)
    demonstration = np.array(demo, np.int32)
    prompt = Prompt("p", tokens, "", {}, demonstration)
    rewards = np.zeros(0, np.float32)
    return ScoredGroup(number, prompt, (), rewards, demonstration_reward=reward)


def alone(demonstrated: bool = False) -> ScoredGroup:
    """A group of one rollout, with or without a demonstration."""
    one = [trajectory([1], [5, 6])]
    if not demonstrated:
        return group(one, [1.0])
    return group(one, [0.0], demonstration=[7, 3], demonstration_reward=1.0)


def batch(
    groups: Sequence[ScoredGroup] | None = None,
    experts: Sequence[Trajectory] = EXPERTS,
    step: int = 0,
    **more: Any,
) -> Batch:
    if groups is None:
        groups = [rollouts()]
    return Batch(step, tuple(groups), tuple(experts), **more)


def degenerate() -> dict[str, Batch]:
    """What a step may hold, but seldom does, by its name."""
    demo: dict[str, Any] = {"demo": [5, 6, 3], "demo_reward": 1.0}
    wrong_demo: dict[str, Any] = {"demo": [5, 6, 3], "demo_reward": 0.0}
    groups = {
        "all right": rollouts((1, 1), **demo),
        "all wrong": rollouts((0, 0), **demo),
        "demonstration wrong as well": rollouts((0, 0), **wrong_demo),
        "group of one": alone(),
        "group of one and a demonstration": alone(demonstrated=True),
        "only a demonstration": without_rollouts([7, 3], 1.0),
        "demonstration without a reward": rollouts((0, 1), demo=[5, 6, 3]),
        "hints": hinted((0, 1)),
        "truncated": rollouts((0, 1), finish=Finish.LENGTH, **demo),
    }
    found = {
        "no demonstrations": batch(experts=()),
        "no rollouts": batch(groups=()),
        "nothing": batch(groups=(), experts=()),
    }
    for name, only in groups.items():
        found[name] = batch([only])
    prefixed = aligned([0, 0, 0, 1], 1.0, prefix=True)
    all_right = aligned([1, 1, 1, 1], None, number=1)
    found["prefix"] = batch([prefixed, all_right])
    return found


def ramp(row: Row) -> np.ndarray:
    """log p = -0.1, -0.2, ... by position."""
    place = np.arange(len(row.tokens), dtype=np.float32)
    return -0.1 * (1.0 + place)


def ids(row: Row) -> np.ndarray:
    """A log-prob for every token that depends on the token and its place alone, whatever the row is
    called.
    """
    place = np.arange(len(row.tokens), dtype=np.float32)
    return -0.05 * (1 + row.tokens % 7) - 0.01 * place


def reference_ids(row: Row) -> np.ndarray:
    return ids(row) - 0.05


def teacher_ids(row: Row) -> np.ndarray:
    return ids(row) - 0.1


def probe_ids(row: Row) -> np.ndarray:
    return 1.0 - ids(row)


def rising(row: Row) -> np.ndarray:
    """An entropy: 0, 0.1, ... by position."""
    place = np.arange(len(row.tokens), dtype=np.float32)
    return 0.1 * place


def look(
    method: Method,
    b: Batch,
    logp: PerRow = ramp,
    entropy: Callable = rising,
    reference: Callable = reference_ids,
    columns: Mapping[str, Any] = NO_COLUMNS,
    **more: Any,
) -> Inspection:
    """inspect, with the streams, columns and texts that any method may ask for."""
    groups = [described(one, columns) for one in b.groups]
    experts = []
    for expert in answers(method, b.experts):
        experts.append(with_columns(expert, columns))
    b = replace(b, groups=tuple(groups), experts=tuple(experts))
    if b.budget.codec is None:
        budget = replace(b.budget, codec=Letters())
        b = replace(b, budget=budget)
    more.setdefault("models", AnyModel())
    probed = dict.fromkeys(method.probes(b), probe_ids)
    more["extra"] = {**probed, **more.get("extra", {})}
    return inspect(method, b, logp, entropy=entropy, reference=reference, **more)


def described(g: ScoredGroup, columns: Mapping[str, Any] = NO_COLUMNS) -> ScoredGroup:
    """A document of a query for rerankers; the texts are numbers from 0 to 10."""
    positive = g.group % 2 == 0
    found = {"query": "q", "positive": positive, "score": 3, **columns}
    prompt = replace(g.prompt, columns=found)
    texts = []
    for t in g.trajectories:
        number = int(t.tokens.sum()) % 11
        texts.append(str(number))
    return replace(g, prompt=prompt, texts=tuple(texts))


def with_columns(expert: Trajectory, columns: Mapping[str, Any]) -> Trajectory:
    """With what a sidecar of scores says, who speaks, and the columns asked for."""
    found = {"mean_logp": -0.4, "speakers": ["Ann"], **expert.columns, **columns}
    return replace(expert, columns=found)


def answers(method: Method, experts: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
    """For methods that take pairs: each demonstration as the better of two answers."""
    if not (method.uses_pairs or method.takes_pairs):
        return tuple(experts)
    found = []
    for expert in experts:
        if expert.role:
            found.append(expert)
            continue
        is_answer = expert.source == Source.EXPERT
        other = expert.tokens + is_answer
        number = PAIRS + crc32(expert.prompt_id.encode())
        found.append(replace(expert, role="chosen", group=number))
        found.append(replace(expert, role="rejected", group=number, tokens=other))
    return tuple(found)
