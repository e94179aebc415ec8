"""How much memory a reward worker may use, and when one that has grown is replaced."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# what a worker loads in its first calls (models, caches) is not counted as growth
WARM_CALLS = 32
# a worker that has grown by more since then is replaced between two calls
GROWTH_BYTES = 1 << 30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class TooMuchMemory(Exception):
    """A process of the worker uses more than reward.memory_gib."""


def memory_limit(gib: float | None) -> int:
    """Bytes that one process may use: reward.memory_gib, or half of what this machine (or
    container) has.
    """
    if gib is not None:
        return int(gib * 2**30)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such limit, or the word "max"
        limit = int(CGROUP_LIMIT.read_text())
        machine = min(machine, limit)
    return machine // 2


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 if it is gone, or where the system does not say (not
    Linux).
    """
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def largest(pid: int) -> int:
    """The memory of the largest of a process and its children.

    Not their sum: forked processes share memory.
    """
    return max(resident(process) for process in family(pid))


def family(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    found = [pid]
    for process in found:
        children = []
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                text = (task / "children").read_text()
                children += text.split()
        except OSError:
            continue
        found.extend(map(int, children))
    return found


class Wear:
    """Tells when a worker process has grown too much to be kept."""

    def __init__(self):
        self.calls = 0
        self.base = 0

    def reason(self, pid: int, limit: int) -> str:
        """After a call: why the process must be replaced, or ''."""
        self.calls += 1
        now = resident(pid)
        if self.calls <= WARM_CALLS:
            self.base = now
        if now > limit:
            return (
                f"it holds {now / 2**30:.1f} GiB, more than the {limit / 2**30:.3g} GiB of "
                "reward.memory_gib"
            )
        if now > self.base + GROWTH_BYTES:
            return (
                f"it has grown from {self.base / 2**30:.1f} to {now / 2**30:.1f} GiB since its "
                f"first {WARM_CALLS} calls"
            )
        return ""
