"""What a run writes: lines that read as one run across a resume, rollouts that can be trained on
again, output kept apart from the display.
"""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from tandem.engine.config.schema import Config, RunConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import read_jsonl
from tandem.engine.core.types import (
    Finish,
    Prompt,
    RewardError,
    RewardOutcome,
    ScoredGroup,
    Trajectory,
)
from tandem.engine.report import trackers
from tandem.engine.report.cells import clock, number, rate, sparkline
from tandem.engine.report.display import Display
from tandem.engine.report.rollouts import read_rollouts
from tandem.engine.report.telemetry import Telemetry

NAN = float("nan")


def group(ordinal: int, rewards=(0.25, 0.0)) -> ScoredGroup:
    rng = np.random.default_rng(ordinal)
    prompt = Prompt(
        f"p{ordinal}",
        np.array([3, 4], np.int32),
        [{"role": "user", "content": "Größe?"}],
        {"answer": np.int64(7), "when": complex(1, 2)},
        demonstration=np.array([8, 9], np.int32),
    )
    trajectories = tuple(
        Trajectory(
            prompt.id,
            np.array([3, 4, 5, 6, 7], np.int32),
            np.array([0, 0, 3, 1, 1], np.int8),
            Finish.STOP,
            np.array([NAN, NAN, NAN, *-rng.random(2)], np.float32),
            np.array([-1, -1, -1, 2, 3], np.int32),
            ordinal,
        )
        for _ in rewards
    )
    outcomes = (
        RewardOutcome(0.25, {"exact": 0.0, "format": 0.25}),
        RewardOutcome(None, {}, RewardError("timeout", "10 s", "score")),
    )
    return ScoredGroup(
        ordinal, prompt, trajectories, np.array(rewards, np.float32), outcomes, ("a", "b\u2028c")
    )


def write(run_dir, first, last, resume_step=None):
    """Steps first..last-1 of a run with an evaluation before it and after every second step."""
    run = Telemetry(Config(), run_dir, resume_step)
    if first == 0:
        run.evaluation(0, {"accuracy": 0.0})
    for step in range(first, last):
        run.step(step, {"reward/mean": step / 10, "mu": 0.5})
        run.rollouts(step, [group(step)], step)
        if step % 2 == 1:
            run.evaluation(step + 1, {"accuracy": step / 4})
    run.close()


def without_time(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_jsonl(path)]


