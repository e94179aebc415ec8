"""DeepSpeed learners, 1 and 2 ranks, ZeRO 0-3, with and without optimizer offload, float32 and
bfloat16: real process groups, one per stage and size.
"""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_cases import (
    CLIP,
    SEEDS,
    SPEC,
    TERMS,
    equal,
    hook_plan,
    make_plan,
    make_policy,
    make_rows,
    only,
    plain_gradient,
    weights,
)

from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.rank import LearnerRank

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=2))


@pytest.fixture(scope="module")
def expected(model_path):
    """{term: (gradient, loss)} of plain PyTorch in this process."""
    return {
        name: plain_gradient(
            model_path, make_rows(count=17), TERMS if name == "all" else only(name)
        )
        for name in ("policy", "sft", "kl", "value", "all")
    }


def free_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_workers(stage, ranks, model_path, folder):
    """{case: [result of each rank]} of zero_worker.py; fails with the log of a rank that failed."""
    script, port = Path(__file__).with_name("zero_worker.py"), str(free_port())
    env = {
        **os.environ,
        "PYTHONPATH": str(script.parents[1] / "support"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                str(rank),
                str(ranks),
                port,
                str(stage),
                model_path,
                str(folder),
            ],
            env=env,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for worker, log in zip(workers, logs, strict=True):
            assert worker.wait(timeout=200) == 0, (
                f"stage {stage}, {log.name}:\n{log.read_text()[-3000:]}"
            )
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    cases = ("plain", "offload", "bfloat16") if stage else ("plain", "bfloat16")
    return {
        case: [
            torch.load(folder / f"{case}_rank{rank}.pt", weights_only=False)
            for rank in range(ranks)
        ]
        for case in cases
    }


@pytest.fixture(
    scope="module",
    params=[(stage, ranks) for stage in STAGES for ranks in (1, 2)],
    ids=lambda p: f"zero{p[0]}-{p[1]}ranks",
)
def results(request, model_path, tmp_path_factory):
    stage, ranks = request.param
    return (
        stage,
        ranks,
        run_workers(stage, ranks, model_path, tmp_path_factory.mktemp(f"zero{stage}_{ranks}")),
    )


def test_gradient_equals_plain_pytorch_for_every_term_and_split(results, expected):
    """Section 0.6 (I-0a) of the methods dossier: unequal micro-batches, ZeRO 1 to 3, offload, one
    and two ranks.
    """
    _stage, _ranks, cases = results
    for case, outs in cases.items():
        for out in outs if case != "bfloat16" else ():
            assert {count for _, count in out["gradients"]} == {1, 3, 8}
            for (name, count), (gradient, metrics) in out["gradients"].items():
                right, loss = expected[name]
                size = float(torch.stack([g.norm() for g in right.values()]).norm())
                assert gradient.keys() == right.keys()
                for key in right:
                    assert torch.allclose(gradient[key], right[key], rtol=1e-5, atol=1e-6 * size), (
                        case,
                        name,
                        count,
                        key,
                    )
                assert metrics["grad_norm"] == pytest.approx(size, rel=1e-5), (case, name, count)
                assert metrics["loss"] == pytest.approx(loss, rel=1e-5), (case, name, count)


@pytest.mark.parametrize("name", ["ift", "carft", "measured", "pairs"])
def test_a_forward_of_the_methods_own_gives_the_same_step_at_every_stage(results, model_path, name):
    _stage, _ranks, cases = results
    right = local(model_path).step(hook_plan(name)).metrics
    own = {
        "ift": "ift/guessed",
        "carft": "contrast/similarity",
        "measured": "loss/sft",
        "pairs": "pairs/margin",
    }
    assert right["grad_norm"] > 0 and own[name] in right
    for case in cases.keys() - {"bfloat16"}:
        for out in cases[case]:
            for key in right.keys() - {
                "seconds/gradient",
                "seconds/optimizer",
                "tokens/padded",
                "gap/max",
                "gap/mean",
            }:
                assert out["hooks"][name][key] == pytest.approx(right[key], rel=1e-4, abs=1e-5), (
                    case,
                    key,
                )


def test_the_stage_is_real(results, model_path):
    """Offload offloads, and stage 3 has partitioned every parameter: else the other tests would
    test nothing.
    """
    stage, _ranks, cases = results
    assert all(
        out["offloaded"] == (case == "offload") for case, outs in cases.items() for out in outs
    )
    assert all(
        (out["local elements"] == 0) == (stage == 3) for outs in cases.values() for out in outs
    )


def test_report_is_that_of_the_global_batch(results, model_path):
    _stage, _ranks, cases = results
    whole = local(model_path).step(make_plan(make_rows(0))).metrics
    for out in cases["plain"]:
        assert out["first"].keys() == whole.keys()
        for key in whole.keys() - {"seconds/gradient", "seconds/optimizer", "tokens/padded"}:
            assert out["first"][key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6), key


def test_several_steps_with_clipping_and_moment_sets_equal_one_process(results, model_path):
    _stage, _ranks, cases = results
    one = local(model_path)
    assert one.step(make_plan(make_rows(0))).metrics["grad_norm"] > CLIP
    one.step(make_plan(make_rows(1), optimizer="sft"))
    for name, seed in SEEDS:
        one.step(make_plan(make_rows(seed), optimizer=name))
    for case in cases.keys() - {"bfloat16"}:
        for key, tensor in weights(one).items():
            assert torch.allclose(cases[case][0]["straight on"][0][key], tensor, atol=2e-5), (
                case,
                key,
            )


def local(model_path):
    config = Config(
        model=ModelConfig(path=model_path),
        learner=LearnerConfig(grad_clip=CLIP, weight_decay=0.1),
    )
    engine = LocalEngine(make_policy(config, model_path), config.learner)
    return LearnerRank(config, model_path, SPEC, engine)


def test_non_finite_gradient_of_one_rank_changes_nothing_on_any(results):
    _stage, _ranks, cases = results
    for case, outs in cases.items():
        for out in outs:
            skipped, norm = out["poisoned"]
            assert skipped and not np.isfinite(norm), case
            assert not equal(out["before"], out["weights after first"]), case
            assert equal(out["weights after first"], out["weights after poisoned"]), case
            assert out["moments after first"][0] and all(
                map(equal, out["moments after first"], out["moments after poisoned"])
            ), case


def test_resume_is_exact(results):
    """Weights, moments of all sets and the random state, in the same engine and in a new one."""
    _stage, _ranks, cases = results
    for case, outs in cases.items():
        for out in outs:
            assert torch.equal(out["noise"], out["noise again"])
            right, moments = out["straight on"]
            for how in ("after load", "after load in a new engine"):
                assert equal(right, out[how][0]), (case, how)
                assert all(map(equal, moments, out[how][1])), (case, how)
        assert all(equal(outs[0]["straight on"][0], out["straight on"][0]) for out in outs), (
            f"{case}: ranks differ"
        )


def test_the_export_of_every_stage_is_the_whole_model(results):
    _stage, _ranks, cases = results
    for case, outs in cases.items():
        right = {
            name: tensor
            for name, tensor in outs[0]["straight on"][0].items()
            if not name.startswith("critic.")
        }
        assert equal(right, outs[0]["exported"]), case


def test_logprobs_and_values_of_all_ranks_together_are_those_of_one_process(results, model_path):
    _stage, _ranks, cases = results
    one = local(model_path)
    one.step(make_plan(make_rows(0)))
    rows = make_rows(5)
    for name, streams in one.compute_streams(rows, 0.8).items():
        for i, (row, right) in enumerate(zip(rows, streams, strict=True)):
            found = [
                out["streams"][name][i]
                for out in cases["plain"]
                if out["streams"][name][i] is not None
            ]
            assert len(found) == 1, "exactly one rank computes a row"
            assert np.array_equal(np.isnan(found[0]), ~row.trained) and np.allclose(
                found[0], right, atol=1e-5, equal_nan=True
            )


def test_offload_that_drops_micro_batches_is_refused(tmp_path):
    """Section 0.2 of the methods dossier.

    The released DeepSpeed bug, made again: gradients reach the offloaded optimizer for the first
    micro-batch only.
    """
    code = """
import sys
from tandem.engine.learner import zero_engine as zero
from tandem.engine.learner.local_engine import join
from tandem.engine.core.errors import ConfigError
join(0, 1, "127.0.0.1", int(sys.argv[1]), 60.0)
zero.check_offload(2)
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Z
whole = Z.async_accumulate_grad_in_cpu_via_gpu
def first_only(self, param):
    return whole(self, param) if self.micro_step_id == 0 else None
Z.async_accumulate_grad_in_cpu_via_gpu = first_only
try:
    zero.check_offload(2)
except ConfigError as error:
    print("REFUSED", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(free_port())],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert (
        "REFUSED learner.offload_optimizer=true with zero_stage=2: DeepSpeed 0." in done.stdout
    ), done.stdout + done.stderr
