"""Weight sync against real backends, and against backends that each have one real fault."""

import asyncio

import numpy as np
import pytest
import torch
from learner_cases import SPEC, make_plan, make_rows

from tandem.engine.config.schema import (
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
)
from tandem.engine.core.errors import SyncError
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Prompt, Row, Sampling, Source
from tandem.engine.learner.inline import InlineLearner
from tandem.engine.weights import verify as weights
from tandem.rollout.backends.hf import HFBackend
from tandem.rollout.local import LocalPool


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=2))


def local(backend):
    return LocalPool(backend, asyncio.new_event_loop())


class Pool:
    """Several backends; LocalPool has one."""

    def __init__(self, backends):
        self.backends = backends

    def install(self, named, version):
        return [found for one in self.backends for found in local(one).install(named, version)]


def start(model_path, *kinds):
    """(learner, pool), connected."""
    config = Config(
        mode="inline",
        model=ModelConfig(path=model_path),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_tokens=8),
        learner=LearnerConfig(),
    )
    learner = InlineLearner.start(config, model_path, SPEC)
    pool = Pool([kind(model_path, config, 0) for kind in kinds])
    learner.connect(pool)
    return learner, pool


def test_engines_compute_with_the_learners_weights(model_path):
    learner, pool = start(model_path, HFBackend, HFBackend)
    weights.sync(learner, 0)
    learner.step(make_plan(make_rows(), learning_rate=0.01))
    report = weights.sync(learner, 1)
    assert (
        report.version == 1
        and report.bytes
        == sum(p.numel() * 4 for p in learner.rank.engine.module.model.parameters())
        and report.seconds > 0
    )
    for backend in pool.backends:
        (t, *_) = asyncio.run(
            backend.generate(
                GenRequest(0, Prompt("p", np.array([1, 50, 51], np.int32), ""), 1, Sampling(8))
            )
        )
        mask = t.source == Source.POLICY
        (logp,) = learner.logprobs([Row(t.tokens, t.source, {"x": mask.astype(np.float32)})], 1.0)
        assert (
            np.allclose(logp[mask], t.behaviour_logp[mask], atol=1e-5)
            and (t.version[mask] == 1).all()
        )


def test_local_pool_and_an_unchanged_learner(model_path):
    learner, pool = start(model_path, HFBackend)
    pool = local(pool.backends[0])
    learner.connect(pool)
    for version in (0, 1, 1):  # nothing was trained: same weights sent, same weights held
        assert weights.sync(learner, version).version == version


class Drops(HFBackend):
    """Loses a parameter on the way, without a word."""

    async def update_weights(self, update_info):
        await super().update_weights({"named": update_info["named"][:-1]})

    async def finish_weight_update(self, version):
        received, self.received, self.version = self.received, None, version
        return Installed(received, version, await self.active_digest())


class Garbles(HFBackend):
    """One bit of one value is wrong."""

    async def update_weights(self, update_info):
        (name, tensor), *rest = update_info["named"]
        tensor = tensor.clone()
        tensor.view(-1).view(torch.int32)[7] ^= 1
        await super().update_weights({"named": [(name, tensor), *rest]})


class Invents(HFBackend):
    async def finish_weight_update(self, version):
        installed = await super().finish_weight_update(version)
        return installed._replace(received=installed.received | {"model.ghost": "0" * 32})


class KeepsOldVersion(HFBackend):
    async def weight_version(self):
        return self.version - 1


class Ignores(HFBackend):
    """Takes and confirms every byte, and goes on with the weights it had: the fault of a tied head
    that is never packed again, but for all weights.
    """

    @torch.no_grad()
    async def update_weights(self, update_info):
        before = {name: p.clone() for name, p in self.parameters.items()}
        await super().update_weights(update_info)
        for name, p in self.parameters.items():
            p.copy_(before[name])


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            Drops,
            (
                r"engine 1 did not receive 1 parameter\(s\) of weights 1: model\.norm\.weight; "
                r"sent 20, received 19"
            ),
        ),
        (
            Garbles,
            (
                r"engine 1 received other bytes than were sent for 1 of 20 parameter\(s\) of "
                r"weights 1: model\.embed_tokens\.weight \(sent \w+, received \w+\)"
            ),
        ),
        (
            Invents,
            (
                r"engine 1 received, without it being sent, 1 parameter\(s\) of weights 1: "
                r"model\.ghost"
            ),
        ),
        (
            KeepsOldVersion,
            (
                r"engine 1 stamps its tokens with weight version 0 after weights 1 were sent, "
                r"expected 1"
            ),
        ),
        (Ignores, r"engines compute with different weights after version 1"),
    ],
)
def test_a_fault_in_one_of_two_engines_is_named(model_path, kind, message):
    learner, _pool = start(model_path, HFBackend, kind)
    learner.step(make_plan(make_rows(), learning_rate=0.01))
    with pytest.raises(SyncError, match=message):
        weights.sync(learner, 1)


def test_engines_that_all_keep_their_old_weights_are_found(model_path):
    """No difference between engines shows it, and every byte was confirmed: only the held digest,
    which did not move, does.
    """
    learner, _pool = start(model_path, Ignores, Ignores)
    weights.sync(learner, 0)
    learner.step(make_plan(make_rows(), learning_rate=0.01))
    with pytest.raises(
        SyncError,
        match=(
            r"weights 1 differ from those sent before, but the weights the engines compute with "
            r"are the same as those before"
        ),
    ):
        weights.sync(learner, 1)


def test_an_engine_whose_weights_change_by_themselves_is_found(model_path):
    learner, pool = start(model_path, HFBackend)
    weights.sync(learner, 0)

    class Decays(HFBackend):
        @torch.no_grad()
        async def active_digest(self):
            self.parameters["model.norm.weight"].mul_(0.5)
            return await super().active_digest()

    pool.backends[0].__class__ = Decays
    with pytest.raises(
        SyncError,
        match=(
            r"weights 1 are the same as those sent before, but the weights the engines compute "
            r"with differ from"
        ),
    ):
        weights.sync(learner, 1)


def test_no_engine_is_an_error(model_path):
    learner, _ = start(model_path, HFBackend)
    pool = Pool([])
    learner.connect(pool)
    with pytest.raises(SyncError, match="no engine"):
        weights.sync(learner, 0)


def test_bfloat16_travels_as_bfloat16(model_path):
    config = Config(
        mode="inline",
        model=ModelConfig(path=model_path, dtype="bfloat16"),
        rollout=RolloutConfig(max_tokens=8),
    )
    learner = InlineLearner.start(config, model_path, SPEC)
    pool = Pool([HFBackend(model_path, config, 0)])
    learner.connect(pool)
    learner.step(make_plan(make_rows(), learning_rate=0.01))
    assert weights.sync(learner, 1).bytes == sum(
        p.numel() * 2 for p in learner.rank.engine.module.model.parameters()
    )
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            learner.rank.engine.module.model.parameters(),
            pool.backends[0].model.parameters(),
            strict=True,
        )
    )
