"""A thread that owns one worker process: it hands the process one call, waits until the deadline,
and if there is no answer kills the process with all it started and starts another.
"""

from __future__ import annotations

import pickle
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.loading import UserCode
from tandem.engine.core.types import RewardError
from tandem.rollout.rewards.api import Call, Reply, Signature
from tandem.rollout.rewards.environment import hint
from tandem.rollout.rewards.limits import TooMuchMemory, Wear
from tandem.rollout.rewards.log import BoundedLog
from tandem.rollout.rewards.values import short
from tandem.rollout.rewards.worker_process import WorkerProcess

START_SECONDS = 120  # for a worker to import the reward functions
NO_ANSWER = (
    pickle.UnpicklingError,
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    MemoryError,
    OSError,
)  # raised where a message is read that is no answer


# what a process that imported the functions says of them
Started = tuple[list[Signature], UserCode]


@dataclass(frozen=True)
class Task:
    """One call of one function, and where its reply goes."""

    number: int  # of the function
    call: Call
    reply: Future[Reply]


@dataclass
class Shared:
    """What all workers of a runner work from."""

    config: RewardConfig
    seed: int
    memory: int  # bytes that one process may use
    environment: dict[str, str]
    output: BoundedLog | None
    # None ends a worker
    tasks: queue.SimpleQueue[Task | None]
    closing: threading.Event
    # as the first workers imported it: those that replace them score with the same, whatever
    # became of the files
    code: UserCode

    def functions(self) -> str:
        return ", ".join(self.config.functions)


class Worker(threading.Thread):
    """The thread starts the process itself: PR_SET_PDEATHSIG tells a child of the death of the
    thread that made it.
    """

    def __init__(self, shared: Shared):
        super().__init__(name="reward-worker", daemon=True)
        self.shared = shared
        # what the first start_process returned
        self.ready: queue.SimpleQueue[Started | str] = queue.SimpleQueue()
        self.process: WorkerProcess | None = None
        self.wear = Wear()
        self.start()

    def run(self) -> None:
        try:
            self.ready.put(self.start_process())
        except OSError as error:
            self.ready.put(f"a reward worker could not be started: {error}")
        closing = self.shared.closing
        while (task := self.shared.tasks.get()) is not None and not closing.is_set():
            try:
                answer = self.score(task.number, task.call)
            # the thread must go on, and whoever waits for the reply must hear of it
            except Exception as error:
                task.reply.set_exception(error)
                continue
            if closing.is_set():
                task.reply.cancel()
            else:
                task.reply.set_result(answer)
        if task is not None:
            task.reply.cancel()
        self.kill()

    def score(self, number: int, call: Call) -> Reply:
        """One call, its deadline included. Raises ConfigError for a row that cannot be sent."""
        message = packed(number, call)
        name = self.shared.config.functions[number]
        timeout = self.shared.config.timeout

        def failed(kind: str, text: str) -> Reply:
            error = RewardError(kind, text, name)
            return Reply((error,) * len(call.texts))

        if self.process is None or not self.process.alive:
            self.kill()
            refusal = self.start_process()
            if isinstance(refusal, str):
                return failed("crash", f"no reward worker could be started: {refusal}")
        process = self.process
        assert process is not None
        try:
            process.connection.send_bytes(message)
            answer = process.receive(timeout)
        except (EOFError, ConnectionError):
            return failed("crash", f"the worker process died ({self.how_it_ended()})")
        except (TimeoutError, BlockingIOError):
            self.kill()
            return failed("timeout", f"no answer within reward.timeout, {timeout:g} s")
        except TooMuchMemory as error:
            self.kill()
            return failed("crash", str(error))
        except NO_ANSWER as error:
            self.kill()
            return failed(
                "crash",
                f"the worker process sent what is no answer ({type(error).__name__}): "
                "something else wrote to its connection",
            )
        if isinstance(answer, str):
            raise ConfigError(answer)
        reason = self.wear.reason(process.pid, self.shared.memory)
        if reason:
            self.note(f"worker {process.pid} was replaced: {reason}")
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
                words = hint(entry.message, self.shared.environment)
                entry = replace(entry, message=words)
            entries.append(entry)
        return replace(answer, values=tuple(entries))

    def note(self, text: str) -> None:
        if self.shared.output:
            self.shared.output.write(f"[{text}]\n".encode())

    def start_process(self) -> Started | str:
        """Start a process and let it import the functions.

        Returns their signatures and source, or why it cannot serve.
        """
        shared = self.shared
        functions = shared.functions()
        self.wear = Wear()
        process = WorkerProcess(
            environment=shared.environment,
            timeout=shared.config.timeout,
            memory=shared.memory,
            output=shared.output,
            closing=shared.closing,
        )
        self.process = process
        try:
            process.connection.send((shared.config, shared.seed, shared.code))
            answer = process.receive(START_SECONDS)
        except (EOFError, ConnectionError):
            answer = (
                f"the reward functions {functions} killed the process that imported them "
                f"({self.how_it_ended()})"
            )
        except TimeoutError:
            answer = (
                f"importing the reward functions {functions} took longer than {START_SECONDS} s"
            )
        except TooMuchMemory as error:
            answer = f"importing the reward functions {functions}: {error}"
        if isinstance(answer, str):
            self.kill()
            return hint(answer, shared.environment)
        return answer

    def how_it_ended(self) -> str:
        assert self.process is not None
        words = self.process.how_it_ended()
        self.process = None
        return words

    def kill(self) -> None:
        """End the process, if there is one, and everything in its session."""
        if self.process is not None:
            self.process.kill()
            self.process = None


def packed(number: int, call: Call) -> bytes:
    """A call as it goes to a worker. Raises ConfigError for a row that cannot be sent."""
    try:
        return pickle.dumps((number, call))
    except Exception as error:  # of whatever kind: the row decides
        raise ConfigError(
            f"prompt {call.prompt_id!r}: its columns cannot be sent to a reward worker: "
            f"{short(error)}; columns must be plain values"
        ) from None
