"""ReLIFT: RL steps, and an SFT step on the hardest questions whenever enough of them have gathered.

    RL step:   L_GRPO; prompts that no rollout solved go to a buffer, with their demonstrations
    SFT step:  L = - TOK_buf{ log p_t } - alpha TOK_buf{ h_t }, as soon as the buffer holds
               `buffer` demonstrations; it takes that many

Source: arXiv 2506.07527; buffer 128. The SFT step has optimizer moments of its own. Paper and code:
the paper's RL is GRPO with std, clip and token mean, alpha 1e-4, and a plain buffer: oldest first.
as=code has no std, no clip, divides by the response limit (give it as `policy: {reduction_length:
8192}`), an entropy bonus of 0.001 on the mean entropy, alpha 1e-3, puts each step's demonstrations
in front of the buffer and takes from there (within a step in the step's order; what is left grows
old at the end), and calls a prompt hardest only if all its rewards are exactly 0, so that a format
penalty keeps it out. The authors' later code, on a newer verl, appends to the buffer as the paper:
`newest_first: false`. The authors clip gradients at 1.0 (SFT) and 0.7 (RL); learner.grad_clip is
one number for both. With dynamic sampling, hardest prompts are kept: they have no gradient, but
feed the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tandem.algorithms.base import Batch, Demand, Term
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.parts.variants import select, variant_option
from tandem.algorithms.rl_method import RLMethod
from tandem.algorithms.rows import demonstration
from tandem.engine.core.types import Row, ScoredGroup, Trajectory


@dataclass
class ReLIFT(RLMethod):
    title: ClassVar[str] = "RL, with SFT steps on the questions no rollout solved"
    paper: ClassVar[str] = "2506.07527"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    demos_term: ClassVar[str] = "buffer"
    # one rollout per prompt still shows which questions to learn from demonstrations
    needs_groups: ClassVar[bool] = False

    variant: str = variant_option()  # paper | code
    buffer: int = 128
    newest_first: bool | None = None  # None: false as paper, true as code
    alpha: Schedule | None = None  # None: 1e-4 as paper, 1e-3 as code
    sft_learning_rate: float | None = None
    demos: DemoLoss = DemoLoss()  # its entropy_bonus goes before alpha

    def __post_init__(self):
        if self.buffer < 1:
            raise ValueError(f"buffer is {self.buffer}, must be at least 1")
        super().__post_init__()
        alpha = select(self.variant, 1e-4, 1e-3)
        self.entropy_weight = self.alpha or Schedule(peak=alpha)
        if self.newest_first is None:
            self.newest_first = select(self.variant, False, True)
        self.waiting: list[Trajectory] = []  # in the order in which they are taken
        # SFT steps that were announced and not yet made; with staleness, steps are announced ahead
        self.planned: set[int] = set()
        self.pushed = 0
        self.consumed = 0

    def policy_defaults(self):
        return select(self.variant, paper={}, code={"preset": "luffy_code"})

    def hardest(self, group: ScoredGroup) -> bool:
        if group.prompt.demonstration is None:
            return False
        solved = group.rewards != 0
        if self.variant == "paper":
            solved = group.rewards > 0
        return not solved.any()

    def demand(self, step, budget, signals):
        others = self.planned - {step}
        needed = self.buffer * (1 + len(others))
        if step in self.planned or len(self.waiting) >= needed:
            return Demand(learning_rate=self.sft_learning_rate, optimizer="sft")
        return Demand(prompts=budget.prompts, experts=budget.experts)

    def commit(self, step, demand, signals):
        if not demand.prompts:
            self.planned.add(step)

    def accept(self, group):
        return self.hardest(group) or self.policy.accept(group)

    def rows(self, batch: Batch) -> list[Row]:
        if batch.groups:
            self.gather(batch.groups)
            return self.policy.rows(batch.groups)
        self.planned.discard(batch.step)
        taken = self.waiting[: self.buffer]
        self.waiting = self.waiting[self.buffer :]
        self.consumed += len(taken)
        return [self.demos.row(t, "buffer", self.entropy_weight) for t in taken]

    def gather(self, groups: Sequence[ScoredGroup]) -> None:
        """Put the demonstrations of the hardest prompts into the buffer."""
        found = [demonstration(group) for group in groups if self.hardest(group)]
        if self.newest_first:
            self.waiting = found + self.waiting
        else:
            self.waiting = self.waiting + found
        self.pushed += len(found)

    def terms(self, batch: Batch) -> list[Term]:
        if batch.groups:
            return self.policy.terms(batch)
        return self.demos.terms("buffer", batch, bonus=self.entropy_weight)

    def metrics(self, step):
        return {"buffer": float(len(self.waiting)), "demonstrations_used": float(self.consumed)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "waiting": list(self.waiting),
            "planned": sorted(self.planned),
            "pushed": self.pushed,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.waiting = list(state["waiting"])
        self.planned = set(state["planned"])
        self.pushed = state["pushed"]
        self.consumed = state["consumed"]
