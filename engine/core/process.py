"""What a process does to itself: output, memory settings, cores."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tandem.engine.core.errors import ConfigError


def redirect_output(path: str | Path) -> None:
    """Send what this process and its children write to stdout or stderr, from C++ too, to the end
    of the file `path`, for as long as the process lives.

    Not for runs in which the user may enter a debugger.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    flush_streams()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


@contextmanager
def redirected_output(path: str | Path) -> Iterator[TextIO]:
    """`redirect_output` for a block, which is given the real stdout, for the display.

    It ends before a traceback is printed.
    """
    flush_streams()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    terminal = os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace", buffering=1)
    try:
        redirect_output(path)
        yield terminal
    finally:
        flush_streams()
        terminal.close()
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


# What makes glibc keep freed memory for the buffers of the next step: new pages for each cost
# decoding 5 to 10 % (a model of 3 M parameters in float32) and a weight sync a fifth. An older
# glibc refuses a larger second value than this, and the first alone would do harm.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": (1 << 31) - 1,
    "MALLOC_MMAP_THRESHOLD_": 1 << (30 if platform.libc_ver() >= ("glibc", "2.36") else 25),
}


def keep_freed_memory() -> None:
    """The same for this process, which runs already.

    The user's own variables win; elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # option numbers of malloc.h
    for variable, option in (("MALLOC_TRIM_THRESHOLD_", -1), ("MALLOC_MMAP_THRESHOLD_", -3)):
        if mallopt is not None and variable not in os.environ:
            mallopt(option, MALLOC[variable])


def pin_cores(threads: int, process: int) -> None:
    """Bind this process to its own `threads` cores, those of the run's process number `process`;
    threads and children that start later inherit them.

    To be called once, while the process may still use every core of the run. Threads of Ray's that
    run already are moved too: some of them start others. Raises ConfigError if too few cores are
    left.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = cores[process * threads : (process + 1) * threads]
    if len(own) < threads:
        raise ConfigError(
            f"cluster.pin_cores: process {process} of {threads} thread(s) finds {len(own)} "
            f"core(s) left of {len(cores)}"
        )
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread), own)
