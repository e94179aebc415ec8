"""The inline pool, and what the in-process backends refuse.

What every backend must do is in tests/contract/test_backends.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from tandem.engine.config.schema import Config, ModelConfig, RolloutConfig
from tandem.engine.core.errors import (
    ConfigError,
    EngineDied,
    RolloutPoolExhausted,
    SyncError,
)
from tandem.engine.core.types import GenRequest, Prompt, Sampling, ScoredGroup, Source
from tandem.engine.model.tiny import make_tiny
from tandem.engine.report.lines import write_line
from tandem.engine.report.rollouts import rollout_record
from tandem.rollout.backends.hf_decoding import Sample, decode, draw
from tandem.rollout.backends.replay import RecordedPrompts
from tandem.rollout.local import LocalPool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=64, layers=2, heads=1))


def pool(folder, **rollout) -> LocalPool:
    return LocalPool.start(
        Config(mode="inline", model=ModelConfig(path=folder), rollout=RolloutConfig(**rollout)),
        folder,
    )


def request(
    group: int, length: int = 5, samples: int = 3, max_tokens: int = 12, name: str | None = None
) -> GenRequest:
    tokens = np.random.default_rng(length).integers(7, 100, length).astype(np.int32)
    return GenRequest(
        group, Prompt(name or f"p{group}", tokens, ""), samples, Sampling(max_tokens, seed=group)
    )


def send(backend, scale: float, version: int, skip: str = "") -> None:
    asyncio.run(backend.start_weight_update())
    asyncio.run(
        backend.update_weights(
            {"named": [(n, p * scale) for n, p in backend.model.named_parameters() if n != skip]}
        )
    )
    asyncio.run(backend.finish_weight_update(version))


REQUESTS = [request(i, length=3 + 5 * (i % 4), samples=1 + i % 5) for i in range(9)]


def test_requests_wait_and_are_generated_together(folder):
    local = pool(folder)
    futures = [local.submit(r) for r in REQUESTS]
    called = []
    futures[3].add_done_callback(lambda future: called.append(len(future.result())))
    assert not any(f.done() for f in futures) and local.stats()["generated_tokens"] == 0
    first = futures[5].result()
    assert (
        len(first) == REQUESTS[5].samples
        and all(f.done() for f in futures)
        and called == [REQUESTS[3].samples]
    )
    sampled = sum(int((t.source == Source.POLICY).sum()) for f in futures for t in f.result())
    assert (
        local.stats()["generated_tokens"] == sampled
        and local.stats()["busy_seconds"] > 0
        and local.restart_dead() == 0
    )


def test_samples_do_not_depend_on_what_is_decoded_beside_them(folder):
    def tokens(futures):
        return [[t.tokens.tolist() for t in f.result()] for f in futures]

    together = pool(folder)
    expected = tokens([together.submit(r) for r in REQUESTS])
    for rows in (1, 4):
        local = pool(folder, max_sequences=rows)
        assert tokens([local.submit(r) for r in reversed(REQUESTS)]) == expected[::-1]
    assert tokens([together.submit(REQUESTS[4])]) == [expected[4]]


def test_a_request_is_sampled_with_the_weights_of_its_submission(folder):
    local = pool(folder)
    before = local.submit(request(0))
    local.install([(n, p * 1.1) for n, p in local.backend.model.named_parameters()], 7)
    after = local.submit(request(0))

    def versions(future):
        return {int(v) for t in future.result() for v in t.version[t.source == Source.POLICY]}

    assert versions(before) == {0} and versions(after) == {7}


def test_bad_requests_are_refused(folder):
    local = pool(folder)
    for bad, complaint in (
        (request(0, max_tokens=2000), "more than the 1024"),
        (replace(request(0), prompt=Prompt("x", np.zeros(0, np.int32), "")), "no tokens"),
    ):
        with pytest.raises(ValueError, match=complaint):
            local.submit(bad).result()
    assert len(local.submit(request(0)).result()) == 3


def test_weights_that_do_not_fit_are_refused(folder):
    backend = pool(folder).backend
    with pytest.raises(SyncError, match="before start"):
        asyncio.run(backend.update_weights({"named": []}))
    norm = backend.model.model.norm.weight
    for name, tensor, complaint in (
        ("model.nrom.weight", norm, "no such parameter"),
        ("model.norm.weight", torch.ones(3), r"\[3\].*\[64\]"),
    ):
        asyncio.run(backend.start_weight_update())
        with pytest.raises(SyncError, match=complaint):
            asyncio.run(backend.update_weights({"named": [(name, tensor)]}))
    with pytest.raises(SyncError, match=r"1 of .*norm.weight"):
        send(backend, 1.0, 1, skip="model.norm.weight")
    with pytest.raises(EngineDied):
        asyncio.run(backend.generate(request(0)))
    send(backend, 1.0, 1)  # a complete update heals it
    asyncio.run(backend.generate(request(0)))


def test_weights_that_are_not_finite_stop_the_run(folder):
    local = pool(folder)
    send(local.backend, float("nan"), 3)
    with pytest.raises(RuntimeError, match="not finite with weight version 3"):
        local.submit(request(0)).result()


def test_draw_by_hand():
    """p = (0.5, 0.3, 0.2): a uniform number picks by cumulative probability; top_p 0.6 keeps the
    first two, renormalised.
    """
    logits = torch.tensor([0.5, 0.3, 0.2]).log()[None].repeat(5, 1)
    uniform = torch.tensor([0.49, 0.51, 0.99, 0.61, 0.63], dtype=torch.float64)
    token, logp = draw(logits, torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 0.6, 0.6]), uniform)
    assert token.tolist() == [0, 1, 2, 0, 1]
    assert logp.exp().tolist() == pytest.approx([0.5, 0.3, 0.2, 0.625, 0.375], abs=1e-6)
    token, logp = draw(logits[:2], torch.tensor([0.0, 0.5]), torch.tensor([0.1, 1.0]), uniform[1:3])
    assert token.tolist() == [0, 2]
    # greedy: at temperature 1; at 0.5 p is squared
    assert logp.exp().tolist() == pytest.approx([0.5, 0.04 / 0.38], abs=1e-6)


# -- replay

# group 1 was filtered out
RECORDED = [request(0, name="a"), request(2, name="b"), request(3, name="a")]


@pytest.fixture(scope="module")
def recording(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "rollouts.jsonl"
    local = pool(folder)
    with open(path, "w") as file:
        for r in RECORDED:
            trajectories = local.submit(r).result()
            for i in range(len(trajectories)):
                write_line(
                    file,
                    rollout_record(
                        ScoredGroup(
                            r.group, r.prompt, trajectories, np.zeros(len(trajectories), np.float32)
                        ),
                        i,
                    ),
                )
    return path


def replay(recording) -> LocalPool:
    return LocalPool.start(
        Config(rollout=RolloutConfig(backend="replay", record=str(recording))), ""
    )


def test_replay_serves_by_ordinal_then_by_prompt(folder, recording):
    expected = [pool(folder).submit(r).result() for r in RECORDED]

    def same(answer, recorded):
        return all(
            np.array_equal(x.tokens, y.tokens)
            and np.array_equal(x.behaviour_logp, y.behaviour_logp, equal_nan=True)
            for x, y in zip(answer, recorded, strict=True)
        )

    by_ordinal, gapless = replay(recording), replay(recording)
    for i in (2, 1, 0):
        assert same(by_ordinal.submit(RECORDED[i]).result(), expected[i])
    # a run over RecordedPrompts counts without gaps; asked twice, answered twice
    for group, i in ((0, 0), (1, 1), (2, 2), (1, 1)):
        answer = gapless.submit(replace(RECORDED[i], group=group)).result()
        assert same(answer, expected[i]) and {t.group for t in answer} == {group}


def test_replay_refuses_what_was_not_recorded(recording, tmp_path):
    local = replay(recording)
    other = replace(RECORDED[0], prompt=Prompt("a", RECORDED[0].prompt.tokens + 1, ""))
    for bad, complaint in (
        (request(9, name="z"), "no rollouts for prompt 'z'"),
        (other, "other token ids"),
        (replace(RECORDED[1], samples=2), "3 samples in group 2"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            local.submit(bad).result()
    with pytest.raises(ConfigError, match="no rollouts left for prompt 'b'"):
        local.submit(replace(RECORDED[1], group=8)).result()
    (tmp_path / "empty.jsonl").touch()
    for path, complaint in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "empty.jsonl", "holds no rollouts"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            replay(path)


def test_recorded_prompts_are_a_prompt_source(recording):
    source, resumed = RecordedPrompts(recording), RecordedPrompts(recording)
    assert [p.id for p in source.take(2)] == ["a", "b"] and len(source) == 3
    resumed.load_state_dict(source.state_dict())
    (last,) = resumed.take(1)
    assert last.id == "a" and np.array_equal(last.tokens, RECORDED[2].prompt.tokens)
    with pytest.raises(ConfigError, match="all of them were used"):
        resumed.take(1)


def test_rows_that_ended_and_are_decoded_along_stay_within_the_context():
    """Learned positions end at 12.

    The first row is at the end after one token, the other 15 go on; what it draws is dropped.
    """
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    ).eval()
    uniforms = np.random.default_rng(0).random((16, 9))
    rows = [
        Sample(
            np.arange(11 if i == 0 else 3, dtype=np.int32),
            8 if i == 0 else 0,
            Sampling(max_tokens=9, min_tokens=9),
            uniforms[i],
        )
        for i in range(16)
    ]
    decode(model, rows, torch.tensor([31]))
    assert [len(row.tokens) for row in rows] == [1] + [9] * 15
    alone = Sample(rows[1].context, 0, rows[1].sampling, uniforms[1])
    decode(model, [alone], torch.tensor([31]))
    np.testing.assert_array_equal(alone.tokens, rows[1].tokens)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda found: found[:1], "asked for 3 trajectories of prompt 'p0' and returned 1 of them"),
        (lambda found: None, "returned None"),
        (lambda found: ["text"] * 3, "returned a str for prompt 'p0', expected a Trajectory"),
    ],
)
def test_an_answer_that_is_not_one_trajectory_per_sample_is_refused(folder, answer, words):
    rollouts = pool(folder)
    generate_all = rollouts.backend.generate_all

    async def other(requests):
        return [answer(found) for found in await generate_all(requests)]

    rollouts.backend.generate_all = other
    with pytest.raises(ConfigError, match=words):
        rollouts.submit(request(0)).result()


def test_a_backend_that_dies_in_the_runs_own_process_ends_the_run(folder):
    rollouts = pool(folder)

    async def die(requests):
        raise EngineDied("gone")

    rollouts.backend.generate_all = die
    with pytest.raises(EngineDied):
        rollouts.submit(request(0)).result()
    with pytest.raises(RolloutPoolExhausted, match="HFBackend raised EngineDied"):
        rollouts.restart_dead()


def test_an_update_that_is_not_confirmed_is_refused(folder):
    rollouts = pool(folder)

    async def nothing(version):
        return None

    rollouts.backend.finish_weight_update = nothing
    with pytest.raises(ConfigError, match="`finish_weight_update` returned None, expected an Ins"):
        rollouts.install([], version=1)
