"""From generated trajectories to scored groups: the hand-over to the reward functions, and what
becomes of samples whose reward failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from tandem.engine.core import stop
from tandem.engine.core.types import (
    Finish,
    GenRequest,
    RewardOutcome,
    ScoredGroup,
    Trajectory,
)
from tandem.engine.loop.tickets import GroupSlot
from tandem.rollout.rewards.runner import RewardRunner


@dataclass(eq=False)
class Scorer:
    """`decode(ids, finish) -> text` is that of engine/data/decoding.py. `on_error` is
    reward.on_error; `demonstrations`: whether the demonstration of a prompt is scored as well.
    """

    rewards: RewardRunner | None  # None: no reward.functions, every reward is 0
    decode: Callable[[np.ndarray, Finish], str]
    on_error: str
    demonstrations: bool = False
    # a slot is submitted by a callback or by the waiting loop, but once
    lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def submit(self, slot: GroupSlot) -> None:
        """Hand the generated trajectories to the rewards; in whatever thread finished them."""
        with self.lock:
            if slot.scoring is not None or slot.aborted:
                return
            prompt = slot.request.prompt
            generated = usable(slot.generation.result())
            responses = [t.response for t in generated]
            texts = [self.decode(t.response, t.finish) for t in generated]
            slot.texts = list(texts)
            if self.demonstrations and prompt.demonstration is not None:
                responses.append(prompt.demonstration)
                texts.append(self.decode(prompt.demonstration, Finish.STOP))
            if self.rewards is None:
                slot.scoring = Future()
                slot.scoring.set_result([RewardOutcome(0.0)] * len(texts))
            else:
                slot.scoring = self.rewards.submit(prompt, texts, responses)

    def abort(self, slot: GroupSlot) -> None:
        """From now on the slot is not submitted."""
        with self.lock:
            slot.aborted = True

    def finish(self, slot: GroupSlot) -> ScoredGroup | None:
        """Wait for the rewards of a generated slot. None if no trajectory has a usable reward."""
        kept = usable(slot.generation.result())
        self.submit(slot)
        assert slot.scoring is not None, "an aborted group was asked for"
        outcomes = stop.result(slot.scoring)
        of_kept = outcomes[: len(kept)]
        group = scored_group(slot.request, kept, of_kept, self.on_error, slot.texts)
        if group is not None and len(outcomes) > len(kept):
            # None where its reward failed: then it takes no part
            group = replace(group, demonstration_reward=outcomes[-1].value)
        return group


def usable(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    return [t for t in trajectories if t.finish != Finish.ABORT]


def scored_group(
    request: GenRequest,
    trajectories: Sequence[Trajectory],
    outcomes: Sequence[RewardOutcome],
    on_error: str,
    texts: list[str],
) -> ScoredGroup | None:
    """Apply the policy for failed rewards: drop the sample, score it 0 (and keep the error beside
    it), or stop the run. None if all samples are dropped.
    """
    kept, rewards = [], []
    for i, outcome in enumerate(outcomes):
        error = outcome.error
        if error is not None and on_error == "fail":
            raise RuntimeError(
                f"reward {error.function} failed on prompt {request.prompt.id!r} "
                f"({error.kind}): {error.message}; "
                "reward.on_error is 'fail' (drop or zero would go on)"
            )
        if error is None:
            kept.append(i)
            rewards.append(outcome.value)
        elif on_error == "zero":
            kept.append(i)
            rewards.append(0.0)
    if not kept:
        return None
    return ScoredGroup(
        group=request.group,
        prompt=request.prompt,
        trajectories=tuple(trajectories[i] for i in kept),
        rewards=np.array(rewards, np.float32),
        outcomes=tuple(outcomes[i] for i in kept),
        texts=tuple(texts[i] for i in kept),
    )
