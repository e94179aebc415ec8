"""A run from its first line to its last: its folder, display and components, the loop, and the exit
code.

mode=cluster puts vLLM engines and DeepSpeed ranks into Ray actors; mode=inline runs the same loop
with Hugging Face generation and Accelerate in this process, so that `breakpoint()` works anywhere.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, contextmanager

from tandem.engine.config.paths import shown, shown_code
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.process import redirect_output
from tandem.engine.loop.train import Clock
from tandem.engine.report.display import Display
from tandem.launch.run import folder as run_folder
from tandem.launch.run.components import Run
from tandem.launch.run.group_check import check_group_size


@contextmanager
def started(config: Config):
    """A run with everything up, and its display; run.rollout_only has no learner.

    Start-up noise of other libraries goes to a file; a debugger needs the terminal, so mode=inline
    keeps it.
    """
    from tandem.launch.variables import forget_foreign

    inline = config.mode == "inline"
    with ExitStack() as stack:
        stack.enter_context(stop.handled())
        place = stack.enter_context(run_folder.opened(config))
        log = place.path / "logs" / "driver.log"
        terminal = sys.stdout if inline else stack.enter_context(redirect_output(log)).terminal
        display = stack.enter_context(
            Display(
                config.run.steps,
                terminal,
                title=f"{config.run.name}: {shown_code(config.method['name'])}",
                live=False if inline else None,
            )
        )
        if (dropped := forget_foreign(config)) is not None:
            display.message(dropped)
        run = stack.enter_context(Run(config, display, place))
        for text in place.notes:
            display.message(text)
        run.prepare()
        display.message(f"run folder {shown(run.folder)}")
        began = time.perf_counter()
        run.start()
        display.message(
            f"{'engines' if config.run.rollout_only else 'engines and learner'} up after "
            f"{time.perf_counter() - began:.0f} s"
        )
        yield run


def train(config: Config) -> int:
    """Run a config to its end.

    Returns the exit code: 0 done, 75 stopped by a signal with a checkpoint to go on from, 130
    stopped by Ctrl-C, with one too. Raises Stopped if a signal came before the loop began.
    """
    from tandem.engine.data.sources import RowError
    from tandem.engine.loop import train as loop

    warning = check_group_size(config)
    with started(config) as run:
        if warning:
            run.display.message(f"warning: {warning}")
        if config.run.rollout_only:
            rollout_only(run)
            return 0
        try:
            stop.hold()
            loop.train(run)
        except RowError:  # of rows without an end: the steps so far are not lost
            if run.step and run.saved_at != run.step:
                run.checkpoint()
            raise
        except stop.Stopped:
            run.display.message(
                f"{run.stop_requested}: left what was begun, a resumed run does it anew"
            )
        run.display.in_loop = False
        if run.stop_requested:
            if run.saved_at != run.step:
                run.checkpoint()
            run.display.message(
                f"stopped by {run.stop_requested} after {run.step} steps; go on with "
                "run.resume=true"
            )
            return 130 if run.stop_requested == "SIGINT" else 75
        if config.run.save_model:
            with run_folder.replaced_model(run.place) as folder:
                run.learner.export(folder)
        summary(run)
    return 0


def rollout_only(run: Run) -> None:
    """Generate and score, write rollouts.jsonl, train nothing."""
    from tandem.engine.loop.train import rollout_metrics

    for step in range(run.config.run.steps):
        clock = Clock()
        run.producer.ensure(step, {})
        demand, groups = run.producer.take(step)
        clock.lap("rollout")
        run.report(step, demand, groups, rollout_metrics(groups), clock)


def summary(run: Run) -> None:
    if run.last_eval is not None:

        def show(r):
            return f"{r.accuracy:.3f} +- {r.standard_error:.3f}"

        run.display.message(
            f"held-out accuracy   before {show(run.first_eval)}   after "
            f"{show(run.last_eval)}   ({run.last_eval.describe()})"
        )
    if run.config.run.save_model:
        run.display.message(f"model               {shown(run.folder / 'model')}")
    run.display.message(f"run folder          {shown(run.folder)}")
