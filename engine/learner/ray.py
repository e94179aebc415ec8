"""The learner of mode=cluster: one Ray actor per rank, each with a ZeroEngine, placed by
launch/placement.py.

A rank's output goes to RUN_DIR/logs/learner_R.log. Every call has a deadline; a rank that fails or
hangs ends the run with an error that names it and its log.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.names import POLICY
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError, EngineDied, SyncError
from tandem.engine.core.loading import UserCode, user_code
from tandem.engine.core.outcomes import Delivery
from tandem.engine.core.types import Row, StepPlan, StepReport
from tandem.engine.learner.inline import deliver
from tandem.engine.learner.protocol import PolicySpec, Pool
from tandem.engine.learner.rank import merge_rank_streams
from tandem.engine.model.checkpoint_form import CheckpointForm
from tandem.engine.model.quantities import Quantity
from tandem.engine.weights.transport import transport
from tandem.engine.weights.verify import Synced

# seconds for one optimizer step, forward pass or checkpoint, of whatever size
STEP_DEADLINE = 6 * 3600.0
LOOK_SECONDS = 0.5  # between two looks at whether a signal stops the start
GRACE = 5.0  # seconds that other ranks get to report their side of a failure
CLOSE_SECONDS = 20.0


class LearnerFailed(RuntimeError):
    """A learner rank died, raised or did not answer."""


class RankActor:
    """One rank. Built in two steps: rank 0 must exist before the others can be told where to meet
    it.
    """

    def __init__(
        self,
        rank: int,
        config: Config,
        model_path: str,
        spec: PolicySpec,
        run_dir: str,
        code: UserCode,
        engines: int,  # that it sends weights to
    ):
        from tandem.engine.core.loading import install
        from tandem.engine.core.process import pin_cores, redirect_output

        install(code)
        if config.cluster.pin_cores:
            pin_cores(config.cluster.threads, engines + rank)
        redirect_output(log_path(run_dir, rank))
        self.rank, self.config, self.model_path, self.spec = rank, config, model_path, spec
        self.engines = engines
        self.sender: Any = None  # engine.weights.sender, once connected

    def free_address(self) -> tuple[str, int]:
        """This node's address and a port of it that is free now."""
        import ray

        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        import torch

        from tandem.engine.learner.local_engine import join
        from tandem.engine.learner.rank import LearnerRank, build_policy
        from tandem.engine.learner.zero_engine import ZeroEngine, check_offload

        learner, cluster = self.config.learner, self.config.cluster
        torch.set_num_threads(cluster.threads)
        torch.manual_seed(self.config.run.seed + self.rank)
        join(
            self.rank,
            cluster.learner_ranks,
            address,
            port,
            cluster.start_timeout,
            gpu=cluster.learner_gpus > 0,
        )
        if learner.offload_optimizer:
            check_offload(learner.zero_stage)
        policy = build_policy(self.config, self.model_path, self.spec)
        self.engine = ZeroEngine(policy, learner, bucket_mib=self.config.sync.bucket_mib)
        self.learner = LearnerRank(
            self.config, self.model_path, self.spec, self.engine, self.rank, cluster.learner_ranks
        )
        if self.engines:
            # for `connect`: it imports vLLM, which takes seconds, better now than while the engines
            # wait for it
            import tandem.engine.weights.sender  # noqa: F401

    def call(self, method: str, *arguments):
        """A method of LearnerRank."""
        return getattr(self.learner, method)(*arguments)

    def connect(self, transport: str, handles: list, address: str, port: int) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        from tandem.engine.weights.sender import trainer_engine

        engine = self.engine
        form = CheckpointForm(engine.module.model, engine.parameter_shapes())

        class FullWeights(WeightSource):
            """Full tensors as the checkpoint has them, whatever the ZeRO stage."""

            def metadata(self):
                return [ParamMeta(name, dtype, shape) for name, dtype, shape in form.shapes]

            def __iter__(self):
                return form.apply(engine.full_parameters())

        if self.sender is not None:
            self.sender.close()
        self.sender = trainer_engine(
            transport, self.rank, handles, FullWeights(), address, port, self.config.sync
        )

    def send(self, version: int) -> Delivery:
        done = self.sender.send(version)
        return Delivery(done.sent, done.installed, done.bytes)


