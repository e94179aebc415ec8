"""The learner in one process: gradients, reports, skipped steps, moment sets and exact resume,
against plain PyTorch.
"""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import (
    SPEC,
    TEMPERATURE,
    TERMS,
    equal,
    make_plan,
    make_policy,
    make_rows,
    only,
    plain_gradient,
    poison,
    siblings,
    weights,
)

from tandem.algorithms.parts.objectives.policy import PPOClip
from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.protocol import PolicySpec
from tandem.engine.learner.rank import LearnerRank
from tandem.engine.model.quantities import Entropy


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=2))


def make_rank(model_path, dtype="float32", **learner):
    config = Config(
        model=ModelConfig(path=model_path, dtype=dtype),
        learner=LearnerConfig(**{"grad_clip": 0.0, **learner}),
    )
    engine = LocalEngine(make_policy(config, model_path), config.learner)
    return LearnerRank(config, model_path, SPEC, engine)


@pytest.mark.parametrize("term", ["policy", "sft", "kl", "value", "all"])
@pytest.mark.parametrize("budget", [10_000, 48, 24])
def test_gradient_of_any_split_is_that_of_the_formula(model_path, term, budget):
    rows, terms = make_rows(), TERMS if term == "all" else only(term)
    expected, loss = plain_gradient(model_path, rows, terms)
    rank = make_rank(model_path)
    captured = {}
    rank.engine.optimizer.register_step_pre_hook(
        lambda *_: captured.update(
            {
                n.removeprefix("model."): p.grad.clone()
                for n, p in rank.engine.module.named_parameters()
            }
        )
    )
    report = rank.step(make_plan(rows, budget=budget, terms=terms))
    assert captured.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(captured[name], expected[name], rtol=1e-5, atol=1e-7), name
    assert report.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert report.metrics["grad_norm"] == pytest.approx(
        float(torch.stack([g.norm() for g in expected.values()]).norm()), rel=1e-5
    )


def test_before_the_first_update_the_policy_is_the_old_one(model_path):
    """Section 0.6 (I-0c) of the methods dossier: ratio 1 for every token, though the log-probs from
    before were computed in other micro-batches.
    """
    rank, rows = make_rank(model_path), make_rows()
    rows = [
        row.with_streams(old_logp=old, advantage=np.abs(row.streams["advantage"]) + 1)
        for row, old in zip(rows, rank.logprobs(rows, TEMPERATURE), strict=True)
    ]
    tight = [replace(TERMS[0], objective=PPOClip(1e-5, 1e-5))]
    found = rank.step(
        make_plan(
            [row for row in rows if "policy" in row.weights], budget=24, terms=[*tight, *TERMS[1:]]
        )
    ).metrics
    assert found["policy/clip_fraction"] == 0 and abs(found["policy/ppo_kl"]) < 1e-6


def test_report_does_not_depend_on_the_split(model_path):
    rows, reports = make_rows(), []
    for budget in (10_000, 24):
        reports.append(make_rank(model_path).step(make_plan(rows, budget=budget)).metrics)
    whole, parts = reports
    assert {
        "policy/clip_fraction",
        "sft/p",
        "kl/kl",
        "entropy",
        "gap/max",
        "gap/mean",
        "loss/policy",
        "value/value",
        "value/clip_fraction",
    } <= whole.keys() and whole.keys() == parts.keys()
    for key in whole.keys() - {"tokens/padded", "seconds/gradient", "seconds/optimizer"}:
        assert parts[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-7), key
    assert whole["tokens/trained"] == sum(row.trained.sum() for row in rows) and whole[
        "tokens/real"
    ] == sum(len(row.tokens) for row in rows)


