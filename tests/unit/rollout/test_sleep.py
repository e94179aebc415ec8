"""Sleeping engines, without a GPU: the order in which vLLM is asked, what an engine refuses while
it sleeps, and when the loop lets engines sleep.

vLLM's object is a recorder here; that its sleep mode does what it says has not been tried on a GPU.
"""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from tandem.algorithms.base import Budget, Demand
from tandem.engine.config.schema import (
    ClusterConfig,
    Config,
    LearnerConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
)
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.outcomes import Delivery, Installed
from tandem.engine.core.types import GenRequest, Prompt, Sampling, StepReport
from tandem.engine.loop import train as loop
from tandem.engine.loop.producer import StepRollouts
from tandem.engine.loop.state import RunState
from tandem.engine.loop.sync import Sync
from tandem.rollout.vllm.arguments import engine_arguments
from tandem.rollout.vllm.backend import VllmBackend

CONFIG = Config(
    rollout=RolloutConfig(sleep=True),
    cluster=ClusterConfig(colocate=True, engine_gpus=0.5, learner_gpus=0.5),
)


class Recorder:
    """AsyncLLM's control calls, in the order they came; `fails` is a call that raises."""

    errored = False

    def __init__(self, fails=None):
        self.calls, self.fails, self.weight_version, self.engine_core = [], fails, "0", self

    def __getattr__(self, name):
        async def call(*args, **kwargs):
            shown = (
                f"{name} {kwargs['tags']}"
                if "tags" in kwargs
                else f"{name} {args[0]}"
                if name == "collective_rpc"
                else name
            )
            self.calls.append(shown)
            if shown == self.fails:
                raise RuntimeError("out of memory")
            if name == "finish_weight_update":
                self.weight_version = kwargs["weight_version"]
            answers = {
                "get_weight_version": self.weight_version,
                "reset_prefix_cache": True,
                "wake_up": kwargs.get("tags") == ["kv_cache"],
                "collective_rpc": [{"w": "1"}]
                if args[:1] in (("tandem_received",), ("tandem_digests",))
                else [[]],
            }
            return answers.get(name)

        return call


def backend(fails=None):
    return VllmBackend(Recorder(fails), CONFIG)


async def update(engine, version):
    await engine.start_weight_update()
    await engine.update_weights({"names": []})
    return await engine.finish_weight_update(version)


REQUEST = GenRequest(0, Prompt("p", np.array([1, 2], np.int32), ""), 1, Sampling(4))


@pytest.mark.whole_run
def test_weights_wake_before_the_update_and_the_kv_cache_after_it():
    engine = backend()
    asyncio.run(engine.sleep())
    asyncio.run(engine.sleep())
    assert engine.llm.calls == ["sleep"], "an engine that sleeps is left alone"
    asyncio.run(update(engine, 1))
    calls = engine.llm.calls[1:]
    order = [
        "wake_up ['weights']",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
        "wake_up ['kv_cache']",
        "resume_generation",
    ]
    assert [call for call in calls if call in order] == order
    assert not engine.asleep and engine.version == 1
    asyncio.run(update(engine, 2))
    assert not [
        call for call in engine.llm.calls[1 + len(calls) :] if call.startswith("wake_up")
    ], "nothing to wake"


def test_an_engine_that_sleeps_refuses_to_generate_until_an_update_has_ended():
    engine = backend()
    asyncio.run(engine.sleep())
    for ask in (engine.generate(REQUEST), engine.active_digest()):
        with pytest.raises(SyncError, match="while it sleeps"):
            asyncio.run(ask)
    asyncio.run(engine.start_weight_update())
    with pytest.raises(SyncError, match="while it sleeps"):
        asyncio.run(engine.generate(REQUEST))
    assert "generate" not in engine.llm.calls
    asyncio.run(engine.finish_weight_update(1))
    assert asyncio.run(engine.active_digest())


@pytest.mark.parametrize("fails", ["wake_up ['weights']", "wake_up ['kv_cache']"])
def test_an_engine_that_does_not_wake_up_never_serves_again(fails):
    engine = backend(fails)
    asyncio.run(engine.sleep())
    with pytest.raises(SyncError, match="out of memory"):
        asyncio.run(update(engine, 1))
    with pytest.raises(EngineDied, match="out of memory"):
        asyncio.run(engine.generate(REQUEST))


def test_sleep_in_the_middle_of_an_update_is_refused():
    engine = backend()
    asyncio.run(engine.start_weight_update())
    with pytest.raises(SyncError, match="in the middle of a weight update"):
        asyncio.run(engine.sleep())


