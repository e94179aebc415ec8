"""The components of a run, and the few things that the loop asks of them.

The order of a start is cheapest checks first: config, tokenizer, data and rewards are opened and
checked; engines and learner start last, side by side.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem.algorithms.base import Budget, Demand
from tandem.algorithms.checks.method import check_metrics, checked_state
from tandem.algorithms.registry import configured
from tandem.algorithms.rows import policy_row
from tandem.engine.data import templates
from tandem.engine.config.paths import shown_code
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError, EngineDied, SyncError
from tandem.engine.core.types import (
    EvalResult,
    Finish,
    GenRequest,
    Row,
    Sampling,
    ScoredGroup,
    Source,
    StepReport,
)
from tandem.engine.data.decoding import response_text
from tandem.engine.loop import first_sync
from tandem.engine.loop.checkpoint import Checkpoints, RunState, rng_state, set_rng_state
from tandem.engine.loop.evaluation import evaluate
from tandem.engine.loop.producer import Producer
from tandem.engine.loop.train import Clock
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry
from tandem.engine.weights import verify as weights
from tandem.launch.run import folder as run_folder
from tandem.launch.run import resume
from tandem.launch.run.content import contents
from tandem.launch.run.folder import RunFolder

# group ordinals of gate probes; training counts from 0, evaluation from 1 << 40
PROBE_GROUPS = 1 << 41


class Run:
    """The components of one run and the few things the loop asks of them.

    Use as a context manager: leaving it ends every process it started.
    """

    def __init__(self, config: Config, display: Display, place: RunFolder | None = None):
        self.config, self.display, self.stack = config, display, ExitStack()
        self.place = place  # None in tests of single parts
        self.folder = Path(config.run.dir) / config.run.name
        self.step, self.version, self.signals = 0, None, {}
        self.saved_at: int | None = None  # steps done in the newest checkpoint
        self.tokens = 0  # generated + trained so far
        # steps taken with each set of optimizer moments
        self.optimizer_steps: dict[str, int] = {}
        self.gated = 0
        self.learner, self.connected = None, False
        self.told_display = False  # that the terminal is gone
        self.asleep = False  # the engines are: only new weights wake them
        self.first_eval: EvalResult | None = None
        self.last_eval: EvalResult | None = None
        self.evaluated_at, self.pool_stats = -1, {}
        self.replaying = config.rollout.backend == "replay"
        self.off_policy = config.rollout.staleness > 0 or self.replaying

    @property
    def done(self) -> bool:
        """Whether the run has reached its end."""
        cfg = self.config.run
        return self.step >= cfg.steps or (
            cfg.token_budget is not None and self.tokens >= cfg.token_budget
        )

    @property
    def stop_requested(self) -> str:
        """The signal that asked to stop, or ''."""
        return stop.requested()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with suppress(stop.Stopped):
            stop.hold()  # no signal but a second Ctrl-C keeps a process from being ended
        self.stack.close()

    # -- start

    def prepare(self) -> None:
        """Everything that can fail because of the user's input, before anything heavy starts.

        Raises ConfigError.
        """
        from tandem.engine.data.sources import recorded_date
        from tandem.engine.loop.disk import check_room
        from tandem.engine.model.resolve import load_tokenizer, resolve_model
        from tandem.launch.machine import check_model, parameter_count
        from tandem.launch.run.inputs import open_sources
        from tandem.rollout.rewards.answers import check_answers
        from tandem.rollout.rewards.runner import RewardRunner

        cfg = self.config
        self.stack.callback(templates.WORKER.stop)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", cfg.run.keep_checkpoints, self.display.message
        )
        self.found = self.checkpoints.latest() if self.place.resumes else None
        if self.place.resumes and self.found is None:
            raise ConfigError(
                f"{self.checkpoints.folder} holds no complete checkpoint, all there are "
                "damaged (see above); to start from the beginning "
                "choose another run.name, or move that folder away"
            )
        before = None
        if self.found:
            before = resume.facts_before(self.found[1], self.folder)
            resume.check_fixed(cfg, before, self.found[0])
        self.method = configured(cfg.method)
        self.model_path = resolve_model(cfg.model)
        self.tokenizer = load_tokenizer(cfg.model)
        check_model(cfg, self.model_path)
        check_room(cfg, parameter_count(Path(self.model_path)), self.folder, self.display.message)
        if cfg.mode == "cluster":
            from tandem.launch.placement import preflight

            preflight(cfg, self.model_path)
        data = cfg.data
        # templates of a resumed run tell the date on which it first started
        if data.template_date is None and self.found:
            data = replace(data, template_date=recorded_date(RunState.load(self.found[1]).cursors))
        opened = open_sources(cfg, data, self.method, self.tokenizer)
        self.prompts, self.experts, self.aligned = opened.prompts, opened.experts, opened.aligned
        self.compare_with(before)
        held_out = opened.evaluation
        self.eval_prompts = []
        if held_out is not None:
            self.eval_prompts = held_out.take(min(len(held_out), cfg.eval.limit or len(held_out)))
        self.data_facts = opened.facts()
        for line in opened.describe():
            self.display.message(line)
        rewards = cfg.reward if not cfg.run.fake_reward else type(cfg.reward)(functions=("fake",))
        self.verifier = shown_code(rewards.functions[0]) if rewards.functions else None
        self.rewards = None
        if rewards.functions:
            inline = cfg.mode == "inline"
            self.rewards = RewardRunner(
                rewards,
                cfg.run.seed,
                inline=inline,
                log=None if inline else self.folder / "logs" / "rewards.log",
            )
            self.stack.callback(self.rewards.close)
            for prompt in self.eval_prompts[:1]:
                self.rewards.require_columns(prompt.columns)
            if rewards.check_answers:
                for key, rows in (
                    ("data.prompts", self.prompts),
                    ("data.experts", self.aligned),
                    ("data.evaluation", held_out),
                ):
                    check_answers(rewards.functions, rows, key)

    def compare_with(self, before: resume.Facts | None) -> None:
        """Digest what the run reads, for its checkpoints, and compare it with what a resumed run
        read before. Raises ConfigError.
        """
        read = {"data.prompts": self.prompts, "data.experts": self.experts or self.aligned}
        facts = resume.facts_of(self.config, contents(self.config, read, self.model_path))
        self.checkpoints.facts = {"id": self.place.run_id, **asdict(facts)}
        if before is not None:
            for text in resume.check_changes(self.config, before, facts):
                self.display.message(text)

    def start(self) -> None:
        """Start engines and learner, restore the checkpoint if there is one, and give the engines
        the present weights.
        """
        cfg, with_learner = self.config, not self.config.run.rollout_only
        self.telemetry = Telemetry(
            cfg,
            self.folder,
            self.found[0] if self.found else None,
            self.display.message,
            self.place.run_id,
        )
        self.stack.callback(self.telemetry.close)
        self.telemetry.event("data", **self.data_facts)
        if cfg.mode == "inline" or self.replaying:
            from tandem.rollout.local import LocalPool

            def start_pool():
                return LocalPool.start(cfg, self.model_path, self.folder)

        if cfg.mode == "inline":
            from tandem.engine.learner.inline import InlineLearner

            def start_learner():
                return InlineLearner.start(cfg, self.model_path)
        else:
            from tandem.engine.learner.ray import RayLearner
            from tandem.launch import placement

            self.placement = placement.start(cfg, self.folder, self.display.message)
            self.stack.callback(self.placement.close)

            def start_learner():
                return RayLearner.start(cfg, self.model_path, self.placement, self.folder)

            if not self.replaying:
                from tandem.rollout.pool import EnginePool

                def start_pool():
                    return EnginePool.start(cfg, self.model_path, self.placement, self.folder)

        # one after the other: transformers cannot load two models in one process at once, and a
        # vLLM engine measures its GPU while nobody else takes memory of it
        in_turn = cfg.mode == "inline" or (cfg.cluster.colocate and cfg.cluster.engine_gpus > 0)
        starts = {"pool": start_pool}
        if with_learner:
            starts["learner"] = start_learner
        if in_turn:
            for name, start in starts.items():
                self.keep(name, start())
        else:
            self.start_side_by_side(starts)
        if cfg.mode == "inline":
            import torch

            # holds for the thread that calls it, and the loop runs in this one
            torch.set_num_threads(cfg.cluster.threads)
        budget = Budget(
            cfg.rollout.prompts_per_step,
            cfg.rollout.samples_per_prompt,
            cfg.data.experts_per_step,
            cfg.run.steps,
            cfg.run.seed,
        )
        sampling = Sampling(cfg.rollout.max_tokens, cfg.rollout.temperature, cfg.rollout.top_p)
        self.producer = Producer(
            self.method,
            self.prompts,
            self.pool,
            self.rewards,
            self.decode,
            budget,
            sampling,
            cfg.rollout.staleness,
            cfg.reward.on_error,
            cfg.run.seed,
            self.recover,
            self.aligned,
            cfg.rollout.over_sample,
        )
        if not with_learner:
            return
        first_sync.prove(self)
        if self.found:
            self.restore(self.found[1])
        self.sync(self.step)
        self.producer.reissue()
        for done, numbers in sorted(self.telemetry.evaluations.items()):  # those before a resume
            self.last_eval = EvalResult(
                **{key: math.nan if value is None else value for key, value in numbers.items()}
            )
            self.first_eval = self.first_eval or self.last_eval
            self.display.evaluation(done, numbers["accuracy"])
        self.display.done = self.display.first_step = self.step
        self.display.start()

    def start_side_by_side(self, starts: Mapping[str, Callable]) -> None:
        """Each in a thread.

        All are waited for, also when one fails or a signal stops the start, so that none is left
        behind.
        """
        threads = ThreadPoolExecutor(len(starts))
        futures = {name: threads.submit(start) for name, start in starts.items()}
        try:
            wait(futures.values())
        finally:
            threads.shutdown()
            for name, future in futures.items():
                if future.exception() is None:
                    self.keep(name, future.result())
        for future in futures.values():
            future.result()

    def keep(self, name: str, component: Any) -> None:
        """From now on the run has it, and closes it."""
        setattr(self, name, component)
        self.stack.callback(component.close)

    def decode(self, tokens: np.ndarray, finish: Finish = Finish.STOP) -> str:
        return response_text(self.tokenizer, tokens, finish)

    # -- weights

    def sync(self, version: int) -> None:
        """Give all engines the weights of `version` and prove that they have them.

        Nothing to do if they have, and are awake.

        Engines that sleep wake up in it: each has its weights back before the update and its KV
        cache after it (rollout/vllm/backend.py). Engines that die meanwhile are replaced. Raises
        EngineDied if the sync failed although no engine is dead: the next one would fail too.
        """
        while self.version != version or self.asleep:
            try:
                if self.asleep:
                    self.learner.release_memory()
                if not self.connected:
                    self.learner.connect(self.pool)
                    self.connected = True
                report = weights.sync(self.learner, version)
                self.telemetry.event(
                    "sync", version=version, seconds=report.seconds, bytes=report.bytes
                )
                if (
                    self.config.rollout.staleness
                    and not self.replaying
                    and self.gated < self.config.sync.gate_steps
                ):
                    self.probe(version)
                self.version, self.asleep = version, False
            except EngineDied as error:
                if not self.restart(str(error)):
                    raise

    def sleep(self) -> None:
        """Let the engines give their GPU memory to the learner, until the next sync.

        Every generation (rollouts, evaluation, re-issued requests) comes after one; an engine that
        was asked to generate without it would refuse.
        """
        self.pool.sleep()
        self.asleep = True

    def restart(self, reason: str) -> int:
        """Start new engines in the place of dead ones; returns how many.

        They refuse to serve until they have taken weights, over a new connection. Raises
        RolloutPoolExhausted if too many died.
        """
        restarted, self.connected = self.pool.recover(), False
        self.telemetry.event("engines_restarted", count=restarted, reason=reason)
        self.display.message(f"restarted {restarted} rollout engine(s): {reason}")
        return restarted

    def recover(self) -> None:
        """Restart dead engines and give all of them the present weights."""
        self.restart("an engine died while it generated")
        if self.learner is not None:
            version, self.version = self.version, None
            self.sync(version)

    def gap(
        self, rows: Sequence[Row], version: int, temperature: float
    ) -> tuple[float, float, int]:
        """(max, mean, tokens) of |rollout log-prob - learner log-prob| over the tokens of `rows`
        that were sampled with weight version `version`.
        """
        logps = self.learner.logprobs(rows, temperature)
        # others have no log-prob of the learner
        gaps = [
            np.abs(l - r.behaviour_logp)[
                r.trained & (r.source == Source.POLICY) & (r.version == version)
            ]
            for l, r in zip(logps, rows, strict=True)
            if r.behaviour_logp is not None and r.version is not None
        ]
        gaps = np.concatenate([np.zeros(0, np.float32), *gaps])
        return (float(gaps.max()), float(gaps.mean()), len(gaps)) if len(gaps) else (0.0, 0.0, 0)

    def probe(self, version: int) -> None:
        """The gate where rollouts are a step old when they are trained on: sample a few prompts
        now, with the weights the learner has now.
        """
        prompts = (
            [self.prompts[i] for i in range(min(4, len(self.prompts)))] if self.prompts else []
        )
        sampling = Sampling(
            self.config.rollout.max_tokens,
            self.config.rollout.temperature,
            self.config.rollout.top_p,
            seed=version,
        )
        futures = [
            self.pool.submit(GenRequest(PROBE_GROUPS + i, prompt, 2, sampling))
            for i, prompt in enumerate(prompts)
        ]
        self.gate(
            [policy_row(t, 0.0, "policy") for future in futures for t in future.result()],
            version,
            sampling.temperature,
        )

    def gate(self, rows: Sequence[Row], step: int, temperature: float) -> None:
        """Compare the engines' log-probs with the learner's on sampled tokens, before anything is
        trained on them.
        """
        largest, mean, tokens = self.gap(rows, step, temperature)
        if tokens:
            self.check_gap(largest, mean, step)
            self.gated += 1
            self.telemetry.event("gate", step=step, max_gap=largest, mean_gap=mean, tokens=tokens)

    def check_gap(self, largest: float, mean: float, step: int) -> None:
        """Raise SyncError if rollout and learner disagree more than the config allows.

        NaN is a disagreement.
        """
        sync = self.config.sync
        found, key = (
            (largest, "max_gap") if self.config.model.dtype == "float32" else (mean, "max_mean_gap")
        )
        if not found <= getattr(sync, key):
            raise SyncError(
                f"step {step}: |rollout log-prob - learner log-prob| is {found:.3g} on "
                "tokens sampled with the present weights, "
                f"sync.{key} allows {getattr(sync, key):g}. The engines compute with other "
                "weights, or with another model, "
                "temperature or precision, than the learner; `tandem check-logprobs` shows more"
            )

    # -- what the loop asks

    def learning_rate(self, step: int, demand: Demand) -> float:
        """Linear warm-up over the first steps of every set of optimizer moments (fresh moments step
        at full size in every direction), then the schedule.
        """
        cfg = self.config.learner
        base = cfg.learning_rate if demand.learning_rate is None else demand.learning_rate
        taken = self.optimizer_steps.get(demand.optimizer, 0)
        if taken < cfg.warmup_steps:
            base *= (taken + 1) / cfg.warmup_steps
        done = max(0, step - cfg.warmup_steps) / max(1, self.config.run.steps - cfg.warmup_steps)
        return (
            base
            * {
                "constant": 1.0,
                "linear": 1.0 - done,
                "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            }[cfg.schedule]
        )

    def evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(self.eval_prompts) and (self.done or bool(every and step % every == 0))

    def evaluation_missing(self) -> bool:
        """Whether the evaluation before the first step, or that of the checkpoint a resumed run
        begins with, was left or never made.
        """
        due = self.evaluation_due(self.step) if self.step else self.config.eval.before
        return due and self.step not in self.telemetry.evaluations

    def checkpoint_due(self, step: int) -> bool:
        every = self.config.run.checkpoint_every
        return self.done or bool(every and step % every == 0)

    def evaluate(self, step: int) -> None:
        if not self.eval_prompts or self.evaluated_at == step:
            return
        cfg = self.config
        sampling = Sampling(
            cfg.eval.max_tokens or cfg.rollout.max_tokens, cfg.eval.temperature, seed=cfg.run.seed
        )
        with stop.abandonable():
            result = evaluate(
                self.pool,
                self.rewards,
                self.eval_prompts,
                sampling,
                cfg.eval.samples,
                self.verifier,
                self.decode,
                self.recover,
            )
        self.first_eval, self.last_eval, self.evaluated_at = self.first_eval or result, result, step
        self.telemetry.evaluation(step, vars(result))
        self.display.evaluation(step, result.accuracy)
        self.display.message(
            f"held-out accuracy after {step} steps: {result.accuracy:.3f} +- "
            f"{result.standard_error:.3f} ({result.describe()})"
        )

    def report(
        self, step: int, demand: Demand, groups: Sequence[ScoredGroup], metrics, clock: Clock
    ) -> None:
        """One step's numbers to files, trackers and the screen."""
        metrics = {
            **metrics,
            **self.producer.metrics(),
            **clock.metrics(),
            **self.speed(clock, metrics),
            "version": float(self.version or 0),
            "tokens/total": float(self.tokens),
            "cpu_seconds": time.process_time(),
        }
        self.telemetry.step(step, metrics)
        self.telemetry.rollouts(step, groups, step)
        if self.display.lost is not None and not self.told_display:
            self.told_display = True
            self.telemetry.event("display_lost", reason=str(self.display.lost))
        self.display.step(step, metrics, check_metrics(self.method, self.method.metrics(step)))
        if self.config.sync.gate_steps and "gap/max" in metrics and not self.replaying:
            # one token's rounding may pass the gate's bound some day, the mean may not
            self.check_gap(metrics["gap/mean"], metrics["gap/mean"], step)

    def speed(self, clock: Clock, metrics) -> dict[str, float]:
        """Tokens per second of either side while it worked, and the share of the step's wall time
        in which it did not.
        """
        stats, whole, learn = (
            self.pool.stats(),
            max(clock.last - clock.start, 1e-9),
            clock.seconds.get("learn", 0.0),
        )
        busy, tokens = (
            stats[k] - self.pool_stats.get(k, 0.0) for k in ("busy_seconds", "generated_tokens")
        )
        self.pool_stats, engines = stats, max(stats.get("engines", 1.0), 1.0)
        out = {
            "rollout/idle": max(0.0, 1.0 - busy / engines / whole),
            "learner/idle": max(0.0, 1.0 - learn / whole),
        }
        if busy > 0:
            out["rollout/tokens_per_second"] = tokens * engines / busy
        if learn > 0 and "tokens/real" in metrics:
            out["learner/tokens_per_second"] = metrics["tokens/real"] / learn
        return out

    # -- saving

    def checkpoint(self) -> None:
        self.place.lock.check()
        state = RunState(
            step=self.step,
            cursors={name: source.state_dict() for name, source in self.sources().items()},
            producer=self.producer.state_dict(),
            method=checked_state(self.method),
            signals=dict(self.signals),
            gated=self.gated,
            tokens=self.tokens,
            optimizer_steps=dict(self.optimizer_steps),
            rng=rng_state(),
        )
        with self.checkpoints.write(self.step) as folder:
            # to go on exactly: optimizer, master weights, random states
            self.learner.save(folder / "learner")
            # to use: a Hugging Face folder in safetensors
            self.learner.export(folder / "model")
            state.save(folder)
        run_folder.forget_model(self.place)  # of an earlier end, before run.steps was raised
        self.saved_at = self.step
        self.telemetry.event("checkpoint", step=self.step)
        self.display.message(f"checkpoint of step {self.step} written")

    def restore(self, folder: Path) -> None:
        state = RunState.load(folder)
        self.step, self.signals, self.gated, self.tokens, self.optimizer_steps = (
            state.step,
            state.signals,
            state.gated,
            state.tokens,
            state.optimizer_steps,
        )
        self.method.load_state_dict(state.method)
        self.producer.load_state_dict(state.producer)
        for name, source in self.sources().items():
            source.load_state_dict(state.cursors[name])
        set_rng_state(state.rng)
        self.learner.load(folder / "learner")
        self.version = None  # whatever the engines have, it is not the checkpoint
        self.saved_at = state.step
        self.display.message(f"resumed from {folder}: step {state.step} of {self.config.run.steps}")

    def sources(self) -> dict:
        """The data sources that have a cursor."""
        return {
            name: source
            for name, source in (
                ("prompts", self.prompts),
                ("experts", self.experts),
                ("aligned", self.aligned),
            )
            if source is not None
        }

    def dump_step(self, step: int, rows: Sequence[Row], report: StepReport) -> None:
        folder = self.folder / "bad_steps"
        folder.mkdir(exist_ok=True)
        (folder / f"step_{step}.pkl").write_bytes(
            pickle.dumps({"step": step, "rows": list(rows), "metrics": dict(report.metrics)})
        )
        self.telemetry.event("skipped_step", step=step, metrics=dict(report.metrics))
        self.display.message(
            f"step {step}: gradient not finite, weights left alone, rows saved to {folder}"
        )
