"""Whatever the terminal is or becomes, a run goes on, and its exit code is its own."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest
import yaml
from forked_cases import CONFIG, TERMINALS, fill, run_cases

from tandem.engine.report.display import Display
from tandem.engine.report.terminal import Screen


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{terminal: {code, out, err}} and the folder in which all ran."""
    folder = tmp_path_factory.mktemp("terminals")
    cases = {}
    for name in TERMINALS:
        cases[name] = {"terminal": name, "words": ["train", "c.yaml", f"run.name=caf\u00e9_{name}"]}
    cases["methods"] = {"terminal": "full", "words": ["methods"]}
    return run_cases(folder, cases), folder


@pytest.mark.parametrize("name", TERMINALS)
def test_a_run_on_a_terminal_that_fails(results, name):
    found, folder = results
    assert found[name]["code"] == 0, found[name]
    assert not found[name]["err"]
    run = folder / "runs" / f"caf\u00e9_{name}"
    steps = [
        line for line in (run / "metrics.jsonl").read_text().splitlines() if "reward/mean" in line
    ]
    assert (
        len(steps) == 3
        and (run / "checkpoints" / "step_3").is_dir()
        and (run / "model" / "config.json").exists()
    )
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    lost = [event for event in events if event["kind"] == "display_lost"]
    assert len(lost) == (name in ("closed pipe", "full", "gone"))


def test_an_ascii_terminal_shows_everything_else(results):
    found, _folder = results
    assert (
        "run folder runs/caf?_ascii" in found["ascii"]["out"]
        and "checkpoint of step 3 written" in found["ascii"]["out"]
    )


def test_a_command_whose_output_is_lost_has_failed(results):
    assert results[0]["methods"]["code"] == 1


def test_the_shell_s_own_ways(tmp_path):
    """Real processes: a reader that leaves, and streams that were closed before Python began."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    tandem = f"{sys.executable} -m tandem.launch.cli"
    script = (
        f"( {tandem} train c.yaml run.steps=1 <&- 2>&- ; echo $? > code ) | head -1; {tandem} "
        f"methods >&-; {tandem} methods > /dev/full; echo $?"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.endswith("WORLD_SIZE")
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert (tmp_path / "code").read_text() == "0\n"
    assert done.stdout == "run folder runs/run\n1\n"
    assert done.stderr == "error: standard output could not be written: No space left on device\n"


def show(display: Display) -> None:
    with display:
        display.start()
        for step in range(300):
            display.step(step, {"reward/mean": 0.5, "entropy": float(step)}, {"mu": 0.1})
            display.message(f"message \udcc3 {step}")


@pytest.mark.parametrize("live", [True, False])
def test_the_display_waits_for_nobody(live):
    """A terminal that takes nothing: 300 steps are shown, or not, without waiting for each."""
    master, slave = pty.openpty()
    fill(slave)
    with open(slave, "w", encoding="utf-8", closefd=False) as stream:
        display = Display(300, stream, live=live)
        show(display)
    assert display.lost is None and display.screen.slow
    os.close(master)


@pytest.mark.parametrize("live", [True, False])
def test_the_display_falls_silent_where_the_stream_fails(live):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    display = Display(300, Broken(), live=live)
    show(display)
    assert isinstance(display.lost, OSError)


def test_the_display_falls_silent_where_it_fails_itself():
    display = Display(10, io.StringIO(), live=False)
    display.step(0, {"reward/mean": "not a number"})
    display.message("nothing more")
    assert display.lost is not None


@pytest.mark.parametrize(
    "encoding, shown", [("utf-8", "\u00e9 ?"), ("ascii", "? ?"), ("latin-1", "\u00e9 ?")]
)
def test_what_the_encoding_does_not_know_is_a_question_mark(tmp_path, encoding, shown):
    with open(tmp_path / "out", "w", encoding=encoding) as stream:
        screen = Screen(stream)
        screen.write("\u00e9 \ud800\n")
        screen.finish()
    assert (tmp_path / "out").read_text(encoding=encoding) == shown + "\n"
