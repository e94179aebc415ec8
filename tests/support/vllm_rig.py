"""One real vLLM engine in this process, and a learner's model whose weights can be sent to it;
shared by the tests of vLLM.
"""

import asyncio
import os
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tandem.engine.config.schema import Config, DataConfig, RolloutConfig, SyncConfig
from tandem.engine.core.types import GenRequest, Prompt, Sampling, Source

CONFIG = Config(
    data=DataConfig(max_prompt_tokens=400),
    rollout=RolloutConfig(max_tokens=600, kv_cache_gib=0.25),
    sync=SyncConfig(timeout=30.0, bucket_mib=1),
)
EOS = 2


class Rig:
    """An engine on an event loop of its own, and a learner's model that can be sent to it."""

    def __init__(self, folder, config=CONFIG):
        from transformers import AutoModelForCausalLM

        from tandem.rollout.vllm.backend import VllmBackend

        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, config.model.dtype)
        ).eval()
        self.backend = self.wait(VllmBackend.start(str(folder), config, seed=0))
        self.version = 0
        self.groups = 0
        self.sender = self.connect()

    def wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    def connect(self, skip=(), transport="shm", bucket_bytes=1 << 20):
        from tandem.engine.weights.client import PoolClient
        from tandem.engine.weights.cpu_sender import CpuSender
        from tandem.engine.weights.sender import DigestingSource, Sender
        from tandem.engine.weights.wire import CpuTrainerInit

        rig = self

        class DirectClient(PoolClient):
            """The same client, calling the engine of this process instead of Ray actors."""

            def call(self, method, arguments):
                return (
                    [1]
                    if method == "transfer_ranks"
                    else [rig.wait(getattr(rig.backend, method)(*arguments[0]))]
                )

        client = DirectClient([None], CONFIG.sync.timeout)
        source = DigestingSource(parameters(self.model, skip), active=True)
        init = CpuTrainerInit(
            transport, "127.0.0.1", free_port(), 2, bucket_bytes, CONFIG.sync.timeout, rank=0
        )
        return Sender(CpuSender.trainer_init(init, client=client, source=source), client, source)

    def sync(self, sender=None):
        self.version += 1
        delivery = (sender or self.sender).send(self.version)
        assert [found.received for found in delivery.installed] == [delivery.sent]
        return delivery

    def change_weights(self):
        """A visible change of every parameter, the embedding (and so lm_head) included."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))

    def generate(self, prompt, samples=4, prefixes=(), **sampling):
        return self.wait(self.backend.generate(self.request(prompt, samples, prefixes, **sampling)))

    def request(self, prompt, samples, prefixes=(), **sampling):
        self.groups += 1
        return GenRequest(
            self.groups,
            Prompt("p", np.array(prompt, np.int32), ""),
            samples,
            Sampling(**{"max_tokens": 24, "seed": 7} | sampling),
            prefixes=prefixes,
        )

    def gap(self, trajectories, model=None, temperature=1.0, version=None, eos=True):
        """max |engine's log-prob - this model's| over the sampled tokens (of one version);
        eos=False: sampled with end-of-sequence forbidden.
        """
        worst, tokens = 0.0, 0
        for t in trajectories:
            with torch.no_grad():
                logits = (model or self.model)(
                    torch.tensor(t.tokens[None].astype(np.int64))
                ).logits[0, :-1].double() / temperature
            if not eos:
                logits[:, EOS] = -torch.inf
            logp = (
                torch.log_softmax(logits, -1)
                .gather(1, torch.tensor(t.tokens[1:, None].astype(np.int64)))[:, 0]
                .numpy()
            )
            chosen = (t.source[1:] == Source.POLICY) & (
                (t.version[1:] == version) if version is not None else True
            )
            tokens += chosen.sum()
            worst = max(worst, np.abs(logp - t.behaviour_logp[1:])[chosen].max(initial=0.0))
        assert tokens
        return worst

    def in_worker(self, code):
        """Run a statement inside vLLM's engine process; `worker` is the worker."""
        self.wait(
            self.backend.llm.collective_rpc(
                eval("lambda worker: exec(code, {'worker': worker})", {"code": code})
            )
        )

    def heal(self):
        """Bring the engine back by hand after a provoked failure, to save an engine start; users
        have no such thing.
        """
        self.backend.broken, self.backend.updating = None, False
        self.in_worker("if worker._weight_update_active: worker.finish_weight_update()")
        self.sync()
        self.wait(self.backend.llm.resume_generation())


def parameters(model, skip=()):
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    from tandem.engine.model.checkpoint_form import CheckpointForm

    named = [(n, p.detach()) for n, p in model.named_parameters() if n not in skip]
    form = CheckpointForm(model, [(n, p.dtype, tuple(p.shape)) for n, p in named])

    class Parameters(WeightSource):
        def metadata(self):
            return [ParamMeta(*shape) for shape in form.shapes]

        def __iter__(self):
            return form.apply(named)

    return Parameters()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(folder, config=CONFIG):
    """A Rig whose engine ends with the block and leaves nothing behind."""
    patch = pytest.MonkeyPatch()
    # lets the tests break things inside the engine process
    patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shared_memory = set(os.listdir("/dev/shm"))
    rig = Rig(folder, config)
    yield rig
    import multiprocessing

    rig.wait(rig.backend.close())
    patch.undo()
    assert not multiprocessing.active_children(), "the engine left a process behind"
    assert not [
        n for n in set(os.listdir("/dev/shm")) - shared_memory if n.startswith(("psm_", "sem."))
    ], "the engine left shared memory behind"
