"""Taking turns: several training processes stay up and step one after the other, so that a busy
minute on a shared machine hits all of them alike.

A process calls `arrive()` where a step begins and waits there until `grant` of the driver lets it
go; a step lasts from there to its next arrival. Files in the folder named by BENCH_TURNS are all
there is between them: the peer's Python has nothing in common with ours.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Turns:
    """The side of a process; does nothing where BENCH_TURNS is not set.

    Raises SystemExit when told to stop, so that the process leaves through its clean-up.
    """

    def __init__(self):
        place = os.environ.get("BENCH_TURNS")
        self.place = Path(place) if place else None
        self.number, self.granted = 0, 0.0

    def arrive(self) -> None:
        if self.place is None:
            return
        if self.number:
            with open(self.place / "seconds", "a") as file:
                file.write(f"{time.perf_counter() - self.granted}\n")
        (self.place / f"here.{self.number}").touch()
        while not (self.place / f"go.{self.number}").exists():
            if (self.place / "stop").exists():
                raise SystemExit(0)
            # five waiting processes that looked every 2 ms cost the one whose turn it was a tenth
            time.sleep(0.05)
        self.number, self.granted = self.number + 1, time.perf_counter()


class Turn:
    """The driver's view of one process."""

    def __init__(self, place: Path, process):
        self.place, self.process = place, process

    def wait(self, number: int, timeout: float) -> None:
        """Until the process has arrived for the `number`-th time."""
        end = time.monotonic() + timeout
        while not (self.place / f"here.{number}").exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"{self.place.name} did not come to step {number} (exit status "
                    f"{self.process.poll()}):\n{(self.place / 'out.txt').read_text()[-3000:]}"
                )
            time.sleep(0.005)

    def grant(self, number: int) -> None:
        (self.place / f"go.{number}").touch()

    def stop(self, timeout: float) -> None:
        """End a process that waits; raises RuntimeError with its output if it fails in that."""
        (self.place / "stop").touch()
        if self.process.wait(timeout=timeout):
            raise RuntimeError((self.place / "out.txt").read_text()[-3000:])

    def seconds(self) -> list[float]:
        return [float(line) for line in (self.place / "seconds").read_text().split()]
