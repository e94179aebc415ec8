"""GRPO and CHORD with responses that may not end early: a method of one's own, named by its path, as any user could write it."""
from dataclasses import dataclass, replace

from tandem.algorithms.chord import ChordMu
from tandem.algorithms.grpo import GRPO


def to_full_length(request):
    return replace(request, sampling=replace(request.sampling, min_tokens=request.sampling.max_tokens))


@dataclass
class ForcedGRPO(GRPO):
    def request(self, *args):
        return to_full_length(super().request(*args))


@dataclass
class ForcedChord(ChordMu):
    def request(self, *args):
        return to_full_length(super().request(*args))
