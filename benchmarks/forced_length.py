"""GRPO and CHORD with responses that may not end early and steps that wait for their turn: methods
of one's own, named by their path, as any user could write them.
"""

from dataclasses import dataclass, replace

from turns import Turns

from tandem.algorithms.hybrid.chord_mu import ChordMu
from tandem.algorithms.rl.grpo import GRPO

turns = Turns()
begun = set()


def forced(request, step: int):
    """The request with a full-length response; a synchronous step begins with its first one."""
    if step not in begun:
        begun.add(step)
        turns.arrive()
    return replace(
        request, sampling=replace(request.sampling, min_tokens=request.sampling.max_tokens)
    )


@dataclass
class ForcedGRPO(GRPO):
    def request(self, group, prompt, sampling, step, budget):
        return forced(super().request(group, prompt, sampling, step, budget), step)


@dataclass
class ForcedChord(ChordMu):
    def request(self, group, prompt, sampling, step, budget):
        return forced(super().request(group, prompt, sampling, step, budget), step)
