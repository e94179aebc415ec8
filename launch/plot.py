"""Pictures of runs, from their metrics.jsonl: one run in detail, or several methods compared with
mean and spread over seeds.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines of a comparison differ in
dash as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import read_jsonl
from tandem.engine.report.telemetry import is_evaluation

Series = tuple[np.ndarray, np.ndarray]  # steps, values

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
SKY = "#56B4E9"
RED = "#D55E00"
BLACK = "#000000"
STYLES = [
    (BLUE, "-"),
    (RED, "--"),
    (GREEN, "-."),
    (ORANGE, (0, (1, 1))),
    (PINK, (0, (5, 1, 1, 1))),
    (SKY, (0, (3, 3))),
    (BLACK, ":"),
]


def plot_run(run_dir: str | Path, out_png: str | Path, title: str | None = None) -> None:
    """Held-out accuracy with one standard error over steps, minutes on a second axis on top; below
    it training reward and, if the method has one, mu.

    Raises ConfigError if there is nothing to plot or matplotlib is missing.
    """
    plt = pyplot()
    steps, evaluations = read_metrics(run_dir)
    reward = series(steps, "reward/mean")
    mu = series(steps, "mu")
    if len(reward[0]) or len(mu[0]):
        fig = plt.figure(figsize=(7.2, 5.4), layout="constrained")
        top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        draw_training(bottom, reward, mu)
    else:
        fig = plt.figure(figsize=(7.2, 3.8), layout="constrained")
        top = bottom = fig.subplots()
    accuracy = series(evaluations, "eval/accuracy")
    error = series(evaluations, "eval/standard_error")
    draw_accuracy(top, accuracy, error)
    minutes_axis(top, steps, evaluations)
    fig.suptitle(title or Path(run_dir).name, x=0.02, ha="left", weight="bold")
    bottom.set_xlabel("optimizer step")
    fig.savefig(out_png, dpi=150)
    plt.close(fig)


def draw_training(ax, reward: Series, mu: Series) -> None:
    """The training reward as it was and smoothed and, if there is one, mu on an axis of its own."""
    x, rewards = reward
    ax.plot(x, rewards, color=GREEN, linewidth=0.8, alpha=0.35)
    mean = smooth(rewards)
    handles = ax.plot(x, mean, color=GREEN, label="mean reward of rollouts")
    ax.set_ylabel("training reward")
    if len(mu[0]):
        twin = ax.twinx()
        label = "mu: weight of the demonstrations"
        handles += twin.plot(*mu, color=RED, linestyle="--", label=label)
        twin.set_ylim(-0.03, 1.03)
        in_unit_range = (rewards >= 0) & (rewards <= 1)
        if len(rewards) and in_unit_range.all():
            ax.set_ylim(-0.03, 1.03)
        twin.set_ylabel("mu")
        twin.spines["right"].set_visible(True)
        twin.grid(False)
    ax.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
    )


def draw_accuracy(ax, accuracy: Series, error: Series) -> None:
    """The curve with its first and last value written beside it."""
    ax.set_ylabel("held-out accuracy")
    x, y = accuracy
    if not len(x):
        missing = "no evaluations in this run"
        ax.text(0.5, 0.5, missing, transform=ax.transAxes, ha="center", color="0.4")
        return
    ax.plot(x, y, color=BLUE, marker="o", markersize=4)
    error_x, errors = error
    if len(error_x) == len(x):
        low = y - errors
        high = y + errors
        ax.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
    write_value(ax, x[0], y[0], "left")
    if len(x) > 1:
        write_value(ax, x[-1], y[-1], "right")
    accuracy_axis(ax, y)


def write_value(ax, x: float, y: float, align: str) -> None:
    """Above the point (x, y)."""
    ax.annotate(
        f"{y:.1%}",
        (x, y),
        xytext=(0, 9),
        textcoords="offset points",
        ha=align,
        color=BLUE,
        weight="bold",
    )


def percent(value: float, _) -> str:
    return f"{value:.0%}"


def accuracy_axis(ax, accuracies: Iterable[float]) -> None:
    """From 0 to a round tenth above the largest: an axis that neither cuts nor flatters."""
    top = np.ceil(max(accuracies) * 10 + 1) / 10
    ax.set_ylim(0.0, min(1.12, top))
    ax.yaxis.set_major_formatter(percent)


def plot_runs(
    runs: Mapping[str, Sequence[str | Path]], out_png: str | Path, title: str = ""
) -> None:
    """Held-out accuracy over steps of several methods: {label: run folders, one per seed}.

    The line is the mean, the band the smallest and largest seed. Only steps that every seed of a
    label evaluated are shown. Raises ConfigError as `plot_run` does.
    """
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    if not 0 < len(runs) <= len(STYLES):
        raise ConfigError(
            f"plot: {len(runs)} methods to compare, expected 1 to {len(STYLES)}: more lines "
            "cannot be told apart; make two pictures"
        )
    everything: list[float] = []
    for (label, folders), (color, dash) in zip(runs.items(), STYLES, strict=False):
        x, values = common_accuracies(label, folders)
        everything.extend(values.ravel())
        mean = values.mean(0)
        if len(folders) > 1:
            label = f"{label} ({len(folders)} seeds)"
        label = f"{label}: {mean[-1]:.1%}"
        ax.plot(x, mean, color=color, linestyle=dash, label=label)
        worst = values.min(0)
        best = values.max(0)
        ax.fill_between(x, worst, best, color=color, alpha=0.15, linewidth=0)
    accuracy_axis(ax, everything)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("held-out accuracy")
    ax.set_title(title, loc="left", weight="bold")
    ax.legend(loc="best", frameon=False)
    fig.savefig(out_png, dpi=150)
    plt.close(fig)


def common_accuracies(label: str, folders: Sequence[str | Path]) -> tuple[list[float], np.ndarray]:
    """(the steps that every seed evaluated, accuracies [seeds, steps])"""
    curves = [accuracy_by_step(folder) for folder in folders]
    steps = set(curves[0])
    for curve in curves:
        steps.intersection_update(curve)
    if not steps:
        names = ", ".join(map(str, folders))
        raise ConfigError(
            f"plot: the runs of {label!r} ({names}) have no evaluated step in common; evaluate "
            "them at the same steps"
        )
    x = sorted(steps)
    rows = []
    for curve in curves:
        rows.append([curve[step] for step in x])
    return x, np.array(rows)


def accuracy_by_step(run_dir: str | Path) -> dict[float, float]:
    _, evaluations = read_metrics(run_dir)
    steps, accuracies = series(evaluations, "eval/accuracy")
    return dict(zip(steps, accuracies, strict=True))


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'tandem-rl[track]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": True,
            "grid.color": "0.9",
            "axes.axisbelow": True,
            "lines.linewidth": 2.0,
        }
    )
    return plt


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def read_metrics(run_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """(lines of steps, lines of evaluations) of a run."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = list(read_jsonl(path, warn))
    if not lines:
        fault = "has no complete line" if path.exists() else "does not exist"
        raise ConfigError(f"plot: {path} {fault}; give the folder of a run")
    steps = []
    evaluations = []
    for line in lines:
        if is_evaluation(line):
            evaluations.append(line)
        else:
            steps.append(line)
    return steps, evaluations


