"""A process that runs the program worker.py, and the connection to it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from typing import Any

from tandem.rollout.rewards.limits import TooMuchMemory, largest
from tandem.rollout.rewards.log import BoundedLog

GRACE_SECONDS = 0.5  # between SIGTERM and SIGKILL
LOOK_SECONDS = 0.1  # between two looks at whether the process still lives


class WorkerProcess:
    """Started when it is made, in a session of its own. Raises OSError if it cannot be.

    `closing` ends the waiting for its answers.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        timeout: float,
        memory: int,
        output: BoundedLog | None,
        closing: threading.Event,
    ):
        """`timeout`: seconds of a call; `memory`: bytes that a process of it may use."""
        self.memory = memory
        self.closing = closing
        self.connection, theirs = Pipe()
        bound_waits(self.connection.fileno(), timeout)
        self.printing: threading.Thread | None = None  # reads what the process prints
        descriptor = None
        if output is not None:
            descriptor, self.printing = output.pipe()
        program = [sys.executable, "-m", "tandem.rollout.rewards.worker"]
        number = theirs.fileno()
        self.process = subprocess.Popen(
            [*program, str(number), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=environment,
            pass_fds=(number,),
            # a session of its own: killed with all it started
            start_new_session=True,
        )
        theirs.close()
        if descriptor is not None:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def receive(self, seconds: float) -> Any:
        """The process's next message.

        Raises TimeoutError, TooMuchMemory, or EOFError if the process is dead or the runner closes.

        The connection alone does not tell of a death: a child that the reward forked holds it open.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            if self.connection.poll(max(0.0, min(LOOK_SECONDS, left))):
                return self.connection.recv()
            if self.closing.is_set():
                raise EOFError
            if not self.alive and not self.connection.poll():
                raise EOFError
            used = largest(self.pid)
            if used > self.memory:
                raise TooMuchMemory(
                    f"the worker process was ended: it used {used / 2**30:.1f} GiB, more "
                    f"than the {self.memory / 2**30:.3g} GiB of reward.memory_gib"
                )
            if time.monotonic() >= deadline:
                raise TimeoutError

    def how_it_ended(self) -> str:
        """For a process that gave up its connection; it is cleared away."""
        try:
            status = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        if status is None:
            return "it closed its connection"
        if status < 0:
            return f"signal {signal_name(-status)}"
        return f"exit code {status}"

    def kill(self) -> None:
        """End the process and everything in its session: terminate, then kill. Idempotent."""
        if self.connection.closed:
            return
        self.signal_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        self.signal_group(signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        if self.printing is not None:
            # its last words, unless a process outside the session holds the pipe
            self.printing.join(GRACE_SECONDS)

    def signal_group(self, number: int) -> None:
        # nobody left (macOS says PermissionError when only a zombie is)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def bound_waits(descriptor: int, seconds: float) -> None:
    """No single read or write on the connection blocks longer: a process that was stopped neither
    takes a long message nor ends one.
    """
    whole_seconds = max(1, math.ceil(seconds))
    duration = struct.pack("ll", whole_seconds, 0)
    with socket.socket(fileno=os.dup(descriptor)) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, duration)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, duration)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)
