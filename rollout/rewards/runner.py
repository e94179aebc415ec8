"""Scoring in worker processes that can be killed, as groups arrive.

A call that hangs or crashes costs its own sample and nobody else's. Nothing is ever scored 0 for a
failure: the outcome says timeout, exception, not_finite, arity or crash, and the run stops with the
first tracebacks when such outcomes exceed reward.max_error_rate.
"""

from __future__ import annotations

import atexit
import pickle
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.paths import process_kept, shown_code
from tandem.engine.config.schema import RewardConfig
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.loading import UserCode
from tandem.engine.core.types import Prompt, RewardOutcome
from tandem.rollout.rewards.api import Call, Reply, RewardFunction, Signature
from tandem.rollout.rewards.environment import worker_environment
from tandem.rollout.rewards.functions import load_functions
from tandem.rollout.rewards.limits import memory_limit
from tandem.rollout.rewards.log import BoundedLog
from tandem.rollout.rewards.outcomes import Judged, Part, judge
from tandem.rollout.rewards.worker_thread import Shared, Task, Worker, packed

MIN_SAMPLES = 20  # scored samples before the error rate can stop a run
FIRST_FAILURES = 10  # tracebacks kept

Replies = Mapping[tuple[int, int], Future[Reply]]  # by function and first sample


class RewardFailure(RuntimeError):
    """More than reward.max_error_rate of the samples could not be scored."""


