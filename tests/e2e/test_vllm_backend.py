"""One real vLLM engine on a tiny model with tied embeddings: its numbers are the learner's numbers,
before and after real weight syncs, and every silent fault of a sync that was met on this stack is
an error here. One engine start serves the whole file.
"""

import asyncio

import numpy as np
import pytest
from vllm_rig import EOS, running

from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.types import Finish, Source
from tandem.engine.model.tiny import make_tiny

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    with running(make_tiny(tmp_path_factory.mktemp("model") / "tiny")) as rig:
        yield rig


PROMPT = [1, 20, 21, 22, 23, 24]
LONG = [1] + list(range(10, 100)) * 3  # longer than two blocks of the prefix cache


def test_logprobs_and_streams_before_any_sync(rig):
    group = rig.generate(PROMPT, samples=8, max_tokens=64, temperature=0.7)
    assert rig.gap(group, temperature=0.7) < 1e-4
    # one seed, different samples
    assert len({t.tokens.tobytes() for t in group}) == 8
    for t in group:
        sampled = t.source == Source.POLICY
        assert (
            t.tokens[: len(PROMPT)].tolist() == PROMPT
            and (t.source[: len(PROMPT)] == Source.PROMPT).all()
        )
        assert (t.version == np.where(sampled, 0, -1)).all() and (
            np.isnan(t.behaviour_logp) == ~sampled
        ).all()
        # the end-of-sequence token belongs to the response
        assert (t.finish == Finish.STOP) == (t.tokens[-1] == EOS)
        assert t.finish == Finish.STOP or sampled.sum() == 64
    assert {t.finish for t in group} == {Finish.STOP, Finish.LENGTH}


def test_same_seed_same_samples_other_group_other_samples(rig):
    request = rig.request(PROMPT, 4)
    first, again, other = (
        rig.wait(rig.backend.generate(request)),
        rig.wait(rig.backend.generate(request)),
        rig.generate(PROMPT),
    )

    def same(a, b):
        return [x.tokens.tolist() for x in a] == [x.tokens.tolist() for x in b]

    assert same(first, again) and not same(first, other)


def test_prefixes_are_forced_and_not_sampled(rig):
    from tandem.engine.core.types import Trajectory

    prefixes = (
        np.array([30, 31, 32], np.int32),
        np.zeros(0, np.int32),
        np.arange(40, 64).astype(np.int32),
    )
    a, b, c = rig.generate(PROMPT, samples=3, prefixes=prefixes)
    assert (
        isinstance(a, Trajectory)
        and a.response[:3].tolist() == [30, 31, 32]
        and len(a.response) <= 24
    )
    assert (a.source == Source.PREFIX).sum() == 3 and (b.source == Source.PREFIX).sum() == 0
    assert (
        np.isnan(a.behaviour_logp[:9]).all()
        and (a.version[:9] == -1).all()
        and (a.version[9:] == 0).all()
    )
    # no room left
    assert (
        c.response.tolist() == prefixes[2].tolist()
        and c.finish == Finish.LENGTH
        and not (c.source == Source.POLICY).any()
    )
    assert rig.gap([a, b]) < 1e-4


def test_the_active_digest_of_the_same_weights_is_the_same_every_time(rig):
    """vLLM's packed kernels gave another result in one of twenty digests, when two threads used
    them at once: engines with equal weights would then be told to differ.
    """
    assert len({rig.wait(rig.backend.active_digest()) for _ in range(100)}) == 1


def test_sync_makes_the_new_weights_live(rig):
    # fills the prefix cache with keys and values of the old weights
    rig.generate(LONG)
    before = rig.wait(rig.backend.active_digest())
    assert before == rig.wait(rig.backend.active_digest())
    rig.change_weights()
    # not synced yet: the comparison can see it
    assert rig.gap(rig.generate(LONG)) > 0.1
    delivery = rig.sync()
    assert [found.received for found in delivery.installed] == [delivery.sent] and set(
        delivery.sent
    ) == {n for n, _ in rig.model.named_parameters()}
    assert (
        rig.wait(rig.backend.active_digest()) != before
        and rig.wait(rig.backend.weight_version()) == rig.version
    )
    group = rig.generate(LONG)
    assert rig.gap(group) < 1e-4 and {v for t in group for v in t.version} == {-1, rig.version}
    assert rig.backend.cached_tokens > 0


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_layers_that_come_in_several_buffers_are_whole(rig, transport):
    """Buffers of a few tensors: vLLM keeps parts of fused layers until the rest has come, while the
    buffers that they came in are filled anew.
    """
    rig.sender.close()
    rig.sender = rig.connect(transport=transport, bucket_bytes=50_000)
    for _ in range(3):
        rig.change_weights()
        rig.sync()
        assert rig.gap(rig.generate(PROMPT)) < 1e-4


