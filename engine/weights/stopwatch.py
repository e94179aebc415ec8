"""Where the time of a weight sync goes: a line in the logs of learner and engine."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds by phase: `lap(phase)` books the time since the lap before."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str | None = None) -> None:
        now = time.perf_counter()
        if phase is not None:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def show(self, side: str) -> None:
        phases = [f"{phase} {seconds:.4f}" for phase, seconds in self.seconds.items()]
        print(f"weights {side}: {', '.join(phases)}", flush=True)
