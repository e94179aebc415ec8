"""What Tandem adds inside vLLM's worker process: receivers for the weight transports, and the
checks that new weights are really computed with.

vLLM imports this module because `worker_extension_cls` names WorkerExtension; the import registers
the receivers. The faults guarded against are real, silent ones of vLLM 0.32: a layer that an update
left out keeps its old weights (a log line), and on a CPU a tied lm_head keeps its old packed copy,
while experts are not packed at all (experts.py).

Models and layers are Any here: vLLM gives them attributes that torch's types do not know.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from tandem.engine.weights.digest import digest
from tandem.engine.weights.receiver import Receiver
from tandem.engine.weights.stopwatch import Stopwatch
from tandem.engine.weights.wire import CpuInitInfo, CpuUpdateInfo
from tandem.rollout.vllm.experts import forget_packed_experts


@contextmanager
def digesting(model: Any, digests: dict[str, str]):
    """While active, every tensor given to `model.load_weights` leaves its digest in `digests`."""
    load = model.load_weights

    def load_weights(weights):
        weights = list(weights)
        digests.update((name, digest(tensor)) for name, tensor in weights)
        return load(weights)

    model.load_weights = load_weights
    try:
        yield
    finally:
        del model.load_weights


class CpuReceiver(WeightTransferEngine[CpuInitInfo, CpuUpdateInfo]):
    """Receives the learner's weights through a channel in a vLLM worker."""

    init_info_cls, update_info_cls = CpuInitInfo, CpuUpdateInfo
    receiver: Receiver | None = None
    model: Any

    def init_transfer_engine(self, init_info: CpuInitInfo) -> None:
        self.shutdown()
        p = self.parallel_config
        self.receiver = Receiver(init_info, p.data_parallel_index * p.world_size + p.rank)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.received: dict[str, str] = {}
        self.watch = Stopwatch()
        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)
        self.watch.lap("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # the base class synchronises an accelerator here, which fails without one
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: CpuUpdateInfo) -> None:
        assert self.receiver is not None
        for weights in self.receiver.receive(update_info):
            self.watch.lap("receive")
            self.received.update((name, digest(tensor)) for name, tensor in weights)
            self.watch.lap("digest")
            self.model.load_weights(weights)
            keep_unfinished(self.model, weights[0][1])
            self.watch.lap("load and repack")

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self.watch.lap()
        finalize_layerwise_reload(self.model, self.model_config)
        self.watch.lap("finalize")
        repack_tied_heads(self.model)
        self.watch.lap("repack head")
        self.watch.show("received")

    def shutdown(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None


def keep_unfinished(model: Any, received: Tensor) -> None:
    """Copy what vLLM holds of layers that are not complete yet: it keeps views of the buffer in
    which `received` lies too, and which the next weights will overwrite.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    buffer = received.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for key, value in bound.arguments.items():
                if type(value) is Tensor and value.untyped_storage().data_ptr() == buffer:
                    bound.arguments[key] = value.clone()


class NcclReceiver(NCCLWeightTransferEngine):
    """vLLM's own, which also digests what arrives: on the GPU, on the stream it arrived on."""

    def init_transfer_engine(self, init_info) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.received: dict[str, str] = {}
        super().start_weight_update()

    def receive_weights(self, update_info) -> None:
        with digesting(self.model, self.received):
            super().receive_weights(update_info)


class IpcReceiver(IPCWeightTransferEngine):
    """The same for vLLM's CUDA-IPC handles."""

    def start_weight_update(self) -> None:
        self.received: dict[str, str] = {}
        super().start_weight_update()

    def receive_weights(self, update_info) -> None:
        with digesting(self.model, self.received):
            super().receive_weights(update_info)


def packed_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules that compute with a weight packed away by vLLM's CPU kernels, out of reach of
    named_parameters().
    """
    return ((name, m) for name, m in model.named_modules() if hasattr(m, "cpu_linear"))


def heads(model: Any) -> Iterator[tuple[str, Any]]:
    """The packed linears that keep their weight readable: lm_head, tied or not."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return (
        (name, m)
        for name, m in packed_linears(model)
        if isinstance(m, ParallelLMHead) and m.weight.numel()
    )