@pytest.mark.parametrize("torn", [b"", b'{"step":6,"sec'])
def test_a_resumed_run_reads_as_one(tmp_path, torn):
    """Stopped after 7 steps, resumed from the checkpoint of step 4: the files equal those of a run
    that was never stopped.
    """
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write(whole, 0, 8)
    write(resumed, 0, 7)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(resumed / name, "ab") as file:
            file.write(torn)
    write(resumed, 4, 8, resume_step=4)
    assert without_time(resumed / "metrics.jsonl") == without_time(whole / "metrics.jsonl")
    assert (resumed / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    seconds = [line["seconds"] for line in read_jsonl(resumed / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert len(json.loads((resumed / "environment.json").read_text())) == 2


def test_evaluations_made_before_the_checkpoint_are_known_after_a_resume(tmp_path):
    write(tmp_path, 0, 8)
    run = Telemetry(Config(), tmp_path, 4)
    run.close()
    assert run.evaluations == {0: {"accuracy": 0.0}, 2: {"accuracy": 0.25}, 4: {"accuracy": 0.75}}


def test_events_are_history_and_are_not_cut(tmp_path):
    run = Telemetry(Config(), tmp_path)
    run.event("engine_restart", step=9, reason=ValueError("gone"))
    run.close()
    Telemetry(Config(), tmp_path, 0).close()
    first, line, last = read_jsonl(tmp_path / "events.jsonl")
    assert (line["kind"], line["step"], line["reason"]) == ("engine_restart", 9, "gone")
    assert first["kind"] == last["kind"] == "start"


def test_another_run_is_not_overwritten(tmp_path):
    write(tmp_path, 0, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        Telemetry(Config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_lines_are_strict_json_whatever_the_numbers(tmp_path):
    import torch

    run = Telemetry(Config(), tmp_path)
    run.step(
        0,
        {
            "a": NAN,
            "b": float("inf"),
            "c": np.float32(0.1),
            "d": np.int64(3),
            "e": torch.tensor(0.5),
            "f": np.float32("nan"),
            "g": True,
        },
    )
    run.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [line[k] for k in "abcdefg"] == [None, None, 0.1, 3, 0.5, None, True]


def test_rollouts_read_back_as_they_were(tmp_path):
    run = Telemetry(Config(), tmp_path)
    run.rollouts(5, [group(0), group(1)], version=4)
    run.close()
    records = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert [
        (line["step"], line["learner_version"], line["group"], line["sample"])
        for line, _, _ in records
    ] == [(5, 4, 0, 0), (5, 4, 0, 1), (5, 4, 1, 0), (5, 4, 1, 1)]
    expected = group(1)
    line, prompt, found = records[3]
    for name, dtype in (
        ("tokens", np.int32),
        ("source", np.int8),
        ("version", np.int32),
        ("behaviour_logp", np.float32),
    ):
        assert getattr(found, name).dtype == dtype
        assert np.array_equal(
            getattr(found, name),
            getattr(expected.trajectories[1], name),
            equal_nan=name == "behaviour_logp",
        ), name
    assert (found.finish, found.group, found.prompt_id) == (Finish.STOP, 1, "p1")
    assert (
        prompt.tokens.tolist() == [3, 4]
        and prompt.demonstration.tolist() == [8, 9]
        and prompt.content == expected.prompt.content
    )
    assert prompt.columns == {"answer": 7, "when": "(1+2j)"}
    assert line["text"] == "b\u2028c" and line["error"] == {
        "kind": "timeout",
        "message": "10 s",
        "function": "score",
    }
    assert (
        records[2][0]["parts"] == {"exact": 0.0, "format": 0.25} and records[2][0]["reward"] == 0.25
    )


def test_redirected_output_goes_to_the_file_down_to_child_processes(tmp_path):
    code = (
        "import os, sys\n"
        "from tandem.engine.core.process import redirected_output\n"
        "print('before')\n"
        "with redirected_output(sys.argv[1]) as terminal:\n"
        "    print('python'); os.write(1, b'fd 1\\n'); os.write(2, b'fd 2\\n'); "
        "os.system('echo child; echo child error >&2')\n"
        "    print('display', file=terminal)\n"
        "print('after')\n"
        "raise SystemExit('the error')\n"
    )
    log = tmp_path / "logs" / "driver.log"
    done = subprocess.run(
        [sys.executable, "-c", code, str(log)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["before", "display", "after"] and done.stderr == "the error\n"
    assert sorted(log.read_text().splitlines()) == [
        "child",
        "child error",
        "fd 1",
        "fd 2",
        "python",
    ]


@pytest.mark.parametrize(
    "environment, netrc, expected",
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "k"}, "", True),
        ({}, "machine api.wandb.ai login user password k", True),
        ({}, "machine example.org login user password k", False),
        (
            {"WANDB_BASE_URL": "https://example.org"},
            "machine example.org login user password k",
            True,
        ),
    ],
)
def test_wandb_login_is_found_without_asking(tmp_path, monkeypatch, environment, netrc, expected):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trackers.wandb_login() is expected


@pytest.mark.whole_run
def test_trackers_get_the_numbers(tmp_path, monkeypatch):
    """Both for real: W&B offline, since nobody is logged in, and TensorBoard read back by its own
    reader.
    """
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = Telemetry(Config(run=RunConfig(wandb="project", tensorboard=True)), tmp_path)
    run.evaluation(0, {"accuracy": 0.25})
    run.step(0, {"mu": 0.75})
    run.close()
    wandb.teardown()  # its service process would live as long as this one
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for tag in ("eval/accuracy", "mu") for e in board.Scalars(tag)] == [
        (0, 0.25),
        (0, 0.75),
    ]
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"eval/accuracy" in record.read_bytes()


# -- display

METRICS = {
    "reward/mean": 0.5,
    "entropy": 1.25,
    "grad_norm": 123.4,
    "gap/max": 3e-6,
    "rollout/tokens_per_second": 12345.0,
    "rollout/idle": 0.12,
    "learner/tokens_per_second": 812.0,
    "learner/idle": 1.0,
}


def test_plain_lines_are_aligned_and_fit_80_columns():
    stream = io.StringIO()
    with Display(1000, stream) as display:
        # a step without rollouts or evaluation
        display.step(0, {"entropy": NAN})
        display.evaluation(1, 0.375)
        display.step(998, METRICS, {"mu": 0.05})
        display.step(999, METRICS, {"mu": 0.05})
        display.message("a message of its own")
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "a message of its own" and max(map(len, lines)) <= 80
    # the columns changed with mu: a new header
    header, first, second = lines[2:5]
    assert header.split() == [
        "step",
        "reward",
        "held",
        "entropy",
        "mu",
        "roll/s",
        "idle",
        "learn/s",
        "idle",
        "left",
    ]
    assert first.split()[:9] == [
        "999/1000",
        "0.500",
        "0.375",
        "1.250",
        "0.050",
        "12.3k",
        "12%",
        "812",
        "100%",
    ]

    def ends(line):
        return [m.end() for m in re.finditer(r"\S+", line)]

    assert ends(header) == ends(first) == ends(second)
    assert second.split()[0] == "1000/1000" and second.split()[-1] == "0:00"


def test_the_panel_shows_everything_and_gives_the_cursor_back(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Display(200, stream, title="demo") as display:
        display.evaluation(0, 0.1)
        display.evaluation(20, 0.4)
        display.evaluation(40, 0.3)
        display.step(49, METRICS, {"mu": 0.425})
        display.message("checkpoint written")
        raise KeyboardInterrupt
    raw = stream.getvalue()
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is shown again
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw).replace("\r", "\n")
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "demo",
        "step 50/200",
        "0.500",
        "0.300",
        "0.400 after 20 steps",
        "mu 0.425",
        "entropy 1.250",
        "12.3k",
        "12%",
        "812",
        "100%",
        "starting",
        "checkpoint written",
    ):
        assert words in text, words


def test_the_panel_of_a_running_run_does_not_say_that_it_starts_and_takes_no_score():
    with Display(5, Terminal()) as display:
        assert "starting" in rendered(display)
        display.start()
        display.evaluation(1, None)
        display.evaluation(2, float("nan"))
        display.evaluation(3, 0.25)
        assert "starting" not in rendered(display) and "0.250 after 3 steps" in rendered(display)


def rendered(display) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(display.panel())
    return console.file.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_forms():
    assert [number(x) for x in (0.0, 0.12345, 12.3456, 3e-6, 123456.0, NAN, None)] == [
        "0.000",
        "0.123",
        "12.346",
        "3e-06",
        "1.2e+05",
        "-",
        "-",
    ]
    assert [rate(x) for x in (12.0, 12345.0, 2.5e6, None)] == ["12", "12.3k", "2.50M", "-"]
    assert [clock(x) for x in (0, 59.9, 61, 3661, None)] == ["0:00", "0:59", "1:01", "1:01:01", "-"]
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert (
        sparkline([0, 0, 1, 1], 2) == "▁█"
        and sparkline([], 5) == ""
        and sparkline([1, 1], 5) == "▁▁"
        and sparkline([NAN, 1.0, 2.0], 5) == "▁█"
    )
    assert len(sparkline(list(range(1000)), 24)) == 24


# -- pictures


def test_pictures_of_runs(tmp_path):
    pytest.importorskip("matplotlib")
    from tandem.launch.plot import plot_run, plot_runs

    for name in ("a", "b"):
        write(tmp_path / name, 0, 6)
    plot_run(tmp_path / "a", tmp_path / "run.png")
    plot_runs({"A": [tmp_path / "a", tmp_path / "b"], "B": [tmp_path / "b"]}, tmp_path / "runs.png")
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("run.png", "runs.png")
    )
    write(tmp_path / "none in common", 1, 1)
    for wrong in (
        lambda: plot_run(tmp_path / "nowhere", tmp_path / "x.png"),
        lambda: plot_run(tmp_path / "none in common", tmp_path / "x.png"),
        lambda: plot_runs({}, tmp_path / "x.png"),
    ):
        with pytest.raises(ConfigError, match="plot"):
            wrong()
