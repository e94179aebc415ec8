"""SPIN, self-play fine-tuning: prefer the demonstration to the answer that the model of the round
before gives to the same prompt.

    L = mean over prompts of l(beta ((S_real - S_real^opp) - (S_gen - S_gen^opp)))
    l(x) = -log s(x), or max(0, 1 - x) with `loss: hinge`;    S the sum of log p_t of a response

The opponent is the reference: the weights that a round starts from. A round is `round_steps` steps,
and the run ends after `rounds` of them. As published, a round samples one answer for each of its
prompts, then trains on all: that is `round_steps: 1`, with `updates` optimizer steps on the step's
`data.experts_per_step` prompts. With longer rounds the answers are the present model's, not the
opponent's. Answers of weights from before the opponent's are refused: `rollout.staleness` is 0.

Source: arXiv 2401.01335 and the authors' code, from memory where row 68 of the catalogue says so:
beta 0.1 (5 in the last round), learning rate 5e-7 (then 1e-7), RMSprop, 2 to 6 epochs a round. Not
built: joining in the answers of the round before, several epochs. Prompts come from data.experts
with their demonstrations. No `demos`: the demonstration has no likelihood term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tandem.algorithms.base import Batch, Budget, Demand, Method, Term
from tandem.algorithms.parts.objectives.preference import DirectPreference
from tandem.algorithms.parts.pairs import Pair, by_length
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rows import demonstration
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Source, Trajectory


@dataclass
class SPIN(Method):
    title: ClassVar[str] = "self-play: demonstrations against own answers, in rounds"
    paper: ClassVar[str] = "2401.01335"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    uses_rewards: ClassVar[bool] = False

    beta: Schedule = Schedule(peak=0.1)
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    round_steps: int = 1
    rounds: int | None = None  # None: as many as run.steps has
    updates: int = 4  # optimizer steps of a step

    def __post_init__(self):
        for name in ("round_steps", "updates", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        first = step % self.round_steps == 0
        last = self.rounds is not None and step + 1 >= self.rounds * self.round_steps
        return Demand(
            prompts=budget.experts,
            experts=budget.experts,
            updates=self.updates,
            set_reference=first and step > 0,
            stop=f"all {self.rounds} rounds are done" if last else "",
        )

    def request(self, group, prompt, sampling, step, budget):
        """One answer."""
        return super().request(group, prompt, sampling, step, replace(budget, samples=1))

    def rows(self, batch: Batch):
        rows = []
        began = batch.step - batch.step % self.round_steps
        for group in batch.groups:
            if group.prompt.demonstration is not None and group.trajectories:
                answer = min(group.trajectories, key=by_length)  # the only one, as asked for
                check_age(answer, began)
                pair = Pair(demonstration(group), answer, group.group)
                rows += pair.rows("spin")
        return rows

    def terms(self, batch: Batch):
        beta = self.beta(batch.step, batch.signals)
        objective = DirectPreference(self.loss, beta)
        return [Term("spin", objective, unit="group", needs=objective.needs)]

    def metrics(self, step: int):
        return {"round": float(step // self.round_steps)}


def check_age(answer: Trajectory, began: int) -> None:
    """Raise MethodError for an answer that is older than its round's opponent, the weights of step
    `began`.
    """
    sampled = answer.source == Source.POLICY
    if answer.version is None or not sampled.any():
        return
    oldest = int(answer.version[sampled].min())
    if oldest < began:
        raise MethodError(
            f"method SPIN: the answer to prompt {answer.prompt_id!r} was sampled with the weights "
            f"of step {oldest}, expected those of step {began}, with which its round begins, or "
            "later ones: the opponent gives the answers. Set rollout.staleness to 0"
        )
