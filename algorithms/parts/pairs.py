"""Pairs of a better and a worse answer to one prompt, and their rows.

They come from a source of pairs (two demonstrations of one group), or from a step's own rollouts:
the best and the worst of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Row, ScoredGroup, Source, Trajectory

CHOSEN, REJECTED = "chosen", "rejected"  # roles of their trajectories and rows
ROLES = (CHOSEN, REJECTED)


@dataclass(frozen=True, eq=False)
class Pair:
    chosen: Trajectory
    rejected: Trajectory
    group: int  # another number in each pair of a step

    def rows(self, term: str) -> list[Row]:
        """Its two rows, for a term with the unit "group"."""
        return [
            answer_row(self.chosen, term, CHOSEN, self.group),
            answer_row(self.rejected, term, REJECTED, self.group),
        ]


def pairs_of_data(experts: Sequence[Trajectory]) -> list[Pair]:
    """Those of a source of pairs. Raises MethodError for any other demonstration."""
    groups: dict[int, dict[str, Trajectory]] = {}
    for expert in experts:
        if expert.role not in ROLES or expert.group < 0:
            raise MethodError(
                f"the demonstration of prompt {expert.prompt_id!r} is no half of a pair; set "
                "`chosen` and `rejected` of its dataset to columns with two answers"
            )
        groups.setdefault(expert.group, {})[expert.role] = expert
    return [Pair(both[CHOSEN], both[REJECTED], group) for group, both in groups.items()]


def pairs_of_rollouts(groups: Sequence[ScoredGroup]) -> list[Pair]:
    """The best and the worst of each group; none of a group whose rewards are all equal. Of
    several alike the shortest stands for them.
    """
    found = []
    for group in groups:
        if not len(group.rewards) or group.rewards.min() == group.rewards.max():
            continue
        # an order of their own, not that in which the engine returned them
        order = sorted(range(len(group.rewards)), key=lambda i: by_length(group.trajectories[i]))
        rewards = group.rewards[order]
        best, worst = order[int(rewards.argmax())], order[int(rewards.argmin())]
        found.append(Pair(group.trajectories[best], group.trajectories[worst], group.group))
    return found


def by_length(trajectory: Trajectory) -> tuple[int, list[int]]:
    return len(trajectory.tokens), trajectory.tokens.tolist()


def answer_row(trajectory: Trajectory, term: str, role: str, group: int = -1) -> Row:
    """A rollout or a demonstration as a row, whoever wrote it: weight 1 on its response."""
    written = np.isin(trajectory.source, (Source.POLICY, Source.EXPERT))
    return Row(
        tokens=trajectory.tokens,
        source=trajectory.source,
        weights={term: written.astype(np.float32)},
        streams={"behaviour_logp": trajectory.behaviour_logp},
        version=trajectory.version,
        group=group,
        prompt_id=trajectory.prompt_id,
        role=role,
    )


def judged_demonstrations(experts: Sequence[Trajectory]) -> list[Trajectory]:
    """Those with a role of a pair, alone or not. Raises MethodError for any other."""
    for expert in experts:
        check_role(expert)
    return list(experts)


def check_role(expert: Trajectory) -> None:
    if expert.role not in ROLES:
        raise MethodError(
            f"the demonstration of prompt {expert.prompt_id!r} has the role {expert.role!r}, "
            f"expected {' or '.join(ROLES)}; set `chosen` and `rejected` of its dataset, or "
            "`role` to a column with these words"
        )


def judged_rollouts(groups: Sequence[ScoredGroup], good: float) -> list[Trajectory]:
    """All of them, chosen from the reward `good` on."""
    found = []
    for group in groups:
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
            role = CHOSEN if reward >= good else REJECTED
            found.append(replace(trajectory, role=role))
    return found


def mismatched(rows: Sequence[Row], of_term: str, term: str) -> list[Row]:
    """Each prompt of `rows` with an answer to the next one, as a row of `term`; none for a single
    prompt. The order is that of the prompts' tokens.
    """
    answers: dict[tuple[int, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.tokens.tolist()):
        answers.setdefault(tuple(row.tokens[: first_token(row, of_term)].tolist()), row)
    prompts = list(answers)
    found = []
    for i, prompt in enumerate(prompts):
        other = prompts[(i + 1) % len(prompts)]
        answer = answers[other]
        if other != prompt:
            weight = np.append(np.zeros(len(prompt)), answer.weights[of_term][len(other) :])
            tokens = np.append(prompt, answer.tokens[len(other) :])
            source = np.append([Source.PROMPT] * len(prompt), answer.source[len(other) :])
            found.append(
                Row(
                    tokens=tokens.astype(np.int32),
                    source=source.astype(np.int8),
                    weights={term: weight.astype(np.float32)},
                    prompt_id=answers[prompt].prompt_id,
                )
            )
    return found


def first_token(row: Row, term: str) -> int:
    """Place of the row's first token in a term."""
    return int((row.weights[term] != 0).argmax())
