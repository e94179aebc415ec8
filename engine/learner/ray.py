"""The learner of mode=cluster: one Ray actor per rank, each with a ZeroEngine, placed by
launch/placement.py.

A rank's output goes to RUN_DIR/logs/learner_R.log. Every call has a deadline; a rank that fails or
hangs ends the run with an error that names it and its log.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from tandem.algorithms.registry import configured
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError, EngineDied, SyncError
from tandem.engine.core.loading import UserCode, user_code
from tandem.engine.core.types import Delivery, Row, StepPlan, StepReport
from tandem.engine.learner.inline import deliver
from tandem.engine.model.checkpoint_form import CheckpointForm
from tandem.rollout.vllm.backend import transport

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

    def __init__(self, rank: int, config: Config, model_path: str, run_dir: str, code: UserCode):
        from tandem.engine.core.loading import install
        from tandem.engine.core.process import pin_cores, redirect_output

        install(code)
        if config.cluster.pin_cores:
            pin_cores(config.cluster.threads, config.engine_count + rank)
        redirect_output(log_path(run_dir, rank))
        self.rank, self.config, self.model_path, self.sender = rank, config, model_path, None

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
        engine = ZeroEngine(
            build_policy(self.config, self.model_path),
            learner,
            bucket_mib=self.config.sync.bucket_mib,
        )
        self.learner = LearnerRank(
            self.config, self.model_path, engine, self.rank, cluster.learner_ranks
        )
        if self.config.rollout.backend != "replay":
            import tandem.engine.weights.sender  # noqa: F401  for `connect`: it imports vLLM, which takes seconds, better now than when the engines wait for it

    def call(self, method: str, *arguments):
        """A method of LearnerRank."""
        return getattr(self.learner, method)(*arguments)

    def connect(self, transport: str, handles: list, address: str, port: int) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        from tandem.engine.weights.sender import trainer_engine

        engine = self.learner.engine
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


def actors(config: Config, model_path: str, placement, run_dir: str | Path) -> list:
    """One actor per rank, each in its place and not started."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cluster = config.cluster
    if config.method:
        configured(config.method)  # loads the user's code, so that it is among what travels
    code, folder = user_code(), os.path.abspath(run_dir)

    def place(rank):
        return PlacementGroupSchedulingStrategy(
            placement.group, placement_group_bundle_index=placement.learner_bundle(rank)
        )

    return [
        ray.remote(RankActor)
        .options(
            num_cpus=cluster.learner_cpus,
            num_gpus=cluster.learner_gpus,
            max_restarts=0,
            scheduling_strategy=place(rank),
            runtime_env={"env_vars": dict(placement.learner_env)},
        )
        .remote(rank, config, model_path, folder, code)
        for rank in range(cluster.learner_ranks)
    ]


