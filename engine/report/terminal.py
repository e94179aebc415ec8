"""The terminal, which must not stop a run: it may be closed or full, go away, spell ASCII only, or
take nothing for hours.

`protect` makes print() and the libraries' warnings harmless. `Screen` is where the display writes:
it never waits for the reader. Both fall silent at the first failure, and keep it for those who ask.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

WAITING = 1000  # pieces of text that wait for a slow reader; more are dropped
PATIENCE = 1.0  # seconds that a writer waits for the reader, once
LOOK_SECONDS = 0.25  # between two calls of `idle`


class Silent(io.RawIOBase):
    """An open file to write to that never fails: after its first error, kept in `error`, it
    swallows everything.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)

    def write(self, data) -> int:
        """The bytes taken; those that a reader does not take in time are lost."""
        if self.error is None:
            try:
                return os.write(self.fd, data)
            except BlockingIOError:
                select.select([], [self.fd], [], PATIENCE)
            except OSError as error:
                self.error = error
        return len(data)


def protect() -> None:
    """For a process of its own, before anything else: no standard stream is missing, and printing
    to one cannot fail.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdout = silent(sys.stdout, 1)
    sys.stderr = silent(sys.stderr, 2)


def silent(stream: TextIO | None, fd: int) -> TextIO:
    """A stream like `stream`, None if it was closed. What its encoding does not know is escaped."""
    encoding = stream.encoding if stream is not None else "utf-8"
    raw = Silent(fd)
    by_line = fd == 2 or raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=by_line
    )


def lost_output() -> OSError | None:
    """Why standard output could not be written, if it could not."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, Silent) else None


class Screen(io.TextIOBase):
    """A text stream over `stream`: a thread writes, and calls `idle` a few times per second. No
    call waits or fails.

    Text that the encoding does not know becomes question marks. While `WAITING` pieces wait,
    further ones are dropped.
    """

    def __init__(self, stream: TextIO, idle: Callable[[], None] | None = None):
        self.stream, self.idle = stream, idle
        self.error: Exception | None = None
        self.slow = False  # the reader was once waited for in vain
        self.waiting: queue.Queue[str | None] = queue.Queue(WAITING)
        try:
            self.fd = os.dup(stream.fileno())  # of its own: the stream may be closed earlier
        except (AttributeError, OSError, ValueError):
            self.fd = None  # a stream in memory
        self.thread = threading.Thread(target=self.work, name="screen", daemon=True)
        self.thread.start()

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def write(self, text: str) -> int:
        if self.error is None:
            with contextlib.suppress(queue.Full):
                self.waiting.put_nowait(text)
        return len(text)

    def drain(self) -> None:
        """Wait until all is written, so that other output comes after it; a reader that does not
        read is waited for once.
        """
        end = time.monotonic() + PATIENCE
        with self.waiting.all_tasks_done:
            while self.waiting.unfinished_tasks and not self.slow:
                self.slow = not self.waiting.all_tasks_done.wait(end - time.monotonic())
            self.slow = self.slow and bool(self.waiting.unfinished_tasks)

    def finish(self) -> None:
        """Write what waits, if the reader takes it, and end the thread."""
        self.drain()
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait(None)
        if not self.slow:
            self.thread.join(PATIENCE)

    def work(self) -> None:
        """The thread."""
        while True:
            try:
                text = self.waiting.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if self.idle is not None:
                    self.idle()
                continue
            try:
                if text is None:
                    break
                if self.error is None:
                    self.put(text)
            except Exception as error:
                self.error = error
            finally:
                self.waiting.task_done()
        if self.fd is not None:
            os.close(self.fd)

    def put(self, text: str) -> None:
        """To the reader; takes as long as the reader does."""
        data = text.encode(self.encoding, "replace")
        if self.fd is None:
            self.stream.write(data.decode(self.encoding))
            self.stream.flush()
            return
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                select.select([], [self.fd], [], PATIENCE)