@pytest.mark.parametrize("budget", [10_000, 60, 24])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_behind_one_copy_of_their_prompt_give_the_same_gradient_and_streams(
    model_path, budget, checkpointing
):
    rows = siblings(make_rows(count=17))
    expected, loss = plain_gradient(model_path, rows, TERMS)
    rank = make_rank(model_path, micro_batch_tokens=budget, gradient_checkpointing=checkpointing)
    alone = make_rank(model_path, micro_batch_tokens=budget)
    alone.shares_prompts = lambda: False
    for name, found in rank.compute_streams(rows, 0.8).items():
        for mine, theirs in zip(found, alone.compute_streams(rows, 0.8)[name], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-6)
    captured = {}
    rank.engine.optimizer.register_step_pre_hook(
        lambda *_: captured.update(
            {
                n.removeprefix("model."): p.grad.clone()
                for n, p in rank.engine.module.named_parameters()
            }
        )
    )
    plan = make_plan(rows, budget=budget, share_prompts=True)
    assert any(micro.prompt_blocks is not None for micro in plan.micro_batches[0])
    report = rank.step(plan)
    for name in expected:
        assert torch.allclose(captured[name], expected[name], rtol=1e-5, atol=1e-7), name
    assert report.metrics["loss"] == pytest.approx(loss, rel=1e-5) and report.metrics[
        "tokens/real"
    ] == sum(len(row.tokens) for row in rows)
    if budget == 10_000:
        assert report.metrics["tokens/padded"] < report.metrics["tokens/real"]