def actors(
    config: Config, model_path: str, spec: PolicySpec, placement, run_dir: str | Path
) -> list:
    """One actor per rank, each on its bundle and not started."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cluster = config.cluster
    code, folder = user_code(), os.path.abspath(run_dir)
    found = []
    for rank in range(cluster.learner_ranks):
        bundle = PlacementGroupSchedulingStrategy(
            placement.group, placement_group_bundle_index=placement.learner_bundle(rank)
        )
        actor = ray.remote(RankActor).options(
            num_cpus=cluster.learner_cpus,
            num_gpus=cluster.learner_gpus,
            max_restarts=0,
            scheduling_strategy=bundle,
            runtime_env={"env_vars": dict(placement.learner_env)},
        )
        engines = placement.reservation.engines
        found.append(actor.remote(rank, config, model_path, spec, folder, code, engines))
    return found


class RayLearner:
    """All ranks, with the surface of InlineLearner."""

    def __init__(self, config: Config, actors: list, run_dir: Path):
        self.config, self.actors, self.run_dir = config, actors, run_dir
        self.ranks = len(actors)
        self.shares_prompts = False
        self.pool: Pool | None = None
        self.synced: Synced | None = None

    @classmethod
    def start(
        cls, config: Config, model_path: str, spec: PolicySpec, placement, run_dir: str | Path
    ) -> RayLearner:
        """Start all ranks, with the user's code that is loaded by now.

        Raises ConfigError for the user's mistakes, LearnerFailed if a rank is not up within
        cluster.start_timeout.
        """
        timeout = config.cluster.start_timeout
        ranks = actors(config, model_path, spec, placement, run_dir)
        learner = cls(config, ranks, Path(run_dir))
        try:
            address, port = learner._gather("free_address", [()], timeout)[0]
            meeting = (address, config.cluster.port or port)
            learner._gather("start", [meeting] * learner.ranks, timeout)
            learner.shares_prompts = all(learner._all("shares_prompts"))
        except BaseException as error:
            learner.close(0 if isinstance(error, stop.Stopped) else CLOSE_SECONDS)
            raise
        return learner

    def _gather(
        self, method: str, arguments: Sequence[tuple], deadline: float = STEP_DEADLINE
    ) -> list:
        """method(*arguments[r]) on rank r, for as many ranks as there are arguments.

        Raises what the user or the rollout pool must hear, else LearnerFailed.
        """
        import ray
        from ray.exceptions import RayError

        name = arguments[0][0] if method == "call" else method
        refs = []
        for actor, args in zip(self.actors, arguments, strict=False):
            refs.append(getattr(actor, method).remote(*args))
        results, failures = {}, {}
        waiting = list(refs)
        end = time.monotonic() + deadline
        while waiting:
            left = max(0.0, end - time.monotonic())
            done, waiting = ray.wait(waiting, timeout=min(left, LOOK_SECONDS))
            stop.check_start()
            if not done and left > LOOK_SECONDS:
                continue
            if not done:
                if failures:
                    break  # the others hang in a collective with the rank that failed
                silent = [refs.index(ref) for ref in waiting]
                logs = ", ".join(str(log_path(self.run_dir, rank)) for rank in silent)
                raise LearnerFailed(
                    f"learner rank(s) {silent} did not answer `{name}` within {deadline:g} s; "
                    f"see {logs}"
                )
            for ref in done:
                try:
                    results[ref] = ray.get(ref)
                except RayError as error:
                    failures[refs.index(ref)] = getattr(error, "cause", None) or error
                    end = min(end, time.monotonic() + GRACE)
        self._raise_failures(name, failures)
        return [results[ref] for ref in refs]

    def _raise_failures(self, name: str, failures: Mapping[int, BaseException]) -> None:
        """`failures` of a call: {rank: what it raised}."""
        for kind in (ConfigError, SyncError, EngineDied):
            for cause in failures.values():
                if isinstance(cause, kind):
                    raise cause
        if not failures:
            return
        lines = []
        for rank, cause in sorted(failures.items()):
            lines.append(
                f"learner rank {rank} failed in `{name}`: {type(cause).__name__}: "
                f"{str(cause).strip()}\n  see {log_path(self.run_dir, rank)}"
            )
        raise LearnerFailed("\n".join(lines))

    def _all(self, method: str, *arguments, deadline: float = STEP_DEADLINE) -> list:
        """A method of LearnerRank, with the same arguments on all ranks."""
        return self._gather("call", [(method, *arguments)] * self.ranks, deadline)

    def step(self, plan: StepPlan) -> StepReport:
        """Each rank gets its own micro-batches only; the report is the same from all.

        Raises ConfigError for an objective that cannot be sent.
        """
        calls = [("step", plan_of_rank(plan, rank)) for rank in range(self.ranks)]
        try:
            return self._gather("call", calls)[0]
        except (ConfigError, EngineDied, LearnerFailed, SyncError):
            raise
        except Exception:
            check_sendable(plan)
            raise

    def logprobs(
        self, rows: Sequence[Row], temperature: float, model: str = POLICY
    ) -> list[np.ndarray]:
        """The log-probs of `compute_streams`."""
        return self.compute_streams(rows, temperature, model)["logp"]

    def compute_streams(
        self,
        rows: Sequence[Row],
        temperature: float,
        model: str = POLICY,
        quantities: Mapping[str, Quantity] | None = None,
    ) -> dict[str, list[np.ndarray]]:
        """See LearnerRank.compute_streams; here complete."""
        import ray

        return merge_rank_streams(
            self._all("compute_streams", ray.put(list(rows)), temperature, model, quantities)
        )

    def set_reference(self) -> None:
        self._all("set_reference")

    def connect(self, pool: Pool) -> None:
        """Make the transfer group between the ranks and the engines of the pool, anew after an
        engine was restarted.
        """
        self.pool = pool
        if self.config.rollout.backend == "replay":  # no engine to send to
            return
        address, port = self._gather("free_address", [()])[0]
        group = (transport(self.config), pool.handles, address, port)
        self._gather("connect", [group] * self.ranks, self.config.sync.timeout + GRACE)

    def send(self, version: int) -> Delivery:
        """Send the present weights to every engine. Raises SyncError or EngineDied."""
        assert self.pool is not None, "connect comes first"
        if self.config.rollout.backend == "replay":
            return deliver([], self.pool, version)
        return self._gather("send", [(version,)] * self.ranks, self.config.sync.timeout + GRACE)[0]

    def save(self, folder: str | Path) -> None:
        self._all("save", str(Path(folder).absolute()))

    def load(self, folder: str | Path) -> None:
        self._all("load", str(Path(folder).absolute()))

    def export(self, folder: str | Path) -> None:
        self._all("export", str(Path(folder).absolute()))

    def release_memory(self) -> None:
        self._all("release_memory")

    def rss(self) -> list[int]:
        """Bytes of memory per rank."""
        return self._all("rss", deadline=CLOSE_SECONDS)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """End all ranks, by force where they do not end by themselves within `seconds`.

        Idempotent.
        """
        import ray

        if not ray.is_initialized():
            return
        refs = [actor.call.remote("close") for actor in self.actors]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=seconds)
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


def check_sendable(plan: StepPlan) -> None:
    """Raise ConfigError that names the part of a method which cannot be pickled: Ray's own error
    names none.
    """
    from ray.cloudpickle.cloudpickle import dumps

    parts: dict[str, Any] = {f"the term {term.name!r}": term for term in plan.terms}
    parts["its forward"] = plan.forward
    for part, value in parts.items():
        try:
            dumps(value)
        # of any type: objects decide themselves how they are pickled
        except Exception as error:
            raise ConfigError(
                f"{part} of the method cannot be sent to the learner's processes "
                f"({type(error).__name__}: {error}); what it refers to must be "
                "picklable: locks, connections and generators belong into functions, not "
                "into what an objective holds"
            ) from None


def plan_of_rank(plan: StepPlan, rank: int) -> StepPlan:
    """The plan with the micro-batches of one rank only, as LearnerRank.step takes it."""
    return replace(plan, micro_batches=(plan.micro_batches[rank],))


def log_path(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / "logs" / f"learner_{rank}.log"