def repack_tied_heads(model: Any) -> None:
    """On a CPU a tied lm_head has a packed copy of the embedding that a reload does not renew (vLLM
    0.32): logits would keep the old weights.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for _, head in heads(model):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def probe(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Fixed pseudo-random input, the same in every process."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def effect(layer: Any) -> str:
    """The digest of a packed layer's output on fixed inputs."""
    if layer.weight.numel():
        columns = layer.weight.shape[1]
    else:
        columns = getattr(layer, "input_size_per_partition", None) or layer.input_size
    return digest(layer.cpu_linear(probe(16, columns, layer.weight.dtype), layer.weight, None))


class WorkerExtension:
    """Mixed into vLLM's worker; its methods are called by collective_rpc.

    Importing this module has registered the transports in the worker.
    """

    # the worker's
    weight_transfer_engine: Any
    model_runner: Any
    model_config: Any

    def tandem_received(self) -> dict[str, str]:
        """{parameter: digest} of the tensors of the last update, in checkpoint format, as they
        arrived.
        """
        return self.weight_transfer_engine.received

    def tandem_missing(self) -> list[str]:
        """Layers that the running update has not filled, with element counts; must be empty before
        the update is finished.

        vLLM itself only logs a warning and keeps the old weights of such a layer.
        """
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

        missing = []
        model = self.model_runner.get_model()
        config = self.model_config.hf_text_config
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue  # loaded and processed, or holds no weights of a checkpoint
            wanted = sum(get_tensor_load_numel(p) for p in layer.parameters(recurse=False))
            if isinstance(layer, ParallelLMHead) and getattr(config, "tie_word_embeddings", False):
                wanted = 0  # the embedding is its weight
            elif isinstance(layer, VocabParallelEmbedding):
                rows = layer.num_embeddings_per_partition - layer.shard_indices.num_org_elements
                wanted -= rows * layer.embedding_dim  # padding
            if info.load_numel < wanted:
                missing.append(f"{name} ({info.load_numel} of {wanted} elements)")
        return missing

    def tandem_stale_heads(self) -> list[str]:
        """Names of lm_heads whose packed weight is not the readable one."""
        stale = []
        for name, head in heads(self.model_runner.get_model()):
            x = probe(4, head.weight.shape[1], head.weight.dtype)
            packed = head.cpu_linear(x, head.weight, None).float()
            plain = torch.nn.functional.linear(x, head.weight).float()
            exact = 1e-5 if head.weight.dtype == torch.float32 else 1e-2
            if (packed - plain).abs().max() > exact * plain.abs().max():
                stale.append(name)
        return stale

    def tandem_digests(self) -> dict[str, str]:
        """{name: digest} of what this worker computes with.

        Readable parameters by their bytes. A weight that a CPU kernel packed away cannot be read
        back: it is digested through what it does, the layer's output on 16 fixed inputs. Two limits
        follow: a change below the rounding of such a dot product goes unseen, and engines can be
        compared only if they run on the same kind of CPU with equally many threads.
        """
        model = self.model_runner.get_model()
        found = {name: digest(p) for name, p in model.named_parameters() if p.numel()}
        # one after the other: two threads in these kernels at once now and then get wrong numbers
        for name, layer in packed_linears(model):
            found[f"{name}.packed"] = effect(layer)
        return found

    def tandem_die_with(self, parent: int) -> None:
        """Exit when process `parent` is gone: a worker whose owner was killed would hold its memory
        forever.
        """

        def watch():
            while True:
                try:
                    os.kill(parent, 0)
                except ProcessLookupError:
                    os._exit(1)
                time.sleep(0.5)

        threading.Thread(target=watch, name="die_with_parent", daemon=True).start()


WeightTransferEngineFactory.register_engine("tandem_cpu", CpuReceiver)
WeightTransferEngineFactory.register_engine("tandem_nccl", NcclReceiver)
WeightTransferEngineFactory.register_engine("tandem_ipc", IpcReceiver)