def test_vllm_is_started_with_its_sleep_mode():
    assert (
        engine_arguments("m", CONFIG, 0)["enable_sleep_mode"] is True
        and engine_arguments("m", Config(), 0)["enable_sleep_mode"] is False
    )


class Scripted:
    """Learner, pool, producer and method of a run, recording the order of what is asked of them.

    `demands` are prompts per step, `skipped` the steps without a finite gradient.
    """

    ranks, synced, shares_prompts, forward, aligned = 1, None, False, None, False

    def __init__(self, monkeypatch, demands, skipped=()):
        self.demands, self.skipped, self.log = demands, skipped, []
        config = Config(
            rollout=RolloutConfig(sleep=True),
            learner=LearnerConfig(max_skipped_steps=9),
            sync=SyncConfig(gate_steps=0),
            cluster=CONFIG.cluster,
            run=RunConfig(steps=len(demands)),
        )
        self.state = RunState()
        telemetry = SimpleNamespace(event=lambda kind, **facts: None)
        display = SimpleNamespace(message=lambda text: None)
        self.sync = Sync(
            config=config,
            state=self.state,
            learner=self,
            pool=self,
            telemetry=telemetry,
            display=display,
        )
        nothing = SimpleNamespace(
            step=lambda *args: None,
            skipped=lambda *args: None,
            due=lambda state: False,
        )
        self.components = SimpleNamespace(
            config=config,
            folder=None,
            method=self,
            learner=self,
            producer=self,
            experts={},
            sync=self.sync,
            evaluator=self,
            reporter=nothing,
            saver=nothing,
            display=display,
        )
        monkeypatch.setattr(
            loop,
            "update",
            lambda learner, config, method, work: (
                self.log.append(f"learn {work.step}") or StepReport({}, work.step in self.skipped)
            ),
        )

    budget = Budget(0, 0, 0, 0)

    def missing(self, state):
        return True

    def due(self, state):
        return state.step == len(self.demands)

    def evaluate(self, step):
        self.log.append(f"evaluate {step}")

    def wants_weights(self, step, signals):
        return step < len(self.demands) and self.demands[step] > 0

    def request_ahead(self, step, signals):
        if self.demands[step]:
            self.log.append(f"generate {step}")

    def collect(self, step):
        return StepRollouts(Demand(prompts=self.demands[step]), (), 0)

    def sleep(self):
        self.log.append("sleep")

    def release_memory(self):
        self.log.append("release")

    def connect(self, pool):
        pass

    def send(self, version):
        self.log.append(f"sync {version}")
        self.version = version
        return Delivery(
            {"w": str(version)}, [Installed({"w": str(version)}, version, str(version))], 4
        )

    def rows(self, batch):
        return []

    terms = rows
    metrics = diagnostics = observe = state_dict = signals = probes = lambda self, *args: {}

    def score(self, batch):
        return batch

    def credit(self, rows, batch):
        return rows


@pytest.mark.parametrize(
    "demands, skipped, log",
    [
        (
            [1, 1],
            (),
            (
                "sync 0, evaluate 0, generate 0, sleep, learn 0, release, sync 1, generate 1, "
                "sleep, learn 1, release, sync 2, evaluate 2"
            ),
        ),
        (
            [1, 1],
            (0,),
            (
                "sync 0, evaluate 0, generate 0, sleep, learn 0, release, sync 1, generate 1, "
                "sleep, learn 1, release, sync 2, evaluate 2"
            ),
        ),
        (
            [1, 0, 1],
            (),
            (
                "sync 0, evaluate 0, generate 0, sleep, learn 0, sleep, learn 1, release, sync "
                "2, generate 2, sleep, learn 2, release, sync 3, evaluate 3"
            ),
        ),
    ],
)
def test_engines_sleep_while_the_learner_works_and_get_weights_before_they_generate(
    monkeypatch, demands, skipped, log
):
    rig = Scripted(monkeypatch, demands, skipped)
    rig.sync.publish(0)
    loop.train(rig.components, rig.state)
    assert ", ".join(rig.log) == log


def test_weights_are_sent_to_engines_that_sleep_though_they_have_the_version(monkeypatch):
    rig = Scripted(monkeypatch, [1])
    rig.sync.publish(0)
    rig.sync.sleep()
    rig.sync.publish(0)
    rig.sync.publish(0)
    assert rig.log == ["sync 0", "sleep", "release", "sync 0"]
