"""Scoring in worker processes that can be killed, as groups arrive.

One thread per worker process: it hands the process one call, waits until the deadline, and if there
is no answer kills the process with all it started and starts another. A call that hangs or crashes
costs its own sample and nobody else's. Nothing is ever scored 0 for a failure: the outcome says
timeout, exception, not_finite, arity or crash, and the run stops with the first tracebacks when
such outcomes exceed reward.max_error_rate.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.paths import process_kept, shown_code
from tandem.engine.config.schema import RewardConfig
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.loading import UserCode
from tandem.engine.core.types import Prompt, RewardError, RewardOutcome
from tandem.rollout.rewards import values
from tandem.rollout.rewards.api import Call, Reply, Signature, load_functions
from tandem.rollout.rewards.environment import hint, worker_environment
from tandem.rollout.rewards.limits import TooMuchMemory, Wear, largest, memory_limit
from tandem.rollout.rewards.log import BoundedLog
from tandem.rollout.rewards.values import short

START_SECONDS = 120  # for a worker to import the reward functions
GRACE_SECONDS = 0.5  # between SIGTERM and SIGKILL
SLICE_SECONDS = 0.1  # how often a waiting thread looks whether its process still lives
MIN_SAMPLES = 20  # scored samples before the error rate can stop a run
FIRST_FAILURES = 10  # tracebacks kept


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
        self, config: RewardConfig, seed: int = 0, *, inline: bool = False, log: Path | None = None
    ):
        self.config, self.seed, self.log = config, seed, log
        self.weights = config.weights or (1.0,) * len(config.functions)
        self.scored = self.failed = 0
        self.failure: RewardFailure | None = None
        self.first_failures: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.memory = memory_limit(config.memory_gib)
        # as the first workers imported it: those that replace them score with the same, whatever
        # became of the files
        self.code = UserCode()
        # as parts and metrics call them
        self.names = [shown_code(name) for name in config.functions]
        with process_kept():
            self.functions = load_functions(config, seed) if inline else ()
        if inline:
            self.signatures: Sequence[Signature] = [f.signature for f in self.functions]
            return
        self.environment = worker_environment(config.environment)
        self.output = BoundedLog(log) if log else None
        self.workers = [Worker(self) for _ in range(config.workers)]
        atexit.register(self.close)
        answers = [worker.ready.get() for worker in self.workers]
        if refusal := next((a for a in answers if isinstance(a, str)), None):
            self.close()
            raise ConfigError(refusal)
        self.signatures, self.code = answers[0]

    @property
    def error_rate(self) -> float:
        """Share of all samples so far that could not be scored."""
        return self.failed / max(self.scored, 1)

    def require_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise ConfigError if a dataset row lacks a column that some function cannot do without."""
        for signature in self.signatures:
            if missing := signature.missing(columns):
                raise ConfigError(missing)

    def submit(
        self, prompt: Prompt, texts: Sequence[str], completion_ids: Sequence[np.ndarray]
    ) -> Future[tuple[RewardOutcome, ...]]:
        """Score all samples of one prompt; returns at once. The future has one outcome per text.

        Raises RewardFailure, here and from the future, once too many samples of the run could not
        be scored.
        """
        if self.failure:
            raise self.failure
        result: Future = Future()
        if not texts:
            result.set_result(())
            return result
        calls = []  # (function number, call)
        for number, signature in enumerate(self.signatures):
            step = len(texts) if signature.per_group else 1
            calls += [
                (
                    number,
                    Call(
                        prompt.id,
                        prompt.content,
                        prompt.columns,
                        tuple(texts[i : i + step]),
                        tuple(completion_ids[i : i + step]),
                        i,
                    ),
                )
                for i in range(0, len(texts), step)
            ]
        replies: dict[tuple[int, int], Future] = {}  # by function and first sample
        lock = threading.Lock()

        def arrived(number: int, call: Call, reply: Future) -> None:
            with lock:
                replies[number, call.first] = reply
                complete = len(replies) == len(calls)
            if complete:
                try:
                    self.finish(result, prompt, len(texts), replies)
                # a future's callback would only log it, and the group would be waited for for ever
                except Exception as error:
                    result.set_exception(error)

        for number, call in calls:
            self.call(number, call).add_done_callback(
                lambda reply, number=number, call=call: arrived(number, call, reply)
            )
        return result

    def call(self, number: int, call: Call) -> Future[Reply]:
        """One call of one function."""
        reply: Future = Future()
        if self.closing.is_set():
            reply.cancel()
        elif self.functions:
            # as in a worker: its changes stay its own
            _, copy = pickle.loads(packed(number, call))
            with stop.computing():
                answer = self.functions[number](copy)
            reply.set_result(answer)
        else:
            self.tasks.put((number, call, reply))
        return reply

    def finish(
        self,
        result: Future,
        prompt: Prompt,
        samples: int,
        replies: Mapping[tuple[int, int], Future],
    ) -> None:
        """All calls of a group are back: add up, count failures, hand over."""
        if any(reply.cancelled() for reply in replies.values()):
            result.cancel()
            return
        if error := next((e for reply in replies.values() if (e := reply.exception())), None):
            result.set_exception(error)
            return
        outcomes, traces = [], []
        for i in range(samples):
            parts: dict[str, float] = {}
            errors: list[RewardError] = []
            weighted: list[tuple[float, float]] = []
            for number, (name, signature, weight) in enumerate(
                zip(self.names, self.signatures, self.weights, strict=True)
            ):
                first = 0 if signature.per_group else i
                reply = replies[number, first].result()
                value = reply.values[i - first]
                if isinstance(value, RewardError):
                    errors.append(value)
                    traces.append(
                        (
                            f"prompt {prompt.id!r}, sample {i}, reward {value.function!r}: "
                            f"{value.kind}: {value.message}\n{reply.traceback}"
                        ).rstrip()
                    )
                elif value is not None:
                    parts[name] = value
                    weighted.append((weight, value))
            if not parts and not errors:
                errors.append(
                    RewardError(
                        "not_finite",
                        "every function returned None, so no reward applies to this sample",
                        ", ".join(self.config.functions),
                    )
                )
                traces.append(f"prompt {prompt.id!r}, sample {i}: {errors[0].message}")
            total = values.weighted_sum(weighted)
            if not errors and isinstance(total, values.Failure):
                errors.append(
                    RewardError(total.kind, total.message, ", ".join(self.config.functions))
                )
                traces.append(
                    f"prompt {prompt.id!r}, sample {i}: {total.message}; the parts: {parts}, "
                    f"reward.weights {list(self.weights)}"
                )
            outcomes.append(
                RewardOutcome(None if errors else total, parts, errors[0] if errors else None)
            )
        self.count(outcomes, traces)
        if self.failure:
            result.set_exception(self.failure)
        else:
            result.set_result(tuple(outcomes))

    def count(self, outcomes: Sequence[RewardOutcome], traces: Sequence[str]) -> None:
        with self.lock:
            self.scored += len(outcomes)
            self.failed += sum(o.error is not None for o in outcomes)
            self.first_failures += traces[: FIRST_FAILURES - len(self.first_failures)]
            if (
                self.failure is None
                and self.scored >= MIN_SAMPLES
                and self.error_rate > self.config.max_error_rate
            ):
                self.failure = RewardFailure(
                    f"{self.failed} of {self.scored} samples could not be scored, more than "
                    f"reward.max_error_rate {self.config.max_error_rate}; "
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
            if task := self.tasks.get():
                task[2].cancel()


def packed(number: int, call: Call) -> bytes:
    """A call as it goes to a worker. Raises ConfigError for a row that cannot be sent."""
    try:
        return pickle.dumps((number, call))
    except Exception as error:  # of whatever kind: the row decides
        raise ConfigError(
            f"prompt {call.prompt_id!r}: its columns cannot be sent to a reward worker: "
            f"{short(error)}; columns must be plain values"
        ) from None


class Worker(threading.Thread):
    """A thread that owns one worker process.

    The thread starts the process itself: PR_SET_PDEATHSIG tells a child of the death of the thread
    that made it.
    """

    def __init__(self, runner: RewardRunner):
        super().__init__(name="reward-worker", daemon=True)
        self.runner = runner
        # what the first start_process returned
        self.ready: queue.SimpleQueue = queue.SimpleQueue()
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None
        self.printing: threading.Thread | None = None  # reads what the process prints
        self.wear = Wear()
        self.start()

    def run(self) -> None:
        try:
            self.ready.put(self.start_process())
        except OSError as error:
            self.ready.put(f"a reward worker could not be started: {error}")
        while (task := self.runner.tasks.get()) is not None and not self.runner.closing.is_set():
            number, call, reply = task
            try:
                answer = self.score(number, call)
            # the thread must go on, and whoever waits for the reply must hear of it
            except Exception as error:
                reply.set_exception(error)
                continue
            if self.runner.closing.is_set():
                reply.cancel()
            else:
                reply.set_result(answer)
        if task is not None:
            task[2].cancel()
        self.kill()

    def score(self, number: int, call: Call) -> Reply:
        """One call, its deadline included. Raises ConfigError for a row that cannot be sent."""
        message = packed(number, call)
        name = self.runner.signatures[number].name

        def failed(kind, text):
            return Reply((RewardError(kind, text, name),) * len(call.texts))

        if self.process is None or self.process.poll() is not None:
            self.kill()
            if isinstance(answer := self.start_process(), str):
                return failed("crash", f"no reward worker could be started: {answer}")
        try:
            self.connection.send_bytes(message)
            answer = self.receive(self.runner.config.timeout)
        except (EOFError, ConnectionError):
            return failed("crash", f"the worker process died ({self.bury()})")
        except (TimeoutError, BlockingIOError):
            self.kill()
            return failed(
                "timeout", f"no answer within reward.timeout, {self.runner.config.timeout:g} s"
            )
        except TooMuchMemory as error:
            self.kill()
            return failed("crash", str(error))
        except (
            pickle.UnpicklingError,
            ImportError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            MemoryError,
            OSError,
        ) as error:
            self.kill()
            return failed(
                "crash",
                (
                    f"the worker process sent what is no answer ({type(error).__name__}): "
                    "something else wrote to its connection"
                ),
            )
        if isinstance(answer, str):
            raise ConfigError(answer)
        if reason := self.wear.reason(self.process.pid, self.runner.memory):
            self.note(f"worker {self.process.pid} was replaced: {reason}")
            self.kill()
        return self.explained(answer)

    def explained(self, answer: Reply) -> Reply:
        """The reply, its errors with a hint where they speak of an environment variable that
        workers do not have.
        """
        if not any(isinstance(entry, RewardError) for entry in answer.values):
            return answer
        entries = []
        for entry in answer.values:
            if isinstance(entry, RewardError):
                entry = replace(entry, message=hint(entry.message, self.runner.environment))
            entries.append(entry)
        return replace(answer, values=tuple(entries))

    def note(self, text: str) -> None:
        if self.runner.output:
            self.runner.output.write(f"[{text}]\n".encode())

    def start_process(self) -> tuple[list[Signature], UserCode] | str:
        """Start a process and let it import the functions.

        Returns their signatures and source, or why it cannot serve.
        """
        self.connection, theirs = Pipe()
        self.wear = Wear()
        set_patience(self.connection, self.runner.config.timeout)
        output, self.printing = self.runner.output.pipe() if self.runner.output else (None, None)
        command = [
            sys.executable,
            "-m",
            "tandem.rollout.rewards.worker",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=self.runner.environment,
            # a session of its own: killed with all it started
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        if output is not None:
            os.close(output)
        try:
            self.connection.send((self.runner.config, self.runner.seed, self.runner.code))
            answer = self.receive(START_SECONDS)
        except (EOFError, ConnectionError):
            answer = (
                f"the reward functions {', '.join(self.runner.config.functions)} killed the "
                f"process that imported them ({self.bury()})"
            )
        except TimeoutError:
            answer = (
                f"importing the reward functions {', '.join(self.runner.config.functions)} took "
                f"longer than {START_SECONDS} s"
            )
        except TooMuchMemory as error:
            answer = (
                f"importing the reward functions {', '.join(self.runner.config.functions)}: {error}"
            )
        if isinstance(answer, str):
            self.kill()
            return hint(answer, self.runner.environment)
        return answer

    def receive(self, seconds: float) -> Any:
        """The process's next message.

        Raises TimeoutError, TooMuchMemory, or EOFError if the process is dead or the runner closes.

        The connection alone does not tell of a death: a child that the reward forked holds it open.
        """
        deadline = time.monotonic() + seconds
        while not self.connection.poll(max(0.0, min(SLICE_SECONDS, deadline - time.monotonic()))):
            if self.runner.closing.is_set() or (
                self.process.poll() is not None and not self.connection.poll()
            ):
                raise EOFError
            if (used := largest(self.process.pid)) > self.runner.memory:
                raise TooMuchMemory(
                    f"the worker process was ended: it used {used / 2**30:.1f} GiB, more "
                    f"than the {self.runner.memory / 2**30:.3g} GiB of reward.memory_gib"
                )
            if time.monotonic() >= deadline:
                raise TimeoutError
        return self.connection.recv()

    def bury(self) -> str:
        """Clear away a process that gave up its connection, and say how it ended."""
        try:
            status = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        if status is None:
            return "it closed its connection"
        return f"signal {signal_name(-status)}" if status < 0 else f"exit code {status}"

    def kill(self) -> None:
        """End the process, if there is one, and everything in its session: terminate, then kill."""
        if self.process is None:
            return
        self.signal_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        self.signal_group(signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.process = None
        if self.printing:
            # its last words, unless a process outside the session holds the pipe
            self.printing.join(GRACE_SECONDS)

    def signal_group(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        # nobody left (macOS says PermissionError when only a zombie is)
        except (ProcessLookupError, PermissionError):
            pass


def set_patience(connection: Connection, seconds: float) -> None:
    """No single read or write on the connection blocks longer: a process that was stopped neither
    takes a long message nor ends one.
    """
    duration = struct.pack("ll", max(1, math.ceil(seconds)), 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, duration)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, duration)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