def test_update_in_flight_stamps_two_versions(rig):
    import copy

    old, old_version = copy.deepcopy(rig.model), rig.version
    running = asyncio.run_coroutine_threadsafe(
        rig.backend.generate(rig.request(PROMPT, 4, max_tokens=600, min_tokens=600)), rig.loop
    )

    def progress():
        return [
            s.detokenizer.num_output_tokens()
            for s in list(rig.backend.llm.output_processor.request_states.values())
        ]

    while not (progress() and min(progress()) > 20):
        assert not running.done()
    rig.change_weights()
    rig.sync()
    group = running.result(120)
    for t in group:
        stamps = t.version[t.source == Source.POLICY]
        assert (
            set(stamps) == {old_version, rig.version}
            and (np.diff(stamps) >= 0).all()
            and len(stamps) == 600
        )
    assert rig.gap(group, model=old, version=old_version, eos=False) < 1e-4
    # keys and values of the first part were computed anew
    assert rig.gap(group, version=rig.version, eos=False) < 1e-4


def test_aborted_requests_end_at_once_and_vllm_forgets_them(rig):
    tables = rig.backend.llm.output_processor

    def start(request):
        return asyncio.run_coroutine_threadsafe(rig.backend.generate(request), rig.loop)

    # the first leaves no room to sample
    ended = [np.arange(40, 640).astype(np.int32), np.zeros(0, np.int32)]
    requests = [
        rig.request(PROMPT, 4, max_tokens=600, min_tokens=600),
        rig.request(PROMPT, 2, ended, max_tokens=600, min_tokens=600),
    ]
    doomed, other = (
        [start(r) for r in requests],
        start(rig.request(PROMPT, 2, max_tokens=200, min_tokens=200)),
    )

    def progress():
        return [s.detokenizer.num_output_tokens() for s in list(tables.request_states.values())]

    while not (len(progress()) == 7 and min(progress()) > 10):
        assert not any(f.done() for f in doomed)
    for request in requests:
        rig.wait(rig.backend.abort(request))
    groups = [f.result(5) for f in doomed]
    assert [t.finish for g in groups for t in g] == [Finish.ABORT] * 4 + [
        Finish.LENGTH,
        Finish.ABORT,
    ]
    for t in (*groups[0], groups[1][1]):
        assert (
            10 < len(t.response) < 600
            and (t.version[t.source == Source.POLICY] == rig.version).all()
        )
        # what there is of it is true
        assert rig.gap([t], eos=False) < 1e-4
    assert [len(t.response) for t in other.result(120)] == [200, 200]
    assert not tables.parent_requests and not tables.request_states and not tables.external_req_ids
    assert rig.gap(rig.generate(PROMPT)) < 1e-4


def test_missing_parameter_is_found(rig):
    # a third of a fused layer
    name = "model.layers.2.self_attn.k_proj.weight"
    sender = rig.connect(skip=[name])
    with pytest.raises(SyncError, match=r"layers.2.self_attn.qkv_proj"):
        rig.sync(sender)
    # half-loaded weights never sample a token
    with pytest.raises(EngineDied, match="incomplete"):
        rig.generate(PROMPT)
    rig.sender = None
    rig.backend.broken = None
    rig.sender = rig.connect()
    rig.heal()
    assert rig.gap(rig.generate(PROMPT)) < 1e-4


def test_stale_tied_lm_head_is_found(rig):
    rig.in_worker(
        "import tandem.rollout.vllm.worker as w; w.kept = w.repack_tied_heads; "
        "w.repack_tied_heads = lambda model: None"
    )
    rig.change_weights()
    with pytest.raises(SyncError, match="lm_head"):
        rig.sync()
    rig.in_worker("import tandem.rollout.vllm.worker as w; w.repack_tied_heads = w.kept")
    rig.heal()
    assert rig.gap(rig.generate(PROMPT)) < 1e-4


def test_prefix_cache_that_is_not_reset_is_found(rig, monkeypatch):
    async def refuses(**_):
        return False

    rig.change_weights()
    with monkeypatch.context() as patch:
        patch.setattr(rig.backend.llm, "reset_prefix_cache", refuses)
        with pytest.raises(SyncError, match="prefix cache"):
            rig.sync()
    rig.heal()

    async def lies(**_):
        return True

    rig.generate(LONG)
    rig.change_weights()
    with monkeypatch.context() as patch:
        patch.setattr(rig.backend.llm, "reset_prefix_cache", lies)
        rig.sync()
    # what the gate on log-probs sees
    assert rig.gap(rig.generate(LONG)) > 1e-3
    rig.sync()
    assert rig.gap(rig.generate(LONG)) < 1e-4


def test_stale_version_stamp_is_found(rig, monkeypatch):
    async def forgets(_):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(rig.backend.llm, "update_weight_version", forgets)
        with pytest.raises(SyncError, match="version"):
            rig.sync()
    rig.heal()