class RewardRunner:
    """Scores groups with every function of `reward.functions`.

    Thread-safe. Raises ConfigError if a function cannot be used.

    `inline` calls the functions in this process, so that breakpoint() works in them; there is no
    deadline then and a crash is a crash. `log` is the file for what workers print; by default they
    print where this process does.
    """

    def __init__(
        self,
        config: RewardConfig,
        seed: int = 0,
        *,
        inline: bool = False,
        log: Path | None = None,
    ):
        self.config = config
        self.weights = config.weights or (1.0,) * len(config.functions)
        # as parts and metrics call them
        self.names = [shown_code(name) for name in config.functions]
        self.scored = 0
        self.failed = 0
        self.failure: RewardFailure | None = None
        self.first_failures: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.functions: tuple[RewardFunction, ...] = ()  # of this process
        self.signatures: Sequence[Signature] = ()
        with process_kept():
            if inline:
                self.functions = load_functions(config, seed)
                self.signatures = [function.signature for function in self.functions]
                return
        self.start_workers(seed, log)

    def start_workers(self, seed: int, log: Path | None) -> None:
        """Raises ConfigError if they cannot import the functions."""
        shared = Shared(
            self.config,
            seed,
            memory_limit(self.config.memory_gib),
            worker_environment(self.config.environment),
            BoundedLog(log) if log else None,
            self.tasks,
            self.closing,
            UserCode(),
        )
        self.workers = [Worker(shared) for _ in range(self.config.workers)]
        atexit.register(self.close)
        ready = []
        answers = [worker.ready.get() for worker in self.workers]
        for answer in answers:
            if isinstance(answer, str):
                self.close()
                raise ConfigError(answer)
            ready.append(answer)
        self.signatures, shared.code = ready[0]

    @property
    def error_rate(self) -> float:
        """Share of all samples so far that could not be scored."""
        return self.failed / max(self.scored, 1)

    def require_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise ConfigError if a dataset row lacks a column that some function needs."""
        for signature in self.signatures:
            missing = signature.missing(columns)
            if missing:
                raise ConfigError(missing)

    def submit(
        self,
        prompt: Prompt,
        texts: Sequence[str],
        completion_ids: Sequence[np.ndarray],
    ) -> Future[tuple[RewardOutcome, ...]]:
        """Score all samples of one prompt; returns at once. The future has one outcome per text.

        Raises RewardFailure, here and from the future, once too many samples of the run could not
        be scored.
        """
        if self.failure:
            raise self.failure
        result: Future[tuple[RewardOutcome, ...]] = Future()
        if not texts:
            result.set_result(())
            return result
        calls = list(self.calls(prompt, texts, completion_ids))
        replies: dict[tuple[int, int], Future[Reply]] = {}
        lock = threading.Lock()

        def arrived(number: int, call: Call, reply: Future[Reply]) -> None:
            with lock:
                replies[number, call.first] = reply
                complete = len(replies) == len(calls)
            if complete:
                try:
                    self.finish(result, prompt, len(texts), replies)
                # a future's callback would only log it, and the group would be waited for forever
                except Exception as error:
                    result.set_exception(error)

        for number, call in calls:
            self.call(number, call).add_done_callback(
                lambda reply, number=number, call=call: arrived(number, call, reply)
            )
        return result

    def calls(
        self,
        prompt: Prompt,
        texts: Sequence[str],
        completion_ids: Sequence[np.ndarray],
    ) -> Iterator[tuple[int, Call]]:
        """(number of the function, call): one per sample, or one per group where it takes that."""
        for number, signature in enumerate(self.signatures):
            step = len(texts) if signature.per_group else 1
            for first in range(0, len(texts), step):
                end = first + step
                call = Call(
                    prompt_id=prompt.id,
                    prompt=prompt.content,
                    columns=prompt.columns,
                    texts=tuple(texts[first:end]),
                    completion_ids=tuple(completion_ids[first:end]),
                    first=first,
                )
                yield number, call

    def call(self, number: int, call: Call) -> Future[Reply]:
        """One call of one function."""
        reply: Future[Reply] = Future()
        if self.closing.is_set():
            reply.cancel()
        elif self.functions:
            # as in a worker: its changes stay its own
            _, copy = pickle.loads(packed(number, call))
            with stop.computing():
                answer = self.functions[number](copy)
            reply.set_result(answer)
        else:
            self.tasks.put(Task(number, call, reply))
        return reply

    def finish(
        self,
        result: Future[tuple[RewardOutcome, ...]],
        prompt: Prompt,
        samples: int,
        replies: Replies,
    ) -> None:
        """All calls of a group are back: add up, count failures, hand over."""
        if any(reply.cancelled() for reply in replies.values()):
            result.cancel()
            return
        for reply in replies.values():
            error = reply.exception()
            if error is not None:
                result.set_exception(error)
                return
        functions = ", ".join(self.config.functions)
        judged = []
        for i in range(samples):
            sample = f"prompt {prompt.id!r}, sample {i}"
            parts = self.parts(i, replies)
            judged.append(judge(sample, parts, functions))
        self.count(judged)
        if self.failure:
            result.set_exception(self.failure)
        else:
            result.set_result(tuple(one.outcome for one in judged))

    def parts(self, sample: int, replies: Replies) -> list[Part]:
        """What each function said of a sample."""
        parts = []
        for number, signature in enumerate(self.signatures):
            first = 0 if signature.per_group else sample
            reply = replies[number, first].result()
            value = reply.values[sample - first]
            name = self.names[number]
            weight = self.weights[number]
            parts.append(Part(name, weight, value, reply.traceback))
        return parts

    def count(self, judged: Sequence[Judged]) -> None:
        with self.lock:
            self.scored += len(judged)
            for one in judged:
                self.failed += one.outcome.error is not None
                self.first_failures += one.complaints
            del self.first_failures[FIRST_FAILURES:]
            bound = self.config.max_error_rate
            too_early = self.scored < MIN_SAMPLES
            if self.failure or too_early or self.error_rate <= bound:
                return
            self.failure = RewardFailure(
                f"{self.failed} of {self.scored} samples could not be scored, more than "
                f"reward.max_error_rate {bound}; "
                "repair the reward or raise that bound. The first failures:\n\n"
                + "\n\n".join(self.first_failures)
            )

    def close(self) -> None:
        """Kill all workers and what they started; unfinished futures are cancelled."""
        self.closing.set()
        atexit.unregister(self.close)
        for _ in self.workers:
            self.tasks.put(None)
        for worker in self.workers:
            worker.join()
        while not self.tasks.empty():
            task = self.tasks.get()
            if task is not None:
                task.reply.cancel()
