"""What vLLM is started with: the arguments of its engine and the variables of its environment."""

from __future__ import annotations

import os
from typing import Any

from tandem.engine.config.schema import Config
from tandem.engine.weights.transport import transport

# of vLLM's weight transfer; the receivers are registered by worker.py
RECEIVERS = {
    "nccl": "tandem_nccl",
    "ipc": "tandem_ipc",
    "shm": "tandem_cpu",
    "gloo": "tandem_cpu",
}


def engine_arguments(model_path: str, config: Config, seed: int) -> dict[str, Any]:
    """What AsyncLLM is started with."""
    rollout = config.rollout
    parallel = config.cluster.tensor_parallel
    longest_response = max(rollout.max_tokens, config.eval.max_tokens or 0)
    longest = config.data.max_prompt_tokens + longest_response
    arguments: dict[str, Any] = dict(
        model=model_path,
        tokenizer=config.model.tokenizer or model_path,
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype,
        max_model_len=rollout.max_model_len or longest,
        max_num_seqs=rollout.max_sequences,
        seed=seed,
        enable_prefix_caching=rollout.prefix_caching,
        logprobs_mode="processed_logprobs",
        tensor_parallel_size=parallel,
        distributed_executor_backend="uni" if parallel == 1 else "mp",
        disable_log_stats=True,
        weight_transfer_config={"backend": RECEIVERS[transport(config)]},
        enable_sleep_mode=rollout.sleep,
        worker_extension_cls="tandem.rollout.vllm.worker.WorkerExtension",
    )
    if config.cluster.engine_gpus > 0:
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        return arguments
    arguments["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
    arguments["enforce_eager"] = True
    # whole prefills on CPU: where one is split, vLLM rewinds the generator of a seeded request,
    # which torch's CPU generator cannot do, and the engine dies
    arguments["enable_chunked_prefill"] = False
    arguments["max_num_batched_tokens"] = max(longest, 8192)
    return arguments


def set_environment(config: Config) -> None:
    """Variables that vLLM reads in this process and its children; the user's own values win, except
    for those that are needed.
    """
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    needed = {}
    if transport(config) == "ipc":
        # IPC handles are pickled on their way to vLLM's worker
        needed["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if config.cluster.engine_gpus == 0:
        # vLLM would pin every engine to the same cores
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        defaults["OMP_NUM_THREADS"] = str(config.cluster.threads)
        # a helper of the sampler would compile C++ for 15 s at the first request
        defaults["TORCH_COMPILE_DISABLE"] = "1"
        if config.cluster.tensor_parallel == 1:
            # AsyncLLM has its engine process all the same, but vLLM's CPU platform then honours the
            # uni executor, which saves a third process and its start-up
            needed["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.update(needed)
