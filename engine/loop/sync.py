"""New weights for the rollout engines, and the proof that engines and learner compute the same.

What arrived is compared by digest in every transfer (engine/weights/verify.py). This file decides
when weights are sent, what becomes of engines that sleep or die, and how far apart the log-probs of
both sides may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tandem.algorithms.rows import policy_row
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.types import GenRequest, Row, Sampling, Source
from tandem.engine.data.sources import PromptSource
from tandem.engine.learner.protocol import Learner, Pool
from tandem.engine.loop import group_numbers
from tandem.engine.loop.state import RunState
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry
from tandem.engine.weights import verify
from tandem.rollout.backends.replay import RecordedPrompts
from tandem.rollout.no_engines import NoEngines

PROBE_PROMPTS = 4
PROBE_SAMPLES = 2
DIED_GENERATING = "an engine died while it generated"


@dataclass(frozen=True)
class Gap:
    """|rollout log-prob - learner log-prob| over `tokens` tokens."""

    max: float
    mean: float
    tokens: int


@dataclass(eq=False, kw_only=True)
class Sync:
    """Keeps `state.version` and `state.gated` up to date."""

    config: Config
    state: RunState
    learner: Learner
    pool: Pool
    telemetry: Telemetry
    display: Display
    prompts: PromptSource | RecordedPrompts | None = None  # to probe with

    connected: bool = field(default=False, init=False)
    asleep: bool = field(default=False, init=False)  # the engines are: only new weights wake them

    # -- weights

    def publish(self, version: int) -> None:
        """Give all engines the weights of `version` and prove that they have them.

        Nothing to do if they have, and are awake; nor in a run without engines.

        Engines that sleep wake up in it: each has its weights back before the update and its KV
        cache after it (rollout/vllm/backend.py). Engines that die meanwhile are replaced. Raises
        EngineDied if it failed although no engine is dead: the next attempt would fail too.
        """
        if isinstance(self.pool, NoEngines):
            self.state.version = version
            self.asleep = False
            return
        while self.state.version != version or self.asleep:
            try:
                self.send(version)
            except EngineDied as error:
                if not self.restart_dead(str(error)):
                    raise

    def send(self, version: int) -> None:
        if self.asleep:
            self.learner.release_memory()
        if not self.connected:
            self.learner.connect(self.pool)
            self.connected = True
        report = verify.sync(self.learner, version)
        self.telemetry.event("sync", version=version, seconds=report.seconds, bytes=report.bytes)
        if self.config.rollout.staleness and not self.replaying and self.gates_left:
            self.probe(version)
        self.state.version = version
        self.asleep = False

    def sleep(self) -> None:
        """Let the engines give their GPU memory to the learner, until the next weights.

        Every generation (rollouts, evaluation, re-issued requests) comes after `publish`; an engine
        that was asked to generate without it would refuse.
        """
        self.pool.sleep()
        self.asleep = True

    def restart_and_sync(self) -> None:
        """Restart dead engines and give all of them the present weights."""
        self.restart_dead(DIED_GENERATING)
        version = self.state.version
        self.state.version = None
        if version is not None:
            self.publish(version)

    def restart_dead(self, reason: str) -> int:
        """See the function restart_dead; the new ones take weights over a new connection."""
        restarted = restart_dead(self.pool, reason, self.telemetry, self.display)
        self.connected = False
        return restarted

    # -- the gap between engines and learner

    @property
    def replaying(self) -> bool:
        return self.config.rollout.backend == "replay"

    @property
    def off_policy(self) -> bool:
        """Whether rollouts may have been sampled with other weights than they are trained on."""
        return self.config.rollout.staleness > 0 or self.replaying

    @property
    def gates_left(self) -> bool:
        """Whether log-probs are still to be compared before a step trains on them."""
        return self.state.gated < self.config.sync.gate_steps

    def probe(self, version: int) -> None:
        """The gate where rollouts are a step old when they are trained on: sample a few prompts
        now, with the weights the learner has now.
        """
        rollout = self.config.rollout
        sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, seed=version)
        futures = []
        if isinstance(self.prompts, PromptSource):
            count = min(PROBE_PROMPTS, len(self.prompts))
            for i in range(count):
                number = group_numbers.PROBE + i
                request = GenRequest(number, self.prompts[i], PROBE_SAMPLES, sampling)
                futures.append(self.pool.submit(request))
        rows = []
        for future in futures:
            for trajectory in future.result():
                row = policy_row(trajectory, 0.0, "policy")
                rows.append(row)
        self.gate(rows, version, sampling.temperature)

    def gate(self, rows: Sequence[Row], step: int, temperature: float) -> None:
        """Compare the engines' log-probs with the learner's on sampled tokens, before anything is
        trained on them.
        """
        gap = self.gap(rows, step, temperature)
        if gap.tokens:
            self.check_gap(gap, step)
            self.state.gated += 1
            self.telemetry.event(
                "gate", step=step, max_gap=gap.max, mean_gap=gap.mean, tokens=gap.tokens
            )

    def gap(self, rows: Sequence[Row], version: int, temperature: float) -> Gap:
        """Over the tokens of `rows` that were sampled with weight version `version`."""
        logps = self.learner.logprobs(rows, temperature)
        gaps = [np.zeros(0, np.float32)]
        for row, logp in zip(rows, logps, strict=True):
            behaviour_logp = row.streams.get("behaviour_logp")
            if behaviour_logp is None or row.version is None:
                continue  # no engine sampled it
            sampled = row.source == Source.POLICY
            present = row.version == version
            # other tokens have no log-prob of the learner
            comparable = row.trained & sampled & present
            difference = np.abs(logp - behaviour_logp)
            gaps.append(difference[comparable])
        found = np.concatenate(gaps)
        if not len(found):
            return Gap(0.0, 0.0, 0)
        largest = float(found.max())
        mean = float(found.mean())
        return Gap(largest, mean, len(found))

    def check_gap(self, gap: Gap, step: int) -> None:
        """Raise SyncError if rollout and learner disagree more than the config allows.

        NaN is a disagreement.
        """
        if self.config.model.dtype == "float32":
            found = gap.max
            key = "max_gap"
            allowed = self.config.sync.max_gap
        else:
            found = gap.mean
            key = "max_mean_gap"
            allowed = self.config.sync.max_mean_gap
        if not found <= allowed:
            raise SyncError(
                f"step {step}: |rollout log-prob - learner log-prob| is {found:.3g} on "
                "tokens sampled with the present weights, "
                f"sync.{key} allows {allowed:g}. The engines compute with other "
                "weights, or with another model, "
                "temperature or precision, than the learner; `tandem check-logprobs` shows more"
            )

    def check_update(self, metrics: dict[str, float], step: int) -> None:
        """The same for what an update measured itself. One token's rounding may pass the gate's
        bound some day, the mean may not.
        """
        if not self.config.sync.gate_steps or self.replaying:
            return
        if "gap/max" in metrics:
            mean = metrics["gap/mean"]
            self.check_gap(Gap(mean, mean, 0), step)


def restart_dead(pool: Pool, reason: str, telemetry: Telemetry, display: Display) -> int:
    """Start new engines in the place of dead ones; returns how many.

    They refuse to serve until they have taken weights. Raises RolloutPoolExhausted if too many
    died.
    """
    restarted = pool.restart_dead()
    telemetry.event("engines_restarted", count=restarted, reason=reason)
    display.message(f"restarted {restarted} rollout engine(s): {reason}")
    return restarted
