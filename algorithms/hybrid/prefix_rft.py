"""Prefix-RFT: one rollout of every group starts from a prefix of the demonstration, and the whole
sequence is trained by RL.

    group of N = N - 1 plain rollouts + 1 hybrid y
    y          = [ y*_1 .. y*_k, continuation ~ pi ],    k = floor(l |y*|),  l ~ U(low(t), high)
    L          = -(1/Z) sum_i sum_t CLIP(rho_it, A_i),   A over all N; on prefix tokens only the
                 top 20 % by entropy are pushed, the others count with A = 0

Source: arXiv 2507.01679 (v3), authors' code for constants: high = 0.95, low falls from 0.95 to 0 by
a cosine. UNVERIFIED: over how many steps low falls (500 here), N, learning rate; that the tables
came from GRPO over all N (the code has other estimators, too). log pi_old on prefix tokens is the
learner's own; rollout correction, KL and entropy bonus leave them out. The prefix is cut on token
ids and never holds the whole response, its draw depends on (run seed, group). Dynamic sampling, if
switched on, judges the group with its hybrid. Paper and code: the code takes the entropy quantile
within each micro-batch; here it is within each row, which no packing can change. No `demos`: the
prefix is trained by the policy term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.objectives.nll import PrefixSelected
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rl_method import RLMethod
from tandem.engine.core.types import Row, Source


def check_share(name: str, given: object, shares: Schedule) -> None:
    if not shares.within(0.0, 1.0):
        raise ValueError(f"{name} is {given}; it is a share, within [0, 1]")


@dataclass
class PrefixRFT(RLMethod):
    title: ClassVar[str] = "one rollout per group continues a demonstration's prefix"
    paper: ClassVar[str] = "2507.01679"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True

    low: Schedule = Schedule("cosine", peak=0.95, valley=0.0, decay=500)
    high: Schedule = Schedule(peak=0.95)
    keep: float = 0.2  # share of prefix tokens that are pushed

    def __post_init__(self):
        super().__post_init__()
        check_share("low", self.low, self.low)
        check_share("high", self.high, self.high)
        check_share("keep", self.keep, Schedule(peak=self.keep))
        self.signals: Mapping[str, float] = {}
        self.rewards: dict[str, float] = {}

    def commit(self, step, demand, signals):
        self.signals = signals  # what the prefixes of this step's requests go by

    def bounds(self, step: int) -> tuple[float, float]:
        """(low, high) of the share that is drawn."""
        high = self.high(step, self.signals)
        low = self.low(step, self.signals)
        low = min(low, high)
        return low, high

    def prefix_length(self, step: int, demonstration: int, seed) -> int:
        """Tokens, of a demonstration of that many."""
        low, high = self.bounds(step)
        generator = np.random.default_rng(seed)
        draw = generator.random()
        share = low + (high - low) * draw
        length = int(share * demonstration)
        return min(length, demonstration - 1)

    def request(self, group, prompt, sampling, step, budget):
        request = super().request(group, prompt, sampling, step, budget)
        if prompt.demonstration is None:
            return request
        seed = [budget.seed, group]
        length = self.prefix_length(step, len(prompt.demonstration), seed)
        length = min(length, sampling.max_tokens - 1)
        if length <= 0:
            return request
        none = np.zeros(0, np.int32)
        prefix = prompt.demonstration[:length]
        prefixes = [none] * (budget.samples - 1)
        prefixes.append(prefix)
        return replace(request, prefixes=tuple(prefixes), prefix_source=Source.PREFIX)

    def rows(self, batch: Batch) -> list[Row]:
        # apart, since a prefix inflates success
        hybrid = []
        plain = []
        for group in batch.groups:
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
                if Source.PREFIX in trajectory.source:
                    hybrid.append(reward)
                else:
                    plain.append(reward)
        self.rewards = {}
        if hybrid:
            self.rewards["reward_hybrid"] = float(np.mean(hybrid))
        if plain:
            self.rewards["reward_plain"] = float(np.mean(plain))
        return self.policy.rows(batch.groups)

    def terms(self, batch: Batch) -> list[Term]:
        first, *others = self.policy.terms(batch)
        objective = PrefixSelected(first.objective, self.keep)
        needs = first.needs | {"entropy"}
        first = replace(first, objective=objective, needs=needs)
        return [first, *others]

    def metrics(self, step):
        low, _ = self.bounds(step)
        return {"prefix_low": low, **self.rewards}

    def state_dict(self) -> dict[str, Any]:
        return {"signals": dict(self.signals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.signals = dict(state["signals"])
