"""One vLLM engine (AsyncLLM) behind the Backend protocol.

Every sampled token carries its log-prob under the distribution it was sampled from and the weight
version that sampled it (vLLM stamps versions token by token, so a sequence that lived through an
update carries two). Weights change only between start_weight_update and finish_weight_update;
generation is paused meanwhile, running requests are kept, and their keys and values are computed
anew with the new weights. An engine that sleeps (rollout.sleep) wakes up in an update and refuses
to generate before it.

An update that does not end well leaves the engine unusable: it then raises EngineDied until it is
closed. Half-loaded weights never sample a token.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.types import Finish, GenRequest, Installed, Source, Trajectory
from tandem.engine.weights.digest import combine

FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}


def transport(config: Config) -> str:
    """nccl, ipc, shm or gloo: what `sync.transport` asks for, or what fits the devices."""
    if config.sync.transport != "auto":
        return config.sync.transport
    on_gpus = config.cluster.engine_gpus > 0 and config.cluster.learner_gpus > 0
    if on_gpus:
        return "ipc" if config.cluster.colocate else "nccl"
    return "shm" if config.cluster.address is None else "gloo"


def engine_arguments(model_path: str, config: Config, seed: int) -> dict[str, Any]:
    """What AsyncLLM is started with."""
    r, cluster = config.rollout, config.cluster
    on_gpu = cluster.engine_gpus > 0
    longest = config.data.max_prompt_tokens + max(r.max_tokens, config.eval.max_tokens or 0)
    # whole prefills on CPU: where one is split, vLLM rewinds the generator of a seeded request,
    # which torch's CPU generator cannot do, and the engine dies
    device = (
        dict(gpu_memory_utilization=r.gpu_memory_utilization)
        if on_gpu
        else dict(
            kv_cache_memory_bytes=int(r.kv_cache_gib * 2**30),
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(longest, 8192),
        )
    )
    return dict(
        model=model_path,
        tokenizer=config.model.tokenizer or model_path,
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype,
        max_model_len=r.max_model_len or longest,
        max_num_seqs=r.max_sequences,
        seed=seed,
        enable_prefix_caching=r.prefix_caching,
        logprobs_mode="processed_logprobs",
        tensor_parallel_size=cluster.tensor_parallel,
        distributed_executor_backend="uni" if cluster.tensor_parallel == 1 else "mp",
        disable_log_stats=True,
        weight_transfer_config={
            "backend": {"nccl": "tandem_nccl", "ipc": "tandem_ipc"}.get(
                transport(config), "tandem_cpu"
            )
        },
        enable_sleep_mode=r.sleep,
        worker_extension_cls="tandem.rollout.vllm.worker.WorkerExtension",
        **device,
    )


def set_environment(config: Config) -> None:
    """Variables that vLLM reads in this process and its children; the user's own values win, except
    for the one that is needed.
    """
    for key, value in dict(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING").items():
        os.environ.setdefault(key, value)
    if transport(config) == "ipc":
        # IPC handles are pickled on their way to vLLM's worker
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if config.cluster.engine_gpus == 0:
        # nobind: vLLM would pin every engine to the same cores. TORCH_COMPILE_DISABLE: a helper of
        # the sampler would compile C++ for 15 s at the first request. V1_MULTIPROCESSING=0:
        # AsyncLLM has its engine process all the same, but vLLM's CPU platform then honours the uni
        # executor, which saves a third process and its start-up
        for key, value in dict(
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            OMP_NUM_THREADS=str(config.cluster.threads),
            TORCH_COMPILE_DISABLE="1",
        ).items():
            os.environ.setdefault(key, value)
        if config.cluster.tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class VllmBackend:
    """See rollout.backend.Backend."""

    def __init__(self, llm, config: Config):
        self.llm, self.config = llm, config
        self.version = 0
        self.updating = False
        # weights or KV cache are not in the GPU's memory: only a finished weight update ends it
        self.asleep = False
        self.broken: str | None = None  # why this engine can never serve again
        self.requests = 0
        self.prompt_tokens = self.cached_tokens = 0
        self.start_seconds: dict[str, float] = {}

    @classmethod
    async def start(
        cls, model_path: str, config: Config, seed: int, log_dir: str | None = None
    ) -> VllmBackend:
        """Start the engine with the weights of `model_path`, which count as version 0.

        `log_dir`: this process's stdout and stderr, its children's too, go to engine.log there;
        None leaves them alone. Takes 10 to 20 s on a CPU, nearly all of it two imports of vLLM
        (`start_seconds`).
        """
        set_environment(config)
        if log_dir is not None:
            from tandem.engine.core.process import redirect_output

            redirect_output(Path(log_dir) / "engine.log")
        begin = time.perf_counter()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        import tandem.rollout.vllm.worker  # noqa: F401  registers the transports; vLLM checks their names here as well

        imported = time.perf_counter()
        backend = cls(
            AsyncLLM.from_engine_args(
                AsyncEngineArgs(**engine_arguments(model_path, config, seed))
            ),
            config,
        )
        await backend.llm.update_weight_version("0")
        await backend.llm.collective_rpc("tandem_die_with", args=(os.getpid(),))
        backend.start_seconds = {
            "import": imported - begin,
            "engine": time.perf_counter() - imported,
        }
        return backend

    # -- generation

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        """All samples of one request, in order.

        Raises EngineDied; the request may then be re-issued elsewhere.
        """
        await self.health()
        self.must_be_awake("generate")
        seed = (
            None
            if request.sampling.seed is None
            else int(
                np.random.SeedSequence([request.sampling.seed, request.group]).generate_state(1)[0]
                >> 1
            )
        )
        prefixes = request.prefixes
        if prefixes and len(prefixes) != request.samples:
            raise ValueError(
                f"group {request.group}: {len(prefixes)} prefixes for {request.samples} "
                "samples; give one per sample (may be empty) or none"
            )
        if not prefixes and request.sampling.temperature == 0:
            prefixes = ((),) * request.samples  # vLLM refuses n > 1 for greedy samples
        if prefixes:
            jobs = [
                self.run(request, np.asarray(p, np.int32), 1, None if seed is None else seed + i)
                for i, p in enumerate(prefixes)
            ]
            return tuple(t for part in await asyncio.gather(*jobs) for t in part)
        return tuple(await self.run(request, np.zeros(0, np.int32), request.samples, seed))

    async def run(
        self, request: GenRequest, prefix: np.ndarray, samples: int, seed: int | None
    ) -> list[Trajectory]:
        """`samples` continuations of prompt + prefix; they share the prompt's keys and values."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        sampling = request.sampling
        room = sampling.max_tokens - len(prefix)
        if room < 1:
            return [trajectory(request, prefix) for _ in range(samples)]
        params = SamplingParams(
            n=samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=room,
            seed=seed,
            min_tokens=min(room, max(0, sampling.min_tokens - len(prefix))),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(request.prompt.tokens.tolist() + prefix.tolist())
        self.requests += 1
        try:
            async for answer in self.llm.generate(
                prompt, params, request_id=f"{request.group}.{request.attempt}.{self.requests}"
            ):
                final = answer
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine process died: {error}") from error
        self.prompt_tokens += len(final.prompt_token_ids)
        self.cached_tokens += final.num_cached_tokens or 0
        return [trajectory(request, prefix, output) for output in final.outputs]

    async def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n - 1]: the log-prob of each token after those before it, at temperature 1.

        Computed anew, whatever the prefix cache holds.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        await self.health()
        self.must_be_awake("score")
        self.requests += 1
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        try:
            async for answer in self.llm.generate(
                tokens_input(tokens.tolist()), params, request_id=f"score.{self.requests}"
            ):
                final = answer
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine process died: {error}") from error
        pairs = zip(tokens.tolist(), final.prompt_logprobs, strict=False)
        scores = [found[token].logprob for token, found in pairs if found is not None]
        return np.array(scores, np.float32)

    async def abort(self, request: GenRequest) -> None:
        """Let a running request end now: its samples that had not ended come back as they are, with
        Finish.ABORT. One that is not running is left alone.
        """
        known, mine = (
            self.llm.output_processor,
            lambda r: r.external_req_id.startswith(f"{request.group}.{request.attempt}."),
        )
        # by vLLM's own ids: aborted by the id that it was given, a request with n > 1 would leave
        # the parent of its samples behind, with all their tokens
        ids = [i for i, parent in known.parent_requests.items() if mine(parent)]
        ids += [
            i
            for i, state in known.request_states.items()
            if state.parent_req is None and mine(state)
        ]
        await self.llm.abort(ids, internal=True)

    # -- weights

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.health()
        await self.ask(self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    async def start_weight_update(self) -> None:
        await self.health()
        self.updating = True
        async with self.or_broken("start"):
            if self.asleep:
                await self.ask(self.llm.wake_up(tags=["weights"]))
            # pause_generation would do the same and sleep for 20 ms, a fifth of a small model's
            # weight sync
            await self.ask(
                self.llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            )
            await self.ask(self.llm.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.health()
        async with self.or_broken("receive"):
            await self.ask(self.llm.update_weights(WeightTransferUpdateRequest(update_info)))

    async def finish_weight_update(self, version: int) -> Installed:
        await self.health()
        async with self.or_broken("finish"):
            self.all_equal(
                await self.ask(self.llm.collective_rpc("tandem_missing")),
                [],
                f"weights {version} are incomplete, the engine still has old values in",
            )
            await self.ask(self.llm.finish_weight_update(weight_version=str(version)))
            stamp = await self.ask(self.llm.get_weight_version())
            if stamp != str(version):
                raise SyncError(
                    f"vLLM stamps tokens with weight version {stamp} after weights {version} "
                    "were installed"
                )
            self.all_equal(
                await self.ask(self.llm.collective_rpc("tandem_stale_heads")),
                [],
                f"with weights {version} the engine still computes with the old weights in",
            )
            if not await self.ask(self.llm.reset_prefix_cache(reset_running_requests=True)):
                raise SyncError(
                    f"vLLM did not reset its prefix cache after weights {version}: it would "
                    "serve keys and values of older weights"
                )
            received = await self.ask(self.llm.collective_rpc("tandem_received"))
            self.all_equal(
                received,
                received[0],
                f"tensor-parallel workers received different weights {version}:",
            )
            if self.asleep:
                await self.wake_kv_cache()
            held = await self.held_digest()
            await self.ask(self.llm.resume_generation())
            self.version, self.updating = version, False
        return Installed(received[0], int(stamp), held)

    def or_broken(self, phase: str) -> BrokenOnError:
        return BrokenOnError(self, phase)

    @staticmethod
    def all_equal(answers: list[Any], expected: Any, complaint: str) -> None:
        """Raise SyncError with the first differing answer of a worker."""
        for rank, answer in enumerate(answers):
            if answer != expected:
                raise SyncError(f"{complaint} {answer} (worker {rank})")

    async def weight_version(self) -> int:
        await self.health()
        return int(await self.ask(self.llm.get_weight_version()))

    async def held_digest(self) -> str:
        """One digest over the weights all workers compute with; on a CPU with the limits of
        WorkerExtension.tandem_held.
        """
        await self.health()
        self.must_be_awake("digest its weights")
        held = await self.ask(self.llm.collective_rpc("tandem_held"))
        return combine(
            {
                f"{rank}:{name}": value
                for rank, worker in enumerate(held)
                for name, value in worker.items()
            }
        )

    # -- sleep

    async def sleep(self) -> None:
        """Give the GPU's memory back until the next weight update: start_weight_update wakes the
        weights, finish_weight_update the KV cache, so that the cache is not there yet while layers
        are gathered and sent. Nothing to do if asleep. No request may be running.

        Level 1: vLLM keeps the weights in host memory. Level 2 would drop them, and save that
        memory and two copies over PCIe per step; but it brings back only registered buffers besides
        what the update writes, and a plain tensor that a layer derived from its weights would be
        garbage without a word. Either way nothing generates before an update has ended well: a step
        whose gradient was not finite, or SFT steps without a sync, leave the engine asleep.

        Has not been run on a GPU yet; vLLM has no sleep mode on CPUs.
        """
        await self.health()
        if self.updating:
            raise SyncError("the engine was told to sleep in the middle of a weight update")
        if not self.asleep:
            self.asleep = True
            await self.ask(self.llm.sleep(level=1))

    async def wake_kv_cache(self) -> None:
        """The last of waking up. vLLM resumes its scheduler with it; it has no requests."""
        if not await self.ask(self.llm.wake_up(tags=["kv_cache"])):
            raise SyncError(
                "vLLM has not got all of its GPU memory back after wake_up of weights and kv_cache"
            )
        self.asleep = False

    def must_be_awake(self, wish: str) -> None:
        if self.asleep:
            raise SyncError(
                f"the engine was asked to {wish} while it sleeps (rollout.sleep): it has "
                "nothing on its GPU before the next weight update"
            )

    # -- life

    async def health(self) -> None:
        if self.broken is not None:
            raise EngineDied(self.broken)
        if self.llm.errored:
            raise EngineDied("vLLM's engine process died")

    async def ask(self, call: Awaitable[Any]) -> Any:
        """Await a control call to vLLM, or raise EngineDied: vLLM leaves calls unanswered for ever
        when its engine process dies under them.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(call)
        while not (await asyncio.wait({task}, timeout=0.2))[0]:
            if self.llm.errored:
                task.cancel()
                raise EngineDied("vLLM's engine process died")
        try:
            return task.result()
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine process died: {error}") from error

    async def close(self) -> None:
        self.broken = self.broken or "the engine was closed"
        if self.llm is not None:
            self.llm.shutdown(timeout=10)
            self.llm = None


class BrokenOnError:
    """`async with`: any error inside makes the engine unusable, since it may have been left between
    two sets of weights.
    """

    def __init__(self, backend: VllmBackend, phase: str):
        self.backend, self.phase = backend, phase

    async def __aenter__(self):
        pass

    async def __aexit__(self, kind, error, trace):
        if error is not None:
            self.backend.broken = (
                f"a weight update failed ({self.phase}): {type(error).__name__}: {error}"
            )
            if not isinstance(error, (SyncError, EngineDied)):
                raise SyncError(self.backend.broken) from error


def trajectory(request: GenRequest, prefix: np.ndarray, output=None) -> Trajectory:
    """vLLM's CompletionOutput as a Trajectory; without one the prefix is the whole response (it
    left no room to sample).
    """
    ids = np.array(output.token_ids if output else [], np.int32)
    given = len(request.prompt.tokens) + len(prefix)
    length = given + len(ids)
    source = np.full(length, Source.POLICY, np.int8)
    source[: len(request.prompt.tokens)], source[len(request.prompt.tokens) : given] = (
        Source.PROMPT,
        request.prefix_source,
    )
    logp, version = np.full(length, np.nan, np.float32), np.full(length, -1, np.int32)
    if len(ids):
        if (
            len(output.logprobs.logprobs) != len(ids)
            or output.logprobs.token_ids != list(output.token_ids)
            or output.weight_versions is None
        ):
            raise RuntimeError(
                f"group {request.group}: vLLM gave {len(ids)} tokens, "
                f"{len(output.logprobs.logprobs)} log-probs and weight versions "
                f"{output.weight_versions}; expected one of each per token"
            )
        logp[given:] = output.logprobs.logprobs
        for span in output.weight_versions:
            version[given + span.start : given + span.end] = int(span.version)
    return Trajectory(
        prompt_id=request.prompt.id,
        tokens=np.concatenate([request.prompt.tokens, prefix, ids]).astype(np.int32),
        source=source,
        finish=FINISH.get(output.finish_reason, Finish.ABORT) if output else Finish.LENGTH,
        behaviour_logp=logp,
        version=version,
        group=request.group,
    )