def gradients_before_step(engine):
    """{parameter: gradient}, filled when the engine's optimizer steps."""
    captured = {}

    def note(*_):
        for name, parameter in engine.module.named_parameters():
            captured[name] = parameter.grad.clone()

    engine.optimizer.register_step_pre_hook(note)
    return captured


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradient(model_path):
    """Several shapes, gradient checkpointing, and a pass without gradient."""
    from tandem.engine.learner.rank import build_policy

    results = []
    for compiled in (False, True):
        config = Config(
            model=ModelConfig(path=model_path),
            learner=LearnerConfig(grad_clip=0.0, compile=compiled, gradient_checkpointing=True),
        )
        engine = LocalEngine(build_policy(config, model_path, SPEC), config.learner)
        rank = LearnerRank(config, model_path, SPEC, engine)
        captured = gradients_before_step(rank.engine)
        rank.step(make_plan(make_rows(), budget=24))
        results.append((captured, rank.logprobs(make_rows(count=4), 0.8)))
    (plain, logps), (fused, again) = results
    assert all(torch.allclose(fused[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)
    for a, b in zip(logps, again, strict=True):
        # after one optimizer step each: AdamW's first step has the size of the learning rate
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_activations_that_wait_on_the_cpu_give_the_same_gradient(model_path):
    plain, offloaded = (
        make_rank(model_path, offload_activations=choice) for choice in (False, True)
    )
    saved = []
    hook = torch.autograd.graph.save_on_cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tandem.engine.learner.rank.save_on_cpu",
            lambda pin_memory: saved.append(pin_memory) or hook(pin_memory),
        )
        for rank in (plain, offloaded):
            rank.step(make_plan(make_rows()))
    assert saved and not any(saved)  # nothing to pin without a GPU
    assert equal(weights(plain), weights(offloaded))


def test_liger_that_is_not_installed_is_an_error_that_says_so(model_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match=r"learner.liger is true.*pip install liger-kernel"):
        make_policy(
            Config(model=ModelConfig(path=model_path), learner=LearnerConfig(liger=True)),
            model_path,
        )


def test_compile_without_a_compiler_is_an_error_that_says_so(model_path, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = Config(model=ModelConfig(path=model_path), learner=LearnerConfig(compile=True))
    from tandem.engine.learner.rank import build_policy

    with pytest.raises(ConfigError, match=r"learner.compile is true.*C.. compiler"):
        build_policy(config, model_path, SPEC)


def test_probes_do_not_depend_on_the_packing(model_path):
    """Entropies before the update: those that the update itself measures, row by row too."""
    rank, rows = make_rank(model_path), make_rows(count=9)
    found = rank.compute_streams(rows, 0.8, quantities={"h": Entropy()})
    alone = [rank.compute_streams([row], 0.8, quantities={"h": Entropy()}) for row in rows]
    plain = rank.logprobs(rows, 0.8)
    for i, row in enumerate(rows):
        assert np.isnan(found["h"][i][~row.trained]).all()
        assert (found["h"][i][row.trained] > 3.0).all(), "nearly uniform over 100 tokens"
        np.testing.assert_allclose(found["h"][i], alone[i]["h"][0], rtol=1e-5)
        np.testing.assert_allclose(found["logp"][i], plain[i], rtol=1e-5)


def test_gap_is_measured_on_fresh_sampled_tokens(model_path):
    rank, rows = make_rank(model_path), make_rows(count=4)
    logps = rank.logprobs(rows, 0.8)
    shifted = [
        row.with_streams(behaviour_logp=logp + np.float32(0.25))
        for row, logp in zip(rows, logps, strict=True)
        if "behaviour_logp" in row.streams
    ]
    stale = replace(shifted[0], version=np.full(len(shifted[0].tokens), -1, np.int32))
    stale = stale.with_streams(behaviour_logp=stale.streams["behaviour_logp"] + 5)
    metrics = rank.step(make_plan([*shifted, stale])).metrics
    assert metrics["gap/max"] == pytest.approx(0.25, abs=1e-5) and metrics[
        "gap/mean"
    ] == pytest.approx(0.25, abs=1e-5)


def test_logprobs_come_in_row_order_with_nan_where_untrained(model_path):
    from transformers import AutoModelForCausalLM

    rank, rows = make_rank(model_path), make_rows()
    # a row that trains nothing
    rows.insert(1, replace(rows[0], weights={"sft": np.zeros(len(rows[0].tokens), np.float32)}))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for row, logp in zip(rows, rank.logprobs(rows, 0.7), strict=True):
        tokens = torch.as_tensor(row.tokens, dtype=torch.long)
        with torch.no_grad():
            expected = (
                (model(input_ids=tokens[None]).logits[0, :-1] / 0.7)
                .log_softmax(-1)
                .gather(-1, tokens[1:, None])
                .squeeze(-1)
                .numpy()
            )
        assert logp.dtype == np.float32 and np.array_equal(np.isnan(logp), ~row.trained)
        assert np.allclose(logp[1:][row.trained[1:]], expected[row.trained[1:]], atol=1e-5)


def test_values_are_those_of_the_states_in_which_the_tokens_were_chosen(model_path):
    """Changing the last token changes its own log-prob, but not the value before it; changing the
    one before changes both.
    """
    from transformers import AutoModelForCausalLM

    rank, row = make_rank(model_path), make_rows(count=1)[0]
    assert row.trained[-2:].all()

    def changed(t):
        return replace(
            row, tokens=np.where(np.arange(len(row.tokens)) == t, 101, row.tokens).astype(np.int32)
        )

    found = rank.compute_streams(
        [row, changed(len(row.tokens) - 1), changed(len(row.tokens) - 2)], 1.0
    )
    same, last, before = found["value"]
    assert (
        last[-1] == pytest.approx(same[-1], abs=1e-6)
        and abs(before[-1] - same[-1]) > 1e-3
        and found["logp"][1][-1] != found["logp"][0][-1]
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(
            input_ids=torch.as_tensor(row.tokens, dtype=torch.long)[None], output_hidden_states=True
        ).hidden_states[-1][0]
    expected = (
        (hidden @ rank.engine.module.critic.weight + rank.engine.module.critic.bias)
        .detach()
        .numpy()
    )
    np.testing.assert_allclose(same[row.trained], expected[:-1][row.trained[1:]], atol=1e-5)


def test_a_new_critic_says_zero(model_path):
    from tandem.engine.learner.rank import build_policy

    config = Config(model=ModelConfig(path=model_path))
    engine = LocalEngine(build_policy(config, model_path, SPEC), config.learner)
    rank, rows = LearnerRank(config, model_path, SPEC, engine), make_rows()
    assert all(
        not v[row.trained].any()
        for v, row in zip(rank.compute_streams(rows, 1.0)["value"], rows, strict=True)
    )
    assert build_policy(config, model_path, PolicySpec(uses_rollouts=True)).critic is None


def test_reference_set_to_the_present_weights_survives_a_resume(model_path, tmp_path):
    rank, rows = make_rank(model_path), make_rows()
    original = rank.logprobs(rows, 1.0, model="reference")
    rank.step(make_plan(rows))
    expected = rank.logprobs(rows, 1.0)
    rank.set_reference()
    rank.step(make_plan(rows))
    rank.save(tmp_path / "ck")

    def same(a, b):
        return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))

    assert same(rank.logprobs(rows, 1.0, model="reference"), expected) and not same(
        rank.logprobs(rows, 1.0), expected
    )
    resumed = make_rank(model_path)
    resumed.load(tmp_path / "ck")
    assert same(resumed.logprobs(rows, 1.0, model="reference"), expected)
    make_rank(model_path).save(tmp_path / "before")
    resumed.load(tmp_path / "before")
    assert same(resumed.logprobs(rows, 1.0, model="reference"), original), (
        "a checkpoint from before has the original model as its reference"
    )


def test_reference_is_the_original_model_also_after_steps(model_path):
    rank, rows = make_rank(model_path), make_rows()
    before = rank.logprobs(rows, 1.0)
    rank.step(make_plan(rows))
    reference, now = rank.logprobs(rows, 1.0, model="reference"), rank.logprobs(rows, 1.0)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, reference, strict=True))
    assert not np.array_equal(before[0], now[0], equal_nan=True)


