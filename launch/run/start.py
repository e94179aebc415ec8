"""From a config to the started parts of a run, and to their end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from tandem.algorithms.base import Budget, Method
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
from tandem.engine.loop.sync import DIED_GENERATING, Sync, restart_engines
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
def started(config: Config) -> Iterator[Training]:
    """A run with engines and learner."""
    with opened(config) as (run, stack):
        began = time.perf_counter()
        training = start_training(run, stack)
        seconds = time.perf_counter() - began
        sides = "engines and learner" if run.generates else "learner"
        run.display.message(f"{sides} up after {seconds:.0f} s")
        yield training


@contextmanager
def started_generation(config: Config) -> Iterator[Generation]:
    """A run with engines only."""
    with opened(config) as (run, stack):
        began = time.perf_counter()
        generation = start_generation(run, stack)
        run.display.message(f"engines up after {time.perf_counter() - began:.0f} s")
        yield generation


@contextmanager
def opened(config: Config) -> Iterator[tuple[Prepared, ExitStack]]:
    """The inputs of a run, in its folder and behind its display; the stack is for what is started
    with them.

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
        run = prepare(config, folder, display, stack)
        for text in about_engines(run):
            display.message(text)
        display.message(f"run folder {shown(folder.path)}")
        yield run, stack


def about_engines(run: Prepared) -> Iterator[str]:
    """What is told of a method without rollouts: whether engines start all the same."""
    if run.method.uses_rollouts:
        return
    if run.generates:
        yield (
            "the method makes no rollouts: engines start for evaluations only "
            "(data.evaluation is set)"
        )
    else:
        yield "no rollout engine starts: the method makes no rollouts, nothing is evaluated"


@contextmanager
def closing_stack() -> Iterator[ExitStack]:
    """No signal but a second Ctrl-C keeps what is in it from being closed."""
    stack = ExitStack()
    try:
        yield stack
    finally:
        with suppress(stop.Stopped):
            stop.hold()
        stack.close()


def start_training(run: Prepared, stack: ExitStack) -> Training:
    """Start engines and learner, go on from the checkpoint if there is one, and give the engines
    the present weights.
    """
    telemetry = start_telemetry(run, stack)
    pool: Pool
    learner: Learner
    pool, learner = start_sides(run, [make_pool, make_learner], stack)
    state = RunState()
    sync = Sync(
        config=run.config,
        state=state,
        learner=learner,
        pool=pool,
        telemetry=telemetry,
        display=run.display,
        prompts=run.sources.prompts,
    )
    producer = make_producer(run, pool, sync.recover)
    evaluator = make_evaluator(run, pool, telemetry, sync.recover)
    saver = Saver(
        run=run.config.run,
        checkpoints=run.checkpoints,
        lock=run.folder.lock,
        learner=learner,
        method=run.method,
        producer=producer,
        cursors=run.sources.cursors(),
        telemetry=telemetry,
        display=run.display,
        forget_model=partial(run_folder.forget_model, run.folder),
    )
    components = Components(
        config=run.config,
        folder=run.folder.path,
        method=run.method,
        learner=learner,
        producer=producer,
        experts=run.sources.experts,
        sync=sync,
        evaluator=evaluator,
        reporter=make_reporter(run, pool, producer, telemetry),
        saver=saver,
        display=run.display,
    )
    first_sync.prove(sync, run.tokenizer)
    if run.found:
        saver.restore(state, run.found.folder)
    sync.publish(state.step)
    producer.reissue()
    evaluator.recall()
    run.display.done = run.display.first_step = state.step
    run.display.start()
    return Training(components=components, state=state, folder=run.folder)


def start_generation(run: Prepared, stack: ExitStack) -> Generation:
    """Start the engines; they have the weights of the model folder."""
    telemetry = start_telemetry(run, stack)
    pool: Pool
    (pool,) = start_sides(run, [make_pool], stack)

    def recover() -> None:
        restart_engines(pool, DIED_GENERATING, telemetry, run.display)

    producer = make_producer(run, pool, recover)
    return Generation(
        method=run.method,
        producer=producer,
        evaluator=make_evaluator(run, pool, telemetry, recover),
        reporter=make_reporter(run, pool, producer, telemetry),
        display=run.display,
    )


# -- what both kinds of run have


def start_telemetry(run: Prepared, stack: ExitStack) -> Telemetry:
    resume_step = run.found.step if run.found else None
    telemetry = Telemetry(
        run.config, run.folder.path, resume_step, run.display.message, run.folder.run_id
    )
    stack.callback(telemetry.close)
    telemetry.event("data", **run.sources.facts())
    return telemetry


def make_producer(run: Prepared, pool: Pool, recover: Callable[[], None]) -> Producer:
    config, rollout = run.config, run.config.rollout
    scorer = Scorer(
        run.rewards, run.decode, config.reward.on_error, run.method.scores_demonstrations
    )
    budget = Budget(
        prompts=rollout.prompts_per_step,
        samples=rollout.samples_per_prompt,
        experts=config.data.experts_per_step,
        steps=config.run.steps,
        seed=config.run.seed,
        model=run.model_path,
    )
    return Producer(
        method=run.method,
        prompts=run.sources.prompts,
        expert_prompts=run.sources.expert_prompts,
        pool=pool,
        scorer=scorer,
        budget=budget,
        sampling=Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p),
        staleness=rollout.staleness,
        over_sample=rollout.over_sample,
        seed=config.run.seed,
        recover=recover,
    )


def make_evaluator(
    run: Prepared, pool: Pool, telemetry: Telemetry, recover: Callable[[], None]
) -> Evaluator:
    functions = run.config.reward.functions
    return Evaluator(
        config=run.config,
        pool=pool,
        rewards=run.rewards,
        prompts=run.held_out,
        verifier=shown_code(functions[0]) if functions else None,
        decode=run.decode,
        recover=recover,
        telemetry=telemetry,
        display=run.display,
    )


def make_reporter(run: Prepared, pool: Pool, producer: Producer, telemetry: Telemetry) -> Reporter:
    return Reporter(
        pool=pool,
        producer=producer,
        telemetry=telemetry,
        display=run.display,
        folder=run.folder.path,
    )
