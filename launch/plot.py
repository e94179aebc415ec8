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

BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
)
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
    reward, mu = series(steps, "reward/mean"), series(steps, "mu")
    two = len(reward[0]) > 0 or len(mu[0]) > 0
    fig, axes = plt.subplots(
        2 if two else 1,
        1,
        figsize=(7.2, 5.4 if two else 3.8),
        sharex=True,
        height_ratios=(3, 2) if two else (3,),
        squeeze=False,
        layout="constrained",
    )
    top, bottom = axes[0, 0], axes[-1, 0]
    draw_accuracy(
        top, *series(evaluations, "eval/accuracy"), *series(evaluations, "eval/standard_error")
    )
    minutes_axis(top, steps, evaluations)
    fig.suptitle(title or Path(run_dir).name, x=0.02, ha="left", weight="bold")
    bottom.set_xlabel("optimizer step")
    if two:
        draw_training(bottom, reward, mu)
    fig.savefig(out_png, dpi=150)
    plt.close(fig)


def draw_training(ax, reward: Series, mu: Series) -> None:
    """The training reward as it was and smoothed and, if there is one, mu on an axis of its own."""
    ax.plot(*reward, color=GREEN, linewidth=0.8, alpha=0.35)
    mean = smooth(reward[1])
    handles = ax.plot(reward[0], mean, color=GREEN, label="mean reward of rollouts")
    ax.set_ylabel("training reward")
    if len(mu[0]):
        twin = ax.twinx()
        label = "mu: weight of the demonstrations"
        handles += twin.plot(*mu, color=RED, linestyle="--", label=label)
        twin.set_ylim(-0.03, 1.03)
        if len(reward[1]) and reward[1].min() >= 0 and reward[1].max() <= 1:
            ax.set_ylim(-0.03, 1.03)
        twin.set_ylabel("mu")
        twin.spines["right"].set_visible(True)
        twin.grid(False)
    ax.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
    )


def draw_accuracy(
    ax, x: np.ndarray, accuracy: np.ndarray, error_x: np.ndarray, error: np.ndarray
) -> None:
    """The curve with its first and last value written beside it."""
    ax.set_ylabel("held-out accuracy")
    if not len(x):
        ax.text(
            0.5, 0.5, "no evaluations in this run", transform=ax.transAxes, ha="center", color="0.4"
        )
        return
    ax.plot(x, accuracy, color=BLUE, marker="o", markersize=4)
    if len(error_x) == len(x):
        ax.fill_between(x, accuracy - error, accuracy + error, color=BLUE, alpha=0.2, linewidth=0)
    for i, align in ((0, "left"), (-1, "right"))[: len(x)]:
        ax.annotate(
            f"{accuracy[i]:.1%}",
            (x[i], accuracy[i]),
            xytext=(0, 9),
            textcoords="offset points",
            ha=align,
            color=BLUE,
            weight="bold",
        )
    ax.set_ylim(*limits(accuracy))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


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
    everything = []
    for (label, folders), (color, dash) in zip(runs.items(), STYLES, strict=False):
        curves = [accuracy_by_step(folder) for folder in folders]
        x = sorted(set.intersection(*map(set, curves)))
        if not x:
            raise ConfigError(
                f"plot: the runs of {label!r} ({', '.join(map(str, folders))}) have no "
                "evaluated step in common; evaluate them at the same steps"
            )
        values = np.array([[curve[step] for step in x] for curve in curves])
        mean = values.mean(0)
        everything += list(values.ravel())
        seeds = f" ({len(folders)} seeds)" if len(folders) > 1 else ""
        ax.plot(x, mean, color=color, linestyle=dash, label=f"{label}{seeds}: {mean[-1]:.1%}")
        ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    ax.set_ylim(*limits(everything))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("held-out accuracy")
    ax.set_title(title, loc="left", weight="bold")
    ax.legend(loc="best", frameon=False)
    fig.savefig(out_png, dpi=150)
    plt.close(fig)


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
    steps = [line for line in lines if not is_evaluation(line)]
    return steps, [line for line in lines if is_evaluation(line)]


def series(lines: Sequence[Mapping], key: str) -> Series:
    """(steps, values) of the lines that have a number under `key`."""
    found = [line for line in lines if line.get(key) is not None]
    steps = [line["step"] for line in found]
    values = [line[key] for line in found]
    return np.array(steps, float), np.array(values, float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the run, at least 5 values."""
    n = max(5, len(values) // 20)
    means = []
    for end in range(1, len(values) + 1):
        means.append(values[max(0, end - n) : end].mean())
    return np.array(means)


def limits(values: Iterable[float]) -> tuple[float, float]:
    """From 0 to a round tenth above the largest value: an axis that neither cuts nor flatters."""
    return 0.0, min(1.12, np.ceil(max(values) * 10 + 1) / 10)


def minutes_axis(ax, steps: Sequence[Mapping], evaluations: Sequence[Mapping]) -> None:
    """Elapsed minutes on top of a step axis; evaluations and start-up take time too, so minutes are
    not proportional to steps.
    """
    marks = sorted({(line["step"], line["seconds"] / 60) for line in [*steps, *evaluations]})
    if len(marks) < 2:
        return
    from matplotlib import ticker

    x, minutes = np.array(marks).T

    def to_minutes(step):
        return np.interp(step, x, minutes)

    def to_steps(minute):
        return np.interp(minute, minutes, x)

    top = ax.secondary_xaxis("top", functions=(to_minutes, to_steps))
    first, last = minutes[0], minutes[-1]
    ticks = ticker.MaxNLocator(6).tick_values(first, last)
    top.set_xticks([tick for tick in ticks if first <= tick <= last])
    top.set_xlabel("minutes since the start")
