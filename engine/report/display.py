"""What the user watches: a live panel on a terminal, one aligned line per step elsewhere.

Both fit 80 columns.

The display never decides anything and keeps no state that matters: it shows the metrics that
telemetry writes (see telemetry.py for their names). Nor can it stop a run: nothing that goes wrong
here, or at the terminal, is raised; the display falls silent and says why in `lost`.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Mapping
from typing import TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tandem.engine.core import stop
from tandem.engine.report.cells import clock, number, percent, rate, sparkline
from tandem.engine.report.terminal import Screen

HEADER_EVERY = 25  # plain lines
SPARKLINE = 24  # characters


def never_fails(method):
    """A method of Display that falls silent where it would fail."""

    @functools.wraps(method)
    def guarded(self, *args, **options):
        if self.failure is None:
            try:
                return method(self, *args, **options)
            except Exception as error:
                self.failure = error
        return None

    return guarded


class Display:
    """Progress of `total_steps` steps on `stream`; `first_step` is where a resumed run begins.

    live: the panel or plain lines; None: the panel if the stream is a terminal. Plain lines suit
    runs in which a debugger may be entered. Use it as a context manager, so that an error or Ctrl-C
    leaves the terminal as it was.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO,
        title: str = "",
        first_step: int = 0,
        live: bool | None = None,
    ):
        self.total, self.title = total_steps, title
        self.failure: Exception | None = None
        # a signal takes effect at the end of a step only, and is acknowledged before
        self.in_loop = False
        self.stream = stream
        self.screen = Screen(stream, self.acknowledge)
        self.done = self.first_step = first_step
        self.metrics: dict[str, float] = {}
        self.method: dict[str, float] = {}
        self.rewards: list[float] = []
        self.losses: list[float] = []
        self.accuracies: list[tuple[int, float]] = []
        self.started = False
        self.began = time.monotonic()
        self._columns: list[str] = []
        self._lines = 0
        self._live = None
        if live is None:
            live = self.screen.isatty() and os.environ.get("TERM") != "dumb"
        if live:
            self._live = Live(
                console=Console(file=cast(TextIO, self.screen)),
                get_renderable=self.panel,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Display:
        self.open()
        return self

    @never_fails
    def open(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self.in_loop = False
        self.stop_live()
        self.screen.finish()

    @never_fails
    def stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def lost(self) -> Exception | None:
        """Why nothing is shown any more, if that is so."""
        return self.failure or self.screen.error

    def acknowledge(self) -> None:
        """Called a few times per second by a thread: tell of a signal that the loop has not come to
        yet.
        """
        name = stop.requested()
        if name and self.in_loop:
            self.in_loop = False
            more = "; Ctrl-C again stops at once" if name == "SIGINT" else ""
            self.message(f"{name}: stopping after this step, with a checkpoint{more}")

    def start(self) -> None:
        """The first step begins now: what came before is start-up and does not count for the time
        left.
        """
        self.began = time.monotonic()
        self.started = self.in_loop = True

    @never_fails
    def step(
        self, step: int, metrics: Mapping[str, float], method: Mapping[str, float] = {}
    ) -> None:
        """Step `step` (0-based) is done. `method`: the method's own metrics, e.g. {"mu": 0.4}."""
        self.done = step + 1
        self.metrics = dict(metrics)
        self.method = dict(method)
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])
        if "loss" in metrics:
            self.losses.append(metrics["loss"])
        if self._live is None:
            self._plain_line()

    @never_fails
    def evaluation(self, step: int, accuracy: float | None) -> None:
        """Held-out accuracy after `step` steps.

        After a resume, call it for the earlier evaluations too (Telemetry.evaluations). None or
        NaN: nothing could be scored.
        """
        if accuracy is not None and math.isfinite(accuracy):
            self.accuracies.append((step, accuracy))

    @never_fails
    def message(self, text: str) -> None:
        """A line that stays: evaluation, checkpoint, restart."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        """One line, after what others printed to the stream."""
        self.stream.flush()
        self.screen.write(text + "\n")
        if threading.current_thread() is not self.screen.thread:
            self.screen.drain()

    def seconds_left(self) -> float | None:
        """By the mean time per step so far."""
        steps = self.done - self.first_step
        if not steps:
            return None
        return (time.monotonic() - self.began) / steps * (self.total - self.done)

    def panel(self) -> Panel | Text:
        """What `rich` shows; it asks in a thread of its own."""
        return self.draw() or Text()

    @never_fails
    def draw(self) -> Panel:
        others = Text("   ").join(
            Text.assemble(f"{name} ", number(value)) for name, value in self._small_numbers()
        )
        words = "" if self.started else "starting"
        status = Text(words, style="dim italic", no_wrap=True, overflow="ellipsis")
        width = 78
        if self._live is not None:
            width = min(100, self._live.console.width - 2)  # 2 columns left for an echoed ^C
        return Panel(
            Group(self._bar(), Text(), self._grid(), Text(), others, status),
            title=Text(self.title) if self.title else None,
            title_align="left",
            border_style="dim",
            width=width,
        )

    def _bar(self) -> Table:
        """Steps done, and time."""
        timing = f"{clock(time.monotonic() - self.began)} gone"
        left = self.seconds_left()
        if left is not None:
            timing += f", {clock(left)} left"
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            Text(f"step {self.done}/{self.total}", style="bold"),
            ProgressBar(total=self.total, completed=self.done),
            Text(timing),
        )
        return bar

    def _grid(self) -> Table:
        """Reward (or loss) and accuracy on the left, the speeds of both sides on the right."""
        m = self.metrics
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=8, no_wrap=True)
        grid.add_column(width=7, no_wrap=True, justify="right")
        grid.add_column(ratio=1, no_wrap=True)
        grid.add_column(width=8, no_wrap=True)
        grid.add_column(width=8, no_wrap=True, justify="right")
        grid.add_column(width=7, no_wrap=True, justify="right")
        name, value, history = self._goal()
        grid.add_row(
            name,
            bold(value),
            Text(sparkline(history, SPARKLINE), style="cyan"),
            "",
            dim("tokens/s"),
            dim("waiting"),
        )
        accuracies = [accuracy for _, accuracy in self.accuracies]
        grid.add_row(
            "held-out",
            bold(self._last_accuracy()),
            Text(sparkline(accuracies, SPARKLINE, 0.0), style="green"),
            "rollout",
            rate(m.get("rollout/tokens_per_second")),
            percent(m.get("rollout/idle")),
        )
        grid.add_row(
            *self._best_accuracy(),
            "learner",
            rate(m.get("learner/tokens_per_second")),
            percent(m.get("learner/idle")),
        )
        return grid

    def _goal(self) -> tuple[str, float | None, list[float]]:
        """What training is to raise: the reward; as long as there is none, what it lowers."""
        if self.losses and not self.rewards:
            return "loss", self.metrics.get("loss"), self.losses
        return "reward", self.metrics.get("reward/mean"), self.rewards

    def _small_numbers(self) -> list[tuple[str, float]]:
        known = {"entropy": "entropy", "grad_norm": "grad norm", "gap/max": "logp gap"}
        found = list(self.method.items())
        for key, name in known.items():
            if key in self.metrics:
                found.append((name, self.metrics[key]))
        return found

    def _last_accuracy(self) -> float | None:
        return self.accuracies[-1][1] if self.accuracies else None

    def _best_accuracy(self) -> tuple[str, str, str]:
        """The cells of the panel that tell of it."""
        if not self.accuracies:
            return "", "", ""
        step, best = max(self.accuracies, key=lambda entry: entry[1])
        return "  best", number(best), f"after {step} steps"

    def _plain_line(self) -> None:
        """step, reward or loss, held-out accuracy, entropy, the method's numbers, tokens/s and idle
        share of both sides, time left.
        """
        m = self.metrics
        name, value, _ = self._goal()
        cells = {
            "step": f"{self.done}/{self.total}",
            name: number(value),
            "held": number(self._last_accuracy()),
            "entropy": number(m.get("entropy")),
            **{key: number(value) for key, value in self.method.items()},
            "roll/s": rate(m.get("rollout/tokens_per_second")),
            "idle": percent(m.get("rollout/idle")),
            "learn/s": rate(m.get("learner/tokens_per_second")),
            "idle ": percent(m.get("learner/idle")),
            "left": clock(self.seconds_left()),
        }
        width = {key: max(len(key), 6) for key in cells}
        width |= {"step": 2 * len(str(self.total)) + 1, "idle": 4, "idle ": 4}
        if list(cells) != self._columns or self._lines % HEADER_EVERY == 0:
            self._columns = list(cells)
            self._print("  ".join(key.strip().rjust(width[key]) for key in cells))
        self._lines += 1
        self._print("  ".join(value.rjust(width[key]) for key, value in cells.items()))


def bold(value: float | None) -> Text:
    return Text(number(value), style="bold")


def dim(text: str) -> Text:
    return Text(text, style="dim")