class RayLearner:
    """All ranks, with the surface of InlineLearner."""

    def __init__(self, config: Config, actors: list, run_dir: Path):
        self.config, self.actors, self.run_dir, self.ranks = config, actors, run_dir, len(actors)
        self.pool, self.synced = None, None

    @classmethod
    def start(cls, config: Config, model_path: str, placement, run_dir: str | Path) -> RayLearner:
        """Start all ranks.

        Raises ConfigError for the user's mistakes, LearnerFailed if a rank is not up within
        cluster.start_timeout.
        """
        timeout = config.cluster.start_timeout
        learner = cls(config, actors(config, model_path, placement, run_dir), Path(run_dir))
        try:
            address, port = learner._gather("free_address", [()], timeout)[0]
            learner._gather(
                "start", [(address, config.cluster.port or port)] * learner.ranks, timeout
            )
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

        refs = [
            getattr(actor, method).remote(*args)
            for actor, args in zip(self.actors, arguments, strict=False)
        ]
        results, failures, waiting, end = {}, {}, list(refs), time.monotonic() + deadline
        while waiting:
            left = max(0.0, end - time.monotonic())
            done, waiting = ray.wait(waiting, timeout=min(left, LOOK_SECONDS))
            stop.check_start()
            if not done and left > LOOK_SECONDS:
                continue
            if not done:
                if failures:
                    break  # the others hang in a collective with the rank that failed
                raise LearnerFailed(
                    f"learner rank(s) {[refs.index(r) for r in waiting]} did not answer "
                    f"`{self._name(method, arguments)}` within {deadline:g} s; "
                    f"see {', '.join(str(log_path(self.run_dir, refs.index(r))) for r in waiting)}"
                )
            for ref in done:
                try:
                    results[ref] = ray.get(ref)
                except ray.exceptions.RayError as error:
                    failures[refs.index(ref)] = getattr(error, "cause", None) or error
                    end = min(end, time.monotonic() + GRACE)
        for kind in (ConfigError, SyncError, EngineDied):
            for cause in failures.values():
                if isinstance(cause, kind):
                    raise cause
        if failures:
            raise LearnerFailed(
                "\n".join(
                    f"learner rank {rank} failed in `{self._name(method, arguments)}`: "
                    f"{type(cause).__name__}: {str(cause).strip()}\n"
                    f"  see {log_path(self.run_dir, rank)}"
                    for rank, cause in sorted(failures.items())
                )
            )
        return [results[ref] for ref in refs]

    @staticmethod
    def _name(method: str, arguments: Sequence[tuple]) -> str:
        return arguments[0][0] if method == "call" else method

    def _all(self, method: str, *arguments, deadline: float = STEP_DEADLINE) -> list:
        return self._gather("call", [(method, *arguments)] * self.ranks, deadline)

    def step(self, plan: StepPlan) -> StepReport:
        """Each rank gets its own micro-batches only; the report is the same from all.

        Raises ConfigError for an objective that cannot be sent.
        """
        try:
            return self._gather(
                "call", [("step", share(plan, rank)) for rank in range(self.ranks)]
            )[0]
        except (ConfigError, EngineDied, LearnerFailed, SyncError):
            raise
        except Exception:
            check_sendable(plan)
            raise

    def logprobs(
        self, rows: Sequence[Row], temperature: float, reference: bool = False
    ) -> list[np.ndarray]:
        """See LearnerRank.logprobs; here complete."""
        return self.streams(rows, temperature, reference)["logp"]

    def streams(
        self, rows: Sequence[Row], temperature: float, reference: bool = False
    ) -> dict[str, list[np.ndarray]]:
        """See LearnerRank.streams; here complete."""
        import ray

        parts = self._all("streams", ray.put(list(rows)), temperature, reference)

        def complete(lists):
            return [
                next(one for one in found if one is not None) for found in zip(*lists, strict=True)
            ]

        return {name: complete([part[name] for part in parts]) for name in parts[0]}

    def set_reference(self) -> None:
        self._all("set_reference")

    def connect(self, pool) -> None:
        """Make the transfer group between the ranks and the engines of the pool, anew after an
        engine was restarted.
        """
        self.pool = pool
        if hasattr(pool, "backends"):  # recorded rollouts: no engine to send to
            return
        address, port = self._gather("free_address", [()])[0]
        self._gather(
            "connect",
            [(transport(self.config), pool.handles, address, port)] * self.ranks,
            self.config.sync.timeout + GRACE,
        )

    def send(self, version: int) -> Delivery:
        """Send the present weights to every engine. Raises SyncError or EngineDied."""
        if hasattr(self.pool, "backends"):
            return deliver([], self.pool.backends, version)
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
    from ray import cloudpickle

    parts = {f"the term {term.name!r}": term for term in plan.terms} | {"its forward": plan.forward}
    for part, value in parts.items():
        try:
            cloudpickle.dumps(value)
        # of any type: objects decide themselves how they are pickled
        except Exception as error:
            raise ConfigError(
                f"{part} of the method cannot be sent to the learner's processes "
                f"({type(error).__name__}: {error}); what it refers to must be "
                "picklable: locks, connections and generators belong into functions, not "
                "into what an objective holds"
            ) from None


def share(plan: StepPlan, rank: int) -> StepPlan:
    """The plan with the micro-batches of one rank only, as LearnerRank.step takes it."""
    return replace(plan, micro_batches=(plan.micro_batches[rank],))


def log_path(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir) / "logs" / f"learner_{rank}.log"
