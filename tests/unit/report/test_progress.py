"""The progress line shows the loss as long as there is no reward."""

import io

from tandem.engine.report.display import Display


def shown(*steps: dict[str, float], live: bool = False) -> str:
    stream = io.StringIO()
    with Display(len(steps), stream, live=live) as display:
        display.start()
        for step, metrics in enumerate(steps):
            display.step(step, metrics)
        return stream.getvalue()


def test_a_run_without_rollouts_shows_its_loss():
    header, *lines = shown({"loss": 2.5}, {"loss": 1.25}).splitlines()
    assert header.split()[:2] == ["step", "loss"]
    assert [line.split()[:2] for line in lines] == [["1/2", "2.500"], ["2/2", "1.250"]]


def test_once_there_is_a_reward_it_stays_in_its_place():
    """SFT first, RL later; a step without rollouts in between changes no column."""
    steps = [{"loss": 2.5}, {"loss": 0.1, "reward/mean": 0.5}, {"loss": 1.0}]
    text = shown(*steps).splitlines()
    assert [line.split()[1] for line in text] == ["loss", "2.500", "reward", "0.500", "-"]


def test_the_panel_shows_it_too():
    from rich.console import Console

    display = Display(2, io.StringIO(), live=False)
    display.step(0, {"loss": 2.5})
    console = Console(file=io.StringIO(), width=80)
    console.print(display.panel())
    text = console.file.getvalue()
    assert "loss" in text and "2.500" in text and "reward" not in text
