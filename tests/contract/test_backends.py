"""The contract of rollout.backend.Backend: one suite that every rollout backend passes.

Run it on a backend of your own with

    TANDEM_BACKEND=my_backend.py:MyBackend pytest tests/contract/test_backends.py

The class is started as `await MyBackend.start(model_path, config, seed, **options)`, with the
options that TANDEM_BACKEND_OPTIONS has as JSON, and is given weights as named tensors:
`update_weights({"named": [(name in the checkpoint, tensor), ...]})`. All its coroutines run on one
event loop in a thread of its own, and generate is called for several requests at once. One backend
serves the whole file; the last test breaks it.

The reference is a plain transformers forward over each finished sequence, without cache, padding or
batch. The model has tied embeddings.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from tandem.engine.config.schema import Config, DataConfig, ModelConfig, RolloutConfig
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.types import (
    Finish,
    GenRequest,
    Prompt,
    Sampling,
    ScoredGroup,
    Source,
    Trajectory,
)
from tandem.engine.model.tiny import make_tiny
from tandem.engine.report.lines import write_line
from tandem.engine.report.rollouts import rollout_record
from tandem.engine.weights.digest import digest
from tandem.rollout.backend import backend_class

OWN = os.environ.get("TANDEM_BACKEND")
OPTIONS = json.loads(os.environ.get("TANDEM_BACKEND_OPTIONS", "{}"))
GAP = 1e-4  # fp32: what rounding may do to a log-prob
EOS = 2


def prompt(name: str, length: int) -> Prompt:
    ids = np.random.default_rng(sum(map(ord, name))).integers(7, 100, length).astype(np.int32)
    return Prompt(name, np.concatenate([[1], ids]).astype(np.int32), name)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# the requests of the suite; the replay backend is tested on a recording of them
REQUESTS = {
    name: GenRequest(i, p, n, s, prefixes, prefix_source)
    for i, (name, p, n, s, prefixes, prefix_source) in enumerate(
        [
            ("plain", prompt("a", 5), 16, Sampling(60, seed=1), (), Source.PREFIX),
            ("cool", prompt("bb", 9), 8, Sampling(60, temperature=0.7, seed=2), (), Source.PREFIX),
            (
                "nucleus",
                prompt("c", 3),
                8,
                Sampling(30, temperature=1.3, top_p=0.6, seed=3),
                (),
                Source.PREFIX,
            ),
            ("greedy", prompt("d", 7), 2, Sampling(20, temperature=0.0, seed=4), (), Source.PREFIX),
            ("short", prompt("a", 5), 3, Sampling(1, seed=5), (), Source.PREFIX),
            ("late", prompt("e", 4), 16, Sampling(40, min_tokens=40, seed=6), (), Source.PREFIX),
            (
                "prefixed",
                prompt("f", 6),
                4,
                Sampling(8, seed=7),
                (ids(), ids(20, 21), ids(30, 31, 32, 33, 34), ids(*range(40, 48))),
                Source.PREFIX,
            ),
            (
                "hinted",
                prompt("g", 6),
                2,
                Sampling(12, min_tokens=12, seed=8),
                (ids(50, 51, 52),) * 2,
                Source.HINT,
            ),
            ("long", prompt("h", 150), 2, Sampling(6, seed=9), (), Source.PREFIX),
        ]
    )
}


class Loop:
    """An event loop in a thread of its own: what a backend starts on one loop must stay on it."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def __call__(self, coroutine, timeout: float = 200.0):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@dataclass