def series(lines: Sequence[Mapping], key: str) -> Series:
    """(steps, values) of the lines that have a number under `key`."""
    steps = []
    values = []
    for line in lines:
        value = line.get(key)
        if value is not None:
            steps.append(line["step"])
            values.append(value)
    return np.array(steps, float), np.array(values, float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the run, at least 5 values."""
    n = max(5, len(values) // 20)
    means = []
    for end in range(1, len(values) + 1):
        start = max(0, end - n)
        means.append(values[start:end].mean())
    return np.array(means)


def minutes_axis(ax, steps: Sequence[Mapping], evaluations: Sequence[Mapping]) -> None:
    """Elapsed minutes on top of a step axis; evaluations and start-up take time too, so minutes are
    not proportional to steps.
    """
    marks = set()
    for line in [*steps, *evaluations]:
        mark = (line["step"], line["seconds"] / 60)
        marks.add(mark)
    if len(marks) < 2:
        return
    from matplotlib import ticker

    x, minutes = np.array(sorted(marks)).T

    def to_minutes(step):
        return np.interp(step, x, minutes)

    def to_steps(minute):
        return np.interp(minute, minutes, x)

    top = ax.secondary_xaxis("top", functions=(to_minutes, to_steps))
    first = minutes[0]
    last = minutes[-1]
    ticks = ticker.MaxNLocator(6).tick_values(first, last)
    top.set_xticks([tick for tick in ticks if first <= tick <= last])
    top.set_xlabel("minutes since the start")
