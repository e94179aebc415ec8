"""A run from its first line to its last: its parts, the loop, and the exit code.

mode=cluster puts vLLM engines and DeepSpeed ranks into Ray actors; mode=inline runs the same loop
with Hugging Face generation and Accelerate in this process, so that `breakpoint()` works anywhere.
"""

from __future__ import annotations

from dataclasses import replace

from tandem.algorithms.base import Batch, Method
from tandem.algorithms.checks.method import check_metrics
from tandem.algorithms.checks.rows import ask_score
from tandem.algorithms.given import Absent, give
from tandem.algorithms.registry import configured
from tandem.engine.config.paths import shown
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.outcomes import EvalResult
from tandem.engine.core.text import brief
from tandem.engine.data.sources import RowError
from tandem.engine.loop import train as loop
from tandem.engine.loop.reporter import Clock, rollout_metrics
from tandem.engine.loop.state import RunState
from tandem.launch.check_config import check_method
from tandem.launch.run import folder as run_folder
from tandem.launch.run.group_check import check_group_size
from tandem.launch.run.start import Training, generation_run, training_run

EXIT_STOPPED = 75  # resumable
EXIT_INTERRUPTED = 130


def train(config: Config, method: Method | None = None) -> int:
    """Run a config to its end, with its own method or with one made in Python.

    Returns the exit code: 0 done, 75 stopped by a signal with a checkpoint to go on from, 130
    stopped by Ctrl-C, with one too. Raises Stopped if a signal came before the loop began, and
    TypeError for what is no Config.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"tandem.train takes a Config, not {brief(config)}; tandem.load(path) makes one"
        )
    if method is not None:
        config = replace(config, method=give(method))
        check_method(config)
    refuse_absent(config)
    warning = check_group_size(config)
    if config.run.rollout_only:
        return generate(config, warning)
    with training_run(config) as training:
        components, state = training.components, training.state
        display = components.display
        if warning:
            display.message(f"warning: {warning}")
        try:
            stop.hold()
            loop.train(components, state)
        except RowError:  # of rows without an end: the steps so far are not lost
            if state.step:
                save_newest(training)
            raise
        except stop.Stopped:
            display.message(f"{stop.requested()}: left what was begun, a resumed run does it anew")
        display.in_loop = False
        name = stop.requested()
        if name:
            save_newest(training)
            display.message(
                f"stopped by {name} after {state.step} steps; go on with run.resume=true"
            )
            return EXIT_INTERRUPTED if name == "SIGINT" else EXIT_STOPPED
        if state.stopped:
            display.message(f"the method ended the run after {state.step} steps: {state.stopped}")
        if config.run.save_model:
            with run_folder.replaced_model(training.folder) as folder:
                components.learner.export(folder)
        summary(training)
    return 0


def refuse_absent(config: Config) -> None:
    """Raise ConfigError for a config whose method was made in another process."""
    if isinstance(configured(config.method), Absent):
        raise ConfigError(
            f"method {config.method['name']!r} was made in Python, and is not there in this "
            "process; go on with tandem.train(config, method=...)"
        )


def save_newest(training: Training) -> None:
    """Write a checkpoint, unless the newest one is of this step."""
    saver = training.components.saver
    if saver.saved_at != training.state.step:
        saver.save(training.state)


def generate(config: Config, warning: str | None) -> int:
    """Generate and score, write rollouts.jsonl, train nothing."""
    with generation_run(config) as generation:
        if warning:
            generation.display.message(f"warning: {warning}")
        state = RunState()
        for step in range(config.run.steps):
            clock = Clock()
            generation.producer.request_ahead(step, {})
            rollouts = generation.producer.collect(step)
            demand = rollouts.demand
            if demand.ends_before:
                generation.display.message(f"the method ended the run: {demand.stop}")
                break
            # no demonstrations are drawn: nothing is trained on
            batch = Batch(step, rollouts.groups, (), budget=generation.producer.budget)
            groups = ask_score(generation.method, batch).groups
            clock.lap("rollout")
            metrics = {**rollout_metrics(groups), **state.metrics()}
            of_method = check_metrics(generation.method, generation.method.metrics(step))
            generation.reporter.step(step, groups, metrics, of_method, clock)
            if demand.stop:
                generation.display.message(f"the method ended the run: {demand.stop}")
                break
    return 0


def summary(training: Training) -> None:
    components = training.components
    display, evaluator = components.display, components.evaluator
    if evaluator.first is not None and evaluator.last is not None:
        display.message(
            f"held-out accuracy   before {accuracy(evaluator.first)}   after "
            f"{accuracy(evaluator.last)}   ({evaluator.last.describe()})"
        )
    if components.config.run.save_model:
        display.message(f"model               {shown(components.folder / 'model')}")
    display.message(f"run folder          {shown(components.folder)}")


def accuracy(result: EvalResult) -> str:
    return f"{result.accuracy:.3f} +- {result.standard_error:.3f}"
