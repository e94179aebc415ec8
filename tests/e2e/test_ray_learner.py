"""The learner of mode=cluster with everything real: two DeepSpeed ranks (ZeRO-3) and a vLLM engine
in Ray actors, weights synced and verified between them.
"""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from learner_cases import CLIP, SPEC, TEMPERATURE, make_plan, make_rows

from tandem.engine.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    SyncConfig,
)
from tandem.engine.core.errors import MethodError, SyncError
from tandem.engine.core.types import GenRequest, Prompt, Row, Sampling, Source
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.weights import verify as weights

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=64, layers=2))


def local(config, model_path):
    engine = LocalEngine(build_policy(config, model_path, SPEC), config.learner)
    return LearnerRank(config, model_path, SPEC, engine)


def sampled_gap(pool, learner, seed):
    """max |rollout log-prob - learner log-prob| on fresh samples."""
    prompt = Prompt("p", np.array([1, 50, 51, 52, 53], np.int32), "")
    trajectories = pool.submit(
        GenRequest(seed, prompt, 4, Sampling(12, TEMPERATURE, seed=seed))
    ).result(timeout=120)
    rows = [
        Row(t.tokens, t.source, {"x": (t.source == Source.POLICY).astype(np.float32)})
        for t in trajectories
    ]
    return max(
        float(np.nanmax(np.abs(logp - t.behaviour_logp)))
        for logp, t in zip(learner.logprobs(rows, TEMPERATURE), trajectories, strict=True)
    ), trajectories


def test_two_ranks_and_an_engine(model_path, tmp_path):
    from tandem.engine.learner.ray import LearnerFailed, RayLearner
    from tandem.launch import placement
    from tandem.rollout.pool import EnginePool

    config = Config(
        model=ModelConfig(path=model_path),
        data=DataConfig(max_prompt_tokens=16),
        rollout=RolloutConfig(max_tokens=16, kv_cache_gib=0.25, max_sequences=8),
        learner=LearnerConfig(grad_clip=CLIP, zero_stage=3),
        sync=SyncConfig(timeout=60.0),
        cluster=ClusterConfig(
            engines=1, learner_ranks=2, engine_cpus=0.5, learner_cpus=0.5, start_timeout=200.0
        ),
    )
    places = placement.start(config, tmp_path)
    try:
        learner = RayLearner.start(config, model_path, SPEC, places, tmp_path)
        pool = EnginePool.start(config, model_path, places, tmp_path)
        try:
            learner.connect(pool)
            report = weights.sync(learner, 0)
            assert (
                report.bytes
                == sum(t.numel() * 4 for _, t in local(config, model_path).engine.full_parameters())
                and report.version == 0
            )
            one = local(config, model_path)
            for step in range(2):
                rows, gap = make_rows(step), sampled_gap(pool, learner, step)[0]
                assert gap < 1e-4
                right, found = (
                    one.step(make_plan(rows)),
                    learner.step(make_plan(rows, ranks=2, learning_rate=1e-3)),
                )
                assert found.metrics["loss"] == pytest.approx(right.metrics["loss"], rel=1e-4)
                assert found.metrics["grad_norm"] == pytest.approx(
                    right.metrics["grad_norm"], rel=1e-4
                )
                assert sampled_gap(pool, learner, step)[0] > 1e-3, (
                    "the engine still has the old weights, and the measure must show it"
                )
                weights.sync(learner, step + 1)
            gap, trajectories = sampled_gap(pool, learner, 9)
            assert gap < 1e-4 and all(
                (t.version[t.source == Source.POLICY] == 2).all() for t in trajectories
            )
            assert all(
                np.allclose(a, b, atol=1e-4, equal_nan=True)
                for a, b in zip(learner.logprobs(rows, 1.0), one.logprobs(rows, 1.0), strict=True)
            )
            assert len(learner.rss()) == 2 and min(learner.rss()) > 50e6
            learner.save(tmp_path / "checkpoint")
            learner.step(make_plan(rows, ranks=2))
            # the engine is asked to confirm weights it was never sent
            with pytest.raises(SyncError, match=r"other bytes|differ"):
                learner.synced = weights.Synced("0" * 32, learner.synced.active_digest)
                learner.load(tmp_path / "checkpoint")
                weights.sync(learner, 3)
            learner.export(tmp_path / "model")
            assert (tmp_path / "model" / "model.safetensors").is_file()

            def column(tokens):
                return -tokens.logp[:, None], {}

            plan = make_plan(rows, ranks=2)
            wrong = replace(
                plan, terms=tuple(replace(term, objective=column) for term in plan.terms)
            )
            with pytest.raises(
                MethodError, match="term 'policy': its objective: its loss has shape"
            ):
                learner.step(wrong)

            os.kill(rank_pid(learner, 1), signal.SIGKILL)
            with pytest.raises(
                LearnerFailed, match=r"learner rank 1 failed in `step`(.|\n)*learner_1\.log"
            ):
                learner.step(make_plan(rows, ranks=2))
        finally:
            learner.close()
            pool.close()
    finally:
        places.close()


def rank_pid(learner, rank):
    import ray

    return ray.get(learner.actors[rank].__ray_call__.remote(lambda actor: os.getpid()), timeout=30)
