"""From a config to the started parts of a run, and to their end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from tandem.algorithms.base import Method
from tandem.engine.config.paths import shown, shown_code
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.process import redirected_output
from tandem.engine.core.types import Sampling
from tandem.engine.learner.protocol import Learner, Pool
from tandem.engine.loop import first_sync
from tandem.engine.loop.evaluation import Evaluator
from tandem.engine.loop.producer import Producer
from tandem.engine.loop.reporter import Reporter
from tandem.engine.loop.saver import Saver
from tandem.engine.loop.scoring import Scorer
from tandem.engine.loop.state import RunState
from tandem.engine.loop.sync import DIED_GENERATING, Sync, restart_dead
from tandem.engine.loop.train import Components
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry
from tandem.launch.run import folder as run_folder
from tandem.launch.run.folder import RunFolder
from tandem.launch.run.prepare import Prepared, prepare
from tandem.launch.run.sides import make_learner, make_pool, start_sides
from tandem.launch.variables import forget_foreign


@dataclass(frozen=True, eq=False, kw_only=True)
class Training:
    """A run that trains, ready for its first step."""

    components: Components
    state: RunState
    folder: RunFolder


@dataclass(frozen=True, eq=False, kw_only=True)
class Generation:
    """A run that trains nothing: it generates, scores and evaluates."""

    method: Method
    producer: Producer
    evaluator: Evaluator
    reporter: Reporter
    display: Display


@contextmanager
def training_run(config: Config) -> Iterator[Training]:
    """A run with engines and learner."""
    with prepared_run(config) as (prepared, stack):
        began = time.perf_counter()
        training = start_training(prepared, stack)
        seconds = time.perf_counter() - began
        sides = "engines and learner" if prepared.generates else "learner"
        prepared.display.message(f"{sides} up after {seconds:.0f} s")
        yield training


@contextmanager
def generation_run(config: Config) -> Iterator[Generation]:
    """A run with engines only."""
    with prepared_run(config) as (prepared, stack):
        began = time.perf_counter()
        generation = start_generation(prepared, stack)
        seconds = time.perf_counter() - began
        prepared.display.message(f"engines up after {seconds:.0f} s")
        yield generation


@contextmanager
def prepared_run(config: Config) -> Iterator[tuple[Prepared, ExitStack]]:
    """A run before anything of it is started: its inputs, folder and display. What is started with
    them goes on the stack, which closes it when the run ends.

    Start-up noise of other libraries goes to a file; a debugger needs the terminal, so mode=inline
    keeps it.
    """
    inline = config.mode == "inline"
    with ExitStack() as outer:
        outer.enter_context(stop.handled())
        folder = outer.enter_context(run_folder.opened(config))
        terminal = sys.stdout
        if not inline:
            log = folder.path / "logs" / "driver.log"
            terminal = outer.enter_context(redirected_output(log))
        title = f"{config.run.name}: {shown_code(config.method['name'])}"
        live = False if inline else None
        display = outer.enter_context(Display(config.run.steps, terminal, title, live=live))
        dropped = forget_foreign(config)
        if dropped is not None:
            display.message(dropped)
        stack = outer.enter_context(closing_stack())
        for text in folder.notes:
            display.message(text)
        prepared = prepare(config, folder, display, stack)
        for text in about_engines(prepared):
            display.message(text)
        display.message(f"run folder {shown(folder.path)}")
        yield prepared, stack


def about_engines(prepared: Prepared) -> Iterator[str]:
    """What is told of a method without rollouts: whether engines start all the same."""
    if prepared.method.uses_rollouts:
        return
    if prepared.generates:
        yield (
            "the method makes no rollouts: engines start for evaluations only "
            "(data.evaluation is set)"
        )
    else:
        yield "no rollout engine starts: the method makes no rollouts, nothing is evaluated"


@contextmanager
def closing_stack() -> Iterator[ExitStack]:
    """A stack that is closed whatever ends the run; only a second Ctrl-C can keep it from that."""
    stack = ExitStack()
    try:
        yield stack
    finally:
        with suppress(stop.Stopped):
            stop.hold()
        stack.close()


def start_training(prepared: Prepared, stack: ExitStack) -> Training:
    """Start engines and learner, go on from the checkpoint if there is one, and give the engines
    the present weights.
    """
    telemetry = start_telemetry(prepared, stack)
    pool: Pool
    learner: Learner
    pool, learner = start_sides(prepared, [make_pool, make_learner], stack)
    state = RunState()
    sync = Sync(
        config=prepared.config,
        state=state,
        learner=learner,
        pool=pool,
        telemetry=telemetry,
        display=prepared.display,
        prompts=prepared.sources.prompts,
    )
    producer = make_producer(prepared, pool, sync.restart_and_sync)
    evaluator = make_evaluator(prepared, pool, telemetry, sync.restart_and_sync)
    saver = Saver(
        run_config=prepared.config.run,
        checkpoints=prepared.checkpoints,
        lock=prepared.folder.lock,
        learner=learner,
        method=prepared.method,
        producer=producer,
        cursors=prepared.sources.cursors(),
        telemetry=telemetry,
        display=prepared.display,
        forget_model=partial(run_folder.forget_model, prepared.folder),
    )
    components = Components(
        config=prepared.config,
        folder=prepared.folder.path,
        method=prepared.method,
        learner=learner,
        producer=producer,
        experts=prepared.sources.experts,
        sync=sync,
        evaluator=evaluator,
        reporter=make_reporter(prepared, pool, producer, telemetry),
        saver=saver,
        display=prepared.display,
    )
    first_sync.prove(sync, prepared.tokenizer)
    if prepared.checkpoint:
        saver.restore(state, prepared.checkpoint.folder)
    sync.publish(state.step)
    producer.resubmit_pending()
    evaluator.restore_history()
    display = prepared.display
    display.done = state.step
    display.first_step = state.step
    display.start()
    return Training(components=components, state=state, folder=prepared.folder)


def start_generation(prepared: Prepared, stack: ExitStack) -> Generation:
    """Start the engines; they have the weights of the model folder."""
    telemetry = start_telemetry(prepared, stack)
    pool: Pool
    (pool,) = start_sides(prepared, [make_pool], stack)

    def restart() -> None:
        restart_dead(pool, DIED_GENERATING, telemetry, prepared.display)

    producer = make_producer(prepared, pool, restart)
    return Generation(
        method=prepared.method,
        producer=producer,
        evaluator=make_evaluator(prepared, pool, telemetry, restart),
        reporter=make_reporter(prepared, pool, producer, telemetry),
        display=prepared.display,
    )


# -- what both kinds of run have


def start_telemetry(prepared: Prepared, stack: ExitStack) -> Telemetry:
    resume_step = prepared.checkpoint.step if prepared.checkpoint else None
    telemetry = Telemetry(
        prepared.config,
        prepared.folder.path,
        resume_step,
        prepared.display.message,
        prepared.folder.run_id,
    )
    stack.callback(telemetry.close)
    telemetry.event("data", **prepared.sources.facts())
    return telemetry


def make_producer(prepared: Prepared, pool: Pool, restart_and_sync: Callable[[], None]) -> Producer:
    config = prepared.config
    rollout = config.rollout
    sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p)
    scorer = Scorer(
        prepared.rewards,
        prepared.decode,
        config.reward.on_error,
        prepared.method.scores_demonstrations,
    )
    return Producer(
        method=prepared.method,
        prompts=prepared.sources.prompts,
        expert_prompts=prepared.sources.expert_prompts,
        pool=pool,
        scorer=scorer,
        budget=prepared.budget,
        sampling=sampling,
        staleness=rollout.staleness,
        over_sample=rollout.over_sample,
        seed=config.run.seed,
        restart_and_sync=restart_and_sync,
    )


def make_evaluator(
    prepared: Prepared,
    pool: Pool,
    telemetry: Telemetry,
    restart_and_sync: Callable[[], None],
) -> Evaluator:
    functions = prepared.config.reward.functions
    return Evaluator(
        config=prepared.config,
        pool=pool,
        rewards=prepared.rewards,
        prompts=prepared.held_out,
        verifier=shown_code(functions[0]) if functions else None,
        decode=prepared.decode,
        restart_and_sync=restart_and_sync,
        telemetry=telemetry,
        display=prepared.display,
    )


def make_reporter(
    prepared: Prepared,
    pool: Pool,
    producer: Producer,
    telemetry: Telemetry,
) -> Reporter:
    return Reporter(
        pool=pool,
        producer=producer,
        telemetry=telemetry,
        display=prepared.display,
        folder=prepared.folder.path,
    )