def test_clipping_bounds_the_update_but_not_the_reported_norm(model_path):
    rows, free, clipped = make_rows(), make_rank(model_path), make_rank(model_path, grad_clip=1e-3)
    seen = []
    clipped.engine.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            float(torch.stack([p.grad.norm() for p in clipped.engine.masters]).norm())
        )
    )
    norm = free.step(make_plan(rows)).metrics["grad_norm"]
    assert clipped.step(make_plan(rows)).metrics["grad_norm"] == pytest.approx(norm) and norm > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_non_finite_gradient_changes_nothing(model_path, dtype):
    rank, rows = make_rank(model_path, dtype), make_rows()
    rank.step(make_plan(rows))
    before = weights(rank)
    moments = {
        i: {k: v.clone() for k, v in s.items()}
        for i, s in enumerate(rank.engine.optimizer.state.values())
    }
    report = rank.step(make_plan(poison(rows)))
    assert report.skipped and not np.isfinite(report.metrics["grad_norm"])
    assert equal(before, weights(rank))
    assert all(
        torch.equal(moments[i][k], v)
        for i, s in enumerate(rank.engine.optimizer.state.values())
        for k, v in s.items()
    )
    again = rank.step(make_plan(rows))
    assert not again.skipped and not equal(before, weights(rank))


