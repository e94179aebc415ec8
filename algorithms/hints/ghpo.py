"""GHPO: prompts that a whole group fails are asked again, with more and more of the solution in the
prompt.

    wave k = 1 .. K:  all samples of the group wrong -> sample the whole group anew, behind the
                      prompt with the first amounts[k] of the demonstration's text
    L = L_GRPO on the last wave, each sample behind the prompt that it was sampled under

Source: arXiv 2507.10628 and the authors' code. Defaults: amounts 25, 50 and 75 % of the solution's
characters, T 1, no KL. The hint is no target: it is part of the prompt. A group that is still wrong
with the last hint stays as it is.

Paper and code: once a later wave ran, the code trained groups that an earlier hint had rescued
behind the prompt without it; here a row always has the prompt that it was sampled under. The code's
test is the accuracy reward alone: here a sample is right with at least `correct` in all. Amounts
and cold start of the paper itself: UNVERIFIED. Hints end at a word's end, so they may be a little
shorter. Nothing looks whether the hint holds the answer. No `demos`: demonstrations are shown, not
trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.hints import first_words, with_hint
from tandem.algorithms.rl_method import RLMethod


@dataclass
class GHPO(RLMethod):
    title: ClassVar[str] = "GRPO that asks again with a part of the solution where all were wrong"
    paper: ClassVar[str] = "2507.10628"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True

    amounts: list = field(default_factory=lambda: [0.25, 0.5, 0.75])
    correct: float = 1.0  # a sample with at least this reward is right
    template: str = "\n\nThe solution begins like this:\n{hint}\n"

    def __post_init__(self):
        super().__post_init__()
        for amount in self.amounts:
            if not isinstance(amount, float) or not 0.0 < amount < 1.0:
                raise ValueError(f"amounts has {amount!r}, each must be a number in (0, 1)")
        if "{hint}" not in self.template:
            raise ValueError(f"template is {self.template!r}, expected a text with {{hint}} in it")

    def again(self, group, wave, request, budget):
        solved = (group.rewards >= self.correct).any()
        prompt = group.earlier[0].prompt if group.earlier else group.prompt
        if solved or wave > len(self.amounts) or prompt.demonstration is None:
            return None
        codec = budget.codec
        assert codec is not None, "prompts that come with demonstrations are read from a dataset"
        solution = codec.decode(prompt.demonstration)
        hint = first_words(solution, self.amounts[wave - 1])
        content = with_hint(prompt.content, self.template, hint)
        tokens = codec.encode(content)
        if tokens is None:  # too long with the hint
            return None
        return replace(request, prompt=replace(prompt, content=content, tokens=tokens))

    def rows(self, batch: Batch):
        return self.policy.rows(batch.groups)

    def terms(self, batch: Batch):
        return self.policy.terms(batch)