class Case:
    """A backend under test, the weights it should have now, and how to send it others."""

    backend: object
    loop: Loop
    model: torch.nn.Module  # a transformers model with the backend's present weights
    send: object  # ([(name, tensor)], version) -> digests
    version: int = 0
    answers: dict[str, tuple[Trajectory, ...]] = field(default_factory=dict)

    def generate(self, *requests: GenRequest) -> list[tuple[Trajectory, ...]]:
        async def together():
            return await asyncio.gather(*(self.backend.generate(r) for r in requests))

        return [tuple(answer) for answer in self.loop(together())]

    def answer(self, name: str) -> tuple[Trajectory, ...]:
        """The answer to one of REQUESTS, all asked at once with the first weights."""
        if not self.answers:
            assert self.version == 0
            self.answers = dict(zip(REQUESTS, self.generate(*REQUESTS.values()), strict=True))
        return self.answers[name]

    def update(self, change) -> dict[str, str]:
        """Change the model's weights and send all of them as the next version."""
        self.answer("plain")  # the first weights are about to go
        with torch.no_grad():
            change(self.model)
        self.version += 1
        return self.send(list(self.model.named_parameters()), self.version)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose distributions are far from uniform: at initialisation temperature would
    hardly matter.
    """
    from transformers import AutoModelForCausalLM

    path = make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=64, layers=2, heads=1)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 8
    model.save_pretrained(path)
    return str(path)


def settings(folder: str, **rollout) -> Config:
    return Config(
        mode="inline",
        model=ModelConfig(path=folder),
        data=DataConfig(max_prompt_tokens=160),
        rollout=RolloutConfig(max_tokens=64, max_sequences=32, kv_cache_gib=0.1, **rollout),
    )


def start(kind: str, folder: str, config: Config, loop: Loop, closing: list):
    from transformers import AutoModelForCausalLM

    rollout = replace(config.rollout, backend=kind, backend_options=OPTIONS if kind == OWN else {})
    config = replace(config, rollout=rollout)
    cls = backend_class(config)
    backend = loop(cls.start(folder, config, 0, **rollout.backend_options))
    closing.append(lambda: loop(backend.close()))

    def send(named, version):
        loop(backend.start_weight_update())
        loop(backend.update_weights({"named": named}))
        return loop(backend.finish_weight_update(version))

    if kind == "vllm":
        send = sender_of(
            backend,
            loop,
            dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()),
            closing,
        )
    return Case(backend, loop, AutoModelForCausalLM.from_pretrained(folder).eval(), send)


def sender_of(backend, loop: Loop, named: dict[str, torch.Tensor], closing: list):
    """Tandem's own learner-side transport, its control plane calling the backend directly instead
    of through Ray.
    """
    import socket

    from vllm.distributed.weight_transfer.base import ParamMeta

    from tandem.engine.weights.cpu_sender import CpuSender
    from tandem.engine.weights.wire import CpuTrainerInit

    class Client:
        timeout, installed = 100.0, None
        deadline = time.monotonic() + 600

        def init_weight_transfer_engine(self, info):
            loop(backend.init_weight_transfer_engine(info))

        def start_weight_update(self):
            loop(backend.start_weight_update())

        def update_weights(self, info):
            loop(backend.update_weights(info))

        def finish_weight_update(self, weight_version=None):
            self.installed = loop(backend.finish_weight_update(self.version))

    class Source:
        def metadata(self):
            return [
                ParamMeta(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in self.named
            ]

        def __iter__(self):
            return iter(self.named)

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    client, source = Client(), Source()
    source.named = list(named.items())
    sender = CpuSender.trainer_init(
        CpuTrainerInit(
            "shm", "127.0.0.1", port, world_size=2, bucket_bytes=1 << 20, timeout=100.0, rank=0
        ),
        client=client,
        source=source,
    )
    closing.append(sender.shutdown)

    def send(named, version):
        source.named, client.version = list(named), version
        sender.send_weights()
        return client.installed

    return send


@pytest.fixture(scope="module")
def case(request, folder, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    closing, loop = [], Loop()
    try:
        if request.param == "replay":
            config = settings(
                folder,
                backend="replay",
                record=str(
                    record(
                        start("hf", folder, settings(folder), loop, closing),
                        scratch / "rollouts.jsonl",
                    )
                ),
            )
        else:
            config = settings(folder)
        yield start(request.param, folder, config, loop, closing)
    finally:
        for close in reversed(closing):
            close()
        loop.close()


def record(case: Case, path):
    """The answers to all REQUESTS as a run writes them."""
    with open(path, "w") as file:
        for name, request in REQUESTS.items():
            trajectories = case.answer(name)
            group = ScoredGroup(
                request.group, request.prompt, trajectories, np.zeros(len(trajectories), np.float32)
            )
            for i in range(len(trajectories)):
                write_line(file, {"step": 0, "learner_version": 0, **rollout_record(group, i)})
    return path


LIVE = [OWN] if OWN else ["hf", pytest.param("vllm", marks=pytest.mark.stack)]
every_backend = pytest.mark.parametrize("case", LIVE if OWN else [*LIVE, "replay"], indirect=True)
# all that compute, and so take weights
every_engine = pytest.mark.parametrize("case", LIVE, indirect=True)


@torch.no_grad()
def reference(
    model,
    trajectory: Trajectory,
    temperature: float = 1.0,
    top_p: float = 1.0,
    head: torch.Tensor | None = None,
) -> np.ndarray:
    """float64 [T]: log-probs of the tokens from one plain forward; NaN at position 0.

    `head` replaces the output embedding.
    """
    tokens = torch.from_numpy(trajectory.tokens).long()
    hidden = model.model(input_ids=tokens[None], use_cache=False)[0][0]
    p = (
        ((hidden @ (model.lm_head.weight if head is None else head).T).double() / temperature)
        .softmax(-1)
        .numpy()[:-1]
    )
    for row in p if top_p < 1 else ():
        order = np.argsort(-row)
        # the smallest set of most likely tokens that has at least top_p
        kept = order[: np.searchsorted(np.cumsum(row[order]), top_p) + 1]
        rest = np.setdiff1d(order, kept)
        row[rest] = 0
        row /= row.sum()
    with np.errstate(divide="ignore"):
        return np.concatenate([[np.nan], np.log(p[np.arange(len(p)), trajectory.tokens[1:]])])


def gap(trajectory: Trajectory, expected: np.ndarray) -> float:
    sampled = trajectory.source == Source.POLICY
    return float(np.abs(trajectory.behaviour_logp - expected)[sampled].max(initial=0.0))


# -- what a trajectory must say


@every_backend
def test_every_token_has_its_source_log_prob_and_version(case):
    for name, request in REQUESTS.items():
        trajectories = case.answer(name)
        assert len(trajectories) == request.samples
        for i, t in enumerate(trajectories):
            given, forced = (
                len(request.prompt.tokens),
                len(request.prefixes[i]) if request.prefixes else 0,
            )
            sampled = np.arange(len(t.tokens)) >= given + forced
            assert (t.prompt_id, t.group) == (request.prompt.id, request.group)
            assert np.array_equal(t.tokens[:given], request.prompt.tokens)
            assert t.source.tolist() == [Source.PROMPT] * given + [
                request.prefix_source
            ] * forced + [Source.POLICY] * int(sampled.sum())
            assert (
                np.isfinite(t.behaviour_logp[sampled]).all()
                and np.isnan(t.behaviour_logp[~sampled]).all()
            )
            assert (t.version[sampled] == 0).all() and (t.version[~sampled] == -1).all()
            assert (t.tokens.dtype, t.source.dtype, t.behaviour_logp.dtype, t.version.dtype) == (
                np.int32,
                np.int8,
                np.float32,
                np.int32,
            )


@every_backend
def test_a_response_ends_with_end_of_sequence_or_at_max_tokens(case):
    seen = set()
    for name, request in REQUESTS.items():
        for _i, t in enumerate(case.answer(name)):
            response = t.response
            assert EOS not in response[:-1] and len(response) <= request.sampling.max_tokens
            if t.finish == Finish.STOP:
                assert response[-1] == EOS and len(response) >= request.sampling.min_tokens
            else:
                assert t.finish == Finish.LENGTH and len(response) == request.sampling.max_tokens
            seen.add((name, t.finish))
    assert {("plain", Finish.STOP), ("plain", Finish.LENGTH)} <= seen, (
        "the requests of this test no longer show both"
    )
    assert all(EOS not in t.response[:-1] for t in case.answer("late"))


@every_backend
@pytest.mark.parametrize("name", ["plain", "cool", "nucleus", "long"])
def test_log_probs_are_those_of_the_sampled_distribution(case, name):
    sampling = REQUESTS[name].sampling
    for t in case.answer(name):
        assert gap(t, reference(case.model, t, sampling.temperature, sampling.top_p)) < GAP
    if name == "cool":
        assert max(gap(t, reference(case.model, t)) for t in case.answer(name)) > 0.1, (
            "the model is too flat for this test: temperature does not show"
        )


@every_backend
def test_forced_prefixes_are_kept_and_count_towards_max_tokens(case):
    for prefix, t in zip(REQUESTS["prefixed"].prefixes, case.answer("prefixed"), strict=True):
        assert np.array_equal(t.response[: len(prefix)], prefix)
        assert gap(t, reference(case.model, t)) < GAP
    assert (
        case.answer("prefixed")[3].finish == Finish.LENGTH
        and not (case.answer("prefixed")[3].source == Source.POLICY).any()
    )
    assert {tuple(t.response[:3]) for t in case.answer("hinted")} == {(50, 51, 52)}


@every_backend
def test_greedy_takes_the_most_likely_token_and_repeats_itself(case):
    first, second = case.answer("greedy")
    assert np.array_equal(first.tokens, second.tokens)
    for t in range(len(REQUESTS["greedy"].prompt.tokens), len(first.tokens)):
        with torch.no_grad():
            logits = case.model(torch.from_numpy(first.tokens[None, :t]).long()).logits[0, -1]
        assert logits.max() - logits[first.tokens[t]] < 1e-3


# -- sampling


@every_engine
def test_same_seed_same_tokens_and_samples_differ(case):
    request = REQUESTS["plain"]
    other_seed = replace(request, sampling=replace(request.sampling, seed=99))
    (a,), (b,), (c,) = case.generate(request), case.generate(request), case.generate(other_seed)

    def tokens(answer):
        return [t.tokens.tolist() for t in answer]

    assert tokens(a) == tokens(b) != tokens(c)
    assert len({tuple(t) for t in tokens(a)}) > request.samples / 2


@every_engine
def test_an_aborted_request_is_answered_and_nobody_else_notices(case):
    doomed, other = replace(REQUESTS["late"], group=1001), REQUESTS["plain"]

    async def together():
        running = asyncio.gather(case.backend.generate(doomed), case.backend.generate(other))
        await asyncio.sleep(0.02)
        await case.backend.abort(doomed)
        return await running

    aborted, whole = case.loop(together())
    assert len(aborted) == doomed.samples
    for t in aborted:
        assert t.group == 1001 and t.finish == (
            Finish.LENGTH if len(t.response) == 40 else Finish.ABORT
        )
        assert ((t.source == Source.POLICY).sum(), (t.version == 0).sum()) == (len(t.response),) * 2
    assert (
        all(t.finish != Finish.ABORT and gap(t, reference(case.model, t)) < GAP for t in whole)
        and len(whole) == other.samples
    )
    case.loop(case.backend.abort(doomed))  # it is not running any more
    assert all(len(t.response) == 40 for t in case.generate(doomed)[0]), "it can be asked again"


@every_engine
def test_tokens_come_up_as_often_as_their_probability_says(case):
    """Chi-square of 1024 first tokens at T = 0.7 against the reference distribution, rare tokens
    pooled.
    """
    request = GenRequest(1000, REQUESTS["cool"].prompt, 1024, Sampling(1, temperature=0.7, seed=11))
    (answer,) = case.generate(request)
    with torch.no_grad():
        p = (
            (
                case.model(torch.from_numpy(request.prompt.tokens[None]).long())
                .logits[0, -1]
                .double()
                / 0.7
            )
            .softmax(-1)
            .numpy()
        )
    expected, counts = p * 1024, np.bincount([t.tokens[-1] for t in answer], minlength=len(p))
    rare = expected < 5
    expected, counts = (
        np.append(expected[~rare], expected[rare].sum()),
        np.append(counts[~rare], counts[rare].sum()),
    )
    assert len(expected) > 5
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@every_engine
def test_groups_come_back_in_the_order_of_the_requests(case):
    requests = [
        GenRequest(
            2000 + i,
            prompt(f"order{i}", 3 + 7 * (i % 3)),
            1 + i % 4,
            Sampling(4 + 5 * (i % 2), seed=i),
        )
        for i in range(12)
    ]
    for request, answer in zip(requests, case.generate(*requests), strict=True):
        assert len(answer) == request.samples
        assert all(
            t.group == request.group
            and np.array_equal(t.tokens[: len(request.prompt.tokens)], request.prompt.tokens)
            for t in answer
        )


@every_engine
def test_a_request_with_the_wrong_number_of_prefixes_is_refused(case):
    with pytest.raises(ValueError, match="2 prefixes for 3 samples"):
        case.generate(GenRequest(3000, prompt("a", 5), 3, Sampling(4), (ids(1), ids(2))))


# -- weights


def perturb(model):
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += (
            0.1 * torch.randn(parameter.shape, generator=noise) * parameter.std().nan_to_num(1.0)
        )


@every_engine
def test_an_update_takes_effect_and_stamps_its_version(case):
    """Log-probs follow the new weights, on a long prompt too, whose keys and values of the old
    weights may be in a prefix cache.
    """
    old_head, old_digest = (
        case.model.lm_head.weight.detach().clone(),
        case.loop(case.backend.active_digest()),
    )
    case.generate(REQUESTS["long"])
    installed = case.update(perturb)
    assert (installed.version, installed.active_digest) == (
        case.version,
        case.loop(case.backend.active_digest()),
    )
    assert installed.received == {
        name: digest(parameter) for name, parameter in case.model.named_parameters()
    }
    assert case.loop(case.backend.weight_version()) == case.version
    assert case.loop(case.backend.active_digest()) != old_digest
    for name in ("long", "plain"):
        (answer,) = case.generate(REQUESTS[name])
        for t in answer:
            sampled = t.source == Source.POLICY
            assert (t.version[sampled] == case.version).all() and (t.version[~sampled] == -1).all()
            assert gap(t, reference(case.model, t)) < GAP
        assert max(gap(t, reference(case.model, t, head=old_head)) for t in answer) > 0.01, (
            "the update is too small to show"
        )


@every_engine
def test_tied_embeddings_follow_an_update_of_the_input_embedding(case):
    """The checkpoint has one tensor for both ends; an engine that keeps a copy for its head must
    renew it.
    """
    old_head = case.model.lm_head.weight.detach().clone()
    assert "lm_head.weight" not in case.update(
        lambda model: model.model.embed_tokens.weight.mul_(0.8)
    )
    (answer,) = case.generate(REQUESTS["plain"])
    assert max(gap(t, reference(case.model, t)) for t in answer) < GAP
    assert max(gap(t, reference(case.model, t, head=old_head)) for t in answer) > 0.01


@every_engine
def test_the_active_digest_changes_with_every_real_update_and_with_no_other(case):
    case.update(lambda model: None)
    same = case.loop(case.backend.active_digest())
    case.update(lambda model: None)
    assert case.loop(case.backend.active_digest()) == same
    # one number
    case.update(lambda model: model.model.layers[1].mlp.down_proj.weight[3, 5].mul_(1.01))
    assert case.loop(case.backend.active_digest()) != same


@every_engine
def test_a_partial_update_is_an_error_and_nothing_is_sampled_after_it(case):
    """Last in the file: the backend is lost."""
    named = [
        (name, parameter)
        for name, parameter in case.model.named_parameters()
        if name != "model.layers.1.self_attn.o_proj.weight"
    ]
    with pytest.raises(SyncError, match="o_proj"):
        case.send(named, case.version + 1)
    with pytest.raises(EngineDied):
        case.generate(REQUESTS["short"])
