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
        for name, tensor in weights:
            digests[name] = digest(tensor)
        return load(weights)

    model.load_weights = load_weights
    try:
        yield
    finally:
        del model.load_weights


class CpuReceiver(WeightTransferEngine[CpuInitInfo, CpuUpdateInfo]):
    """Receives the learner's weights through a channel in a vLLM worker."""

    init_info_cls = CpuInitInfo
    update_info_cls = CpuUpdateInfo
    receiver: Receiver | None = None
    model: Any

    def init_transfer_engine(self, init_info: CpuInitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        before = parallel.data_parallel_index * parallel.world_size
        self.receiver = Receiver(init_info, before + parallel.rank)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.received: dict[str, str] = {}
        self.watch = Stopwatch()
        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)
        self.watch.lap("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # the base class synchronises an accelerator here, which fails without one
        parsed = self.parse_update_info(update_info)
        self.receive_weights(parsed)

    def receive_weights(self, update_info: CpuUpdateInfo) -> None:
        assert self.receiver is not None
        for weights in self.receiver.receive(update_info):
            self.watch.lap("receive")
            for name, tensor in weights:
                self.received[name] = digest(tensor)
            self.watch.lap("digest")
            self.model.load_weights(weights)
            _, first = weights[0]
            keep_unfinished(self.model, first)
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

    buffer = storage(received)
    for layer in model.modules():
        info = get_layerwise_info(layer)
        for _, bound in info.loaded_weights:
            for key, value in bound.arguments.items():
                if type(value) is Tensor and storage(value) == buffer:
                    bound.arguments[key] = value.clone()


def storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


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
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear"):
            yield name, module


def heads(model: Any) -> Iterator[tuple[str, Any]]:
    """The packed linears that keep their weight readable: lm_head, tied or not."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for name, module in packed_linears(model):
        if isinstance(module, ParallelLMHead) and module.weight.numel():
            yield name, module


def repack_tied_heads(model: Any) -> None:
    """On a CPU a tied lm_head has a packed copy of the embedding that a reload does not renew (vLLM
    0.32): logits would keep the old weights.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for _, head in heads(model):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def probe(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Fixed pseudo-random input, the same in every process."""
    generator = torch.Generator()
    generator.manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def effect(layer: Any) -> str:
    """The digest of a packed layer's output on fixed inputs."""
    weight = layer.weight
    if weight.numel():
        columns = weight.shape[1]
    else:
        columns = getattr(layer, "input_size_per_partition", None) or layer.input_size
    x = probe(16, columns, weight.dtype)
    output = layer.cpu_linear(x, weight, None)
    return digest(output)


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
        tied = getattr(config, "tie_word_embeddings", False)
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue  # loaded and processed, or holds no weights of a checkpoint
            wanted = sum(map(get_tensor_load_numel, layer.parameters(recurse=False)))
            if tied and isinstance(layer, ParallelLMHead):
                wanted = 0  # the embedding is its weight
            elif isinstance(layer, VocabParallelEmbedding):
                rows = layer.num_embeddings_per_partition
                padding = rows - layer.shard_indices.num_org_elements
                wanted -= padding * layer.embedding_dim
            if info.load_numel < wanted:
                missing.append(f"{name} ({info.load_numel} of {wanted} elements)")
        return missing

    def tandem_stale_heads(self) -> list[str]:
        """Names of lm_heads whose packed weight is not the readable one."""
        stale = []
        model = self.model_runner.get_model()
        for name, head in heads(model):
            weight = head.weight
            x = probe(4, weight.shape[1], weight.dtype)
            packed = head.cpu_linear(x, weight, None).float()
            plain = torch.nn.functional.linear(x, weight).float()
            exact = 1e-5 if weight.dtype == torch.float32 else 1e-2
            gap = (packed - plain).abs().max()
            if gap > exact * plain.abs().max():
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
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.numel():
                found[name] = digest(parameter)
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

        thread = threading.Thread(target=watch, name="die_with_parent", daemon=True)
        thread.start()


WeightTransferEngineFactory.register_engine("tandem_cpu", CpuReceiver)
WeightTransferEngineFactory.register_engine("tandem_nccl", NcclReceiver)
WeightTransferEngineFactory.register_engine("tandem_ipc", IpcReceiver)
