"""What a call of user code may change in its worker process, and what is put back afterwards, so
that the next call finds what this one found.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import sys

STREAMS = (0, 1, 2)  # descriptors of the standard streams
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
OUT_OF_REACH = 512  # copies of descriptors lie here, above what code closes that closes "all"
LOST_CONNECTION = 70  # exit code


class Guard:
    """The state of this process as it is now.

    `connection` is the descriptor over which it answers.
    """

    def __init__(self, connection: int):
        self.connection = connection
        self.folder = os.getcwd()
        self.recursion_limit = sys.getrecursionlimit()
        self.files = {fd: identity(fd) for fd in (*STREAMS, connection)}
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = min(OUT_OF_REACH, max(soft - 16, 3))
        self.copies = {}
        for fd in STREAMS:
            self.copies[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)

    def restore(self) -> None:
        """Put back the current folder, timers, the recursion limit and the standard streams.

        Without its connection the process ends.
        """
        for timer in TIMERS:
            signal.setitimer(timer, 0)
        sys.setrecursionlimit(self.recursion_limit)
        with contextlib.suppress(OSError):  # the folder is gone: there is none to go back to
            os.chdir(self.folder)
        if identity(self.connection) != self.files[self.connection]:
            os._exit(LOST_CONNECTION)  # an answer would go into a file of the user's
        for fd, copy in self.copies.items():
            if identity(fd) != self.files[fd]:
                os.dup2(copy, fd)
        for name, fd in (("stdout", 1), ("stderr", 2)):
            if usable(getattr(sys, name)):
                continue
            stream = open(  # noqa: SIM115  it stays open
                fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
            )
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def identity(fd: int) -> tuple[int, int] | None:
    """What a descriptor stands for; None if it is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def usable(stream) -> bool:
    writes = callable(getattr(stream, "write", None))
    return writes and not getattr(stream, "closed", False)