def test_moment_sets_are_independent(model_path):
    """Section 4(g) of the methods dossier.

    Set B starts like a fresh optimizer, and set A goes on as if B had not been.
    """
    rows, other = make_rows(), make_rows(1)
    rank = make_rank(model_path)
    rank.step(make_plan(rows))
    state = {
        i: {k: v.clone() for k, v in s.items()}
        for i, s in enumerate(rank.engine.optimizer.state.values())
    }
    rank.step(make_plan(other, optimizer="sft"))
    after_b = weights(rank)
    rank.step(make_plan(rows, optimizer="main", learning_rate=0.0))
    steps = {int(s["step"]) for s in rank.engine.optimizer.state.values()}
    assert steps == {2}

    # the first step with B must be what a new AdamW does on the same weights
    fresh = make_rank(model_path)
    reference = make_rank(model_path)
    reference.step(make_plan(rows))
    with torch.no_grad():
        for mine, theirs in zip(fresh.engine.masters, reference.engine.masters, strict=True):
            mine.copy_(theirs)
    fresh.step(make_plan(other))
    assert equal(after_b, weights(fresh))
    assert all(int(s["step"]) == 1 for s in state.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_exact(model_path, tmp_path, dtype):
    rank = make_rank(model_path, dtype, weight_decay=0.1)
    rank.step(make_plan(make_rows(0)))
    rank.step(make_plan(make_rows(1), optimizer="sft"))
    rank.save(tmp_path / "ck")
    noise = torch.rand(3)
    resumed = make_rank(model_path, dtype, weight_decay=0.1)
    resumed.load(tmp_path / "ck")
    assert torch.equal(torch.rand(3), noise)
    for learner in (rank, resumed):
        for seed, name in ((2, "sft"), (3, "main"), (4, "other")):
            learner.step(make_plan(make_rows(seed), optimizer=name))
    assert equal(weights(rank), weights(resumed))
    assert not equal(weights(rank), weights(make_rank(model_path, dtype)))


def test_checkpoint_of_another_kind_of_learner_is_refused(model_path, tmp_path):
    make_rank(model_path, "bfloat16").save(tmp_path / "ck")
    with pytest.raises(
        ConfigError, match=r"was written with .*bfloat16.*, this run has .*float32.*model\.dtype"
    ):
        make_rank(model_path).load(tmp_path / "ck")
    with pytest.raises(ConfigError, match="not a learner's checkpoint"):
        make_rank(model_path).load(tmp_path)


def test_bfloat16_keeps_small_updates_in_its_masters(model_path):
    """An update below bfloat16's resolution must add up over steps instead of vanishing."""
    rank, rows = make_rank(model_path, "bfloat16"), make_rows()
    first = [m.clone() for m in rank.engine.masters]
    for _ in range(3):
        rank.step(make_plan(rows, learning_rate=1e-6))
    assert all(p.dtype == torch.bfloat16 for p in rank.engine.weights)
    assert (
        min(
            float((m - f).detach().abs().max())
            for m, f in zip(rank.engine.masters, first, strict=True)
        )
        > 1e-6
    )


def test_gradient_checkpointing_gives_the_same_step(model_path):
    rows, plain, saving = (
        make_rows(),
        make_rank(model_path),
        make_rank(model_path, gradient_checkpointing=True),
    )
    for rank in (plain, saving):
        rank.step(make_plan(rows))
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(weights(plain).values(), weights(saving).values(), strict=True)
    )


def test_export_is_a_hugging_face_folder_with_the_trained_weights(model_path, tmp_path):
    from transformers import AutoModelForCausalLM

    rank = make_rank(model_path)
    rank.step(make_plan(make_rows()))
    rank.export(tmp_path / "out")
    loaded, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    trained = {k: v for k, v in weights(rank).items() if not k.startswith("critic.")}
    assert (
        equal(trained, {k: v.detach() for k, v in loaded.named_parameters()})
        and (tmp_path / "out" / "model.safetensors").is_file()
    )
    assert not loading["unexpected_keys"], "the value head stays behind"
    assert {name for name, _ in rank.engine.full_parameters()} == trained.keys(), (
        "nor do rollout engines get it"
    )


def test_freed_memory_is_kept_for_the_next_buffer():
    """New pages are a page fault each: 40 MB are many of them, unless the pages of the buffer
    before are taken again.
    """
    script = (
        "import numpy, resource; from tandem.engine.core.process import keep_freed_memory\n"
        "def fill():\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n    "
        "numpy.empty(5_000_000).fill(1.0)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "fill(); without = fill(); keep_freed_memory(); fill(); print(without, fill())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")},
    )
    without, kept = map(int, found.stdout.split())
    assert kept < 10 < without  # 20 if the pages are huge ones
