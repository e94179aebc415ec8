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
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import Finish, GenRequest, Trajectory
from tandem.engine.weights.digest import combine
from tandem.rollout.backend import Backend, CacheCounts
from tandem.rollout.trajectories import prefixes_of, trajectory
from tandem.rollout.vllm.arguments import engine_arguments, set_environment
from tandem.rollout.vllm.outputs import sampled

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

LOOK_SECONDS = 0.2  # between two looks at whether vLLM's process still lives
CLOSE_SECONDS = 10
NOTHING = np.zeros(0, np.int32)


class VllmBackend(Backend):
    joins_transfer = True

    def __init__(self, llm: AsyncLLM, config: Config):
        self.llm = llm
        self.config = config
        self.version = 0
        self.updating = False
        # weights or KV cache are not in the GPU's memory: only a finished weight update ends it
        self.asleep = False
        self.broken: str | None = None  # why this engine can never serve again
        self.closed = False
        self.requests = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @classmethod
    async def start(cls, model_path: str, config: Config, seed: int) -> VllmBackend:
        """Takes 10 to 20 s on a CPU, nearly all of it two imports of vLLM; the output says how
        much.
        """
        set_environment(config)
        began = time.perf_counter()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        # registers the transports; vLLM checks their names in this process as well
        import tandem.rollout.vllm.worker  # noqa: F401

        imported = time.perf_counter()
        arguments = AsyncEngineArgs(**engine_arguments(model_path, config, seed))
        backend = cls(AsyncLLM.from_engine_args(arguments), config)
        await backend.llm.update_weight_version("0")
        await backend.llm.collective_rpc("tandem_die_with", args=(os.getpid(),))
        up = time.perf_counter()
        print(f"engine up: import {imported - began:.1f}, engine {up - imported:.1f}", flush=True)
        return backend

    # -- generation

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        """Raises EngineDied; the request may then be re-issued elsewhere."""
        await self.health()
        self.must_be_awake("generate")
        prefixes = prefixes_of(request)
        seed = seed_of(request)
        greedy = request.sampling.temperature == 0  # vLLM refuses n > 1 for greedy samples
        if not request.prefixes and not greedy:
            samples = await self.run(request, NOTHING, request.samples, seed)
            return tuple(samples)
        jobs = []
        for i, prefix in enumerate(prefixes):
            own_seed = None if seed is None else seed + i
            jobs.append(self.run(request, prefix, 1, own_seed))
        answers = await asyncio.gather(*jobs)
        return tuple(sample for (sample,) in answers)

    async def run(
        self,
        request: GenRequest,
        prefix: np.ndarray,
        samples: int,
        seed: int | None,
    ) -> list[Trajectory]:
        """`samples` continuations of prompt + prefix; they share the prompt's keys and values."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        most = sampling.max_tokens - len(prefix)
        if most < 1:  # the prefix is the whole response
            whole = trajectory(request, prefix, NOTHING, np.zeros(0), 0, Finish.LENGTH)
            return [whole] * samples
        least = max(0, sampling.min_tokens - len(prefix))
        params = SamplingParams(
            n=samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=most,
            seed=seed,
            min_tokens=min(most, least),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = request.prompt.tokens.tolist() + prefix.tolist()
        final = await self.complete(tokens, params, f"{request.group}.{request.attempt}")
        self.prompt_tokens += len(final.prompt_token_ids or ())
        self.cached_tokens += final.num_cached_tokens or 0
        return [sampled(request, prefix, output) for output in final.outputs]

    async def complete(self, tokens: list[int], params: SamplingParams, name: str) -> RequestOutput:
        """vLLM's answer to a request of `name`, which need not be unique. Raises EngineDied."""
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        self.requests += 1
        answers = self.llm.generate(
            tokens_input(tokens), params, request_id=f"{name}.{self.requests}"
        )
        final = None
        try:
            async for answer in answers:
                final = answer
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine process died: {error}") from error
        if final is None:
            raise RuntimeError(f"vLLM ended the request {name} without an answer")
        return final

    async def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        from vllm import SamplingParams

        await self.health()
        self.must_be_awake("score")
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        final = await self.complete(tokens.tolist(), params, "score")
        scores = []
        # vLLM has none for the first token
        by_token = final.prompt_logprobs or ()
        for token, found in zip(tokens.tolist(), by_token, strict=False):
            if found is not None:
                scores.append(found[token].logprob)
        return np.array(scores, np.float32)

    async def abort(self, request: GenRequest) -> None:
        known = self.llm.output_processor
        name = f"{request.group}.{request.attempt}."
        # by vLLM's own ids: aborted by the id that it was given, a request with n > 1 would leave
        # the parent of its samples behind, with all their tokens
        ids = [
            number
            for number, parent in known.parent_requests.items()
            if parent.external_req_id.startswith(name)
        ]
        for number, state in known.request_states.items():
            if state.parent_req is None and state.external_req_id.startswith(name):
                ids.append(number)
        await self.llm.abort(ids, internal=True)

    async def cache_counts(self) -> CacheCounts:
        return CacheCounts(self.prompt_tokens, self.cached_tokens)

    # -- weights

    @property
    def transfer_ranks(self) -> int:
        return self.config.cluster.tensor_parallel

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.health()
        request = WeightTransferInitRequest(init_info)
        await self.ask(self.llm.init_weight_transfer_engine(request))

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
            request = WeightTransferUpdateRequest(update_info)
            await self.ask(self.llm.update_weights(request))

    async def finish_weight_update(self, version: int) -> Installed:
        await self.health()
        async with self.or_broken("finish"):
            all_equal(
                await self.ask_workers("tandem_missing"),
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
            all_equal(
                await self.ask_workers("tandem_stale_heads"),
                [],
                f"with weights {version} the engine still computes with the old weights in",
            )
            reset = self.llm.reset_prefix_cache(reset_running_requests=True)
            if not await self.ask(reset):
                raise SyncError(
                    f"vLLM did not reset its prefix cache after weights {version}: it would "
                    "serve keys and values of older weights"
                )
            received = await self.ask_workers("tandem_received")
            all_equal(
                received,
                received[0],
                f"tensor-parallel workers received different weights {version}:",
            )
            if self.asleep:
                await self.wake_kv_cache()
            active = await self.active_digest()
            await self.ask(self.llm.resume_generation())
            self.version = version
            self.updating = False
        return Installed(received[0], int(stamp), active)

    def or_broken(self, phase: str) -> BrokenOnError:
        return BrokenOnError(self, phase)

    async def weight_version(self) -> int:
        await self.health()
        stamp = await self.ask(self.llm.get_weight_version())
        return int(stamp)

    async def active_digest(self) -> str:
        """Over the weights of all workers; on a CPU with the limits of
        WorkerExtension.tandem_digests.
        """
        await self.health()
        self.must_be_awake("digest its weights")
        digests = {}
        workers = await self.ask_workers("tandem_digests")
        for rank, worker in enumerate(workers):
            for name, value in worker.items():
                digests[f"{rank}:{name}"] = value
        return combine(digests)

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
        awake = await self.ask(self.llm.wake_up(tags=["kv_cache"]))
        if not awake:
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

    async def ask_workers(self, method: str) -> list[Any]:
        """What the method of WorkerExtension answers in each worker."""
        return await self.ask(self.llm.collective_rpc(method))

    async def ask(self, call: Awaitable[Any]) -> Any:
        """Await a control call to vLLM, or raise EngineDied: vLLM leaves calls unanswered forever
        when its engine process dies under them.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(call)
        while not (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
            if self.llm.errored:
                task.cancel()
                raise EngineDied("vLLM's engine process died")
        try:
            return task.result()
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine process died: {error}") from error

    async def close(self) -> None:
        self.broken = self.broken or "the engine was closed"
        if not self.closed:
            self.closed = True
            self.llm.shutdown(timeout=CLOSE_SECONDS)


class BrokenOnError:
    """`async with`: any error inside makes the engine unusable, since it may have been left between
    two sets of weights.
    """

    def __init__(self, backend: VllmBackend, phase: str):
        self.backend = backend
        self.phase = phase

    async def __aenter__(self):
        pass

    async def __aexit__(self, kind, error, trace):
        if error is not None:
            self.backend.broken = (
                f"a weight update failed ({self.phase}): {type(error).__name__}: {error}"
            )
            if not isinstance(error, (SyncError, EngineDied)):
                raise SyncError(self.backend.broken) from error


def all_equal(answers: list[Any], expected: Any, complaint: str) -> None:
    """Raise SyncError with the first differing answer of a worker."""
    for rank, answer in enumerate(answers):
        if answer != expected:
            raise SyncError(f"{complaint} {answer} (worker {rank})")


def seed_of(request: GenRequest) -> int | None:
    """Of the request's own samples, from the run's seed and the group; None without one."""
    if request.sampling.seed is None:
        return None
    entropy = [request.sampling.seed, request.group]
    sequence = np.random.SeedSequence(entropy)
    state = sequence.generate_state(1)
    return int(state[0] >> 1)
