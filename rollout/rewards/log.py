"""The log of what reward workers print: it stops growing at a limit, whatever they print."""

from __future__ import annotations

import os
import threading
from pathlib import Path

# of one log; an earlier one of more than half of that is put aside as NAME.1 when a run starts
LOG_BYTES = 16 << 20
CHUNK = 1 << 16


class BoundedLog:
    """A file that several processes print to, each through a pipe of its own. Thread-safe."""

    def __init__(self, path: Path, limit: int = LOG_BYTES):
        self.path = path
        self.limit = limit
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.size = path.stat().st_size if path.exists() else 0
        if self.size > limit // 2:
            os.replace(path, path.with_name(path.name + ".1"))
            self.size = 0
        self.full = False

    def pipe(self) -> tuple[int, threading.Thread]:
        """(a file descriptor to print to, the thread that reads what is printed and ends with the
        last process that holds it).
        """
        reading, writing = os.pipe()
        thread = threading.Thread(
            target=self.drain, args=(reading,), name="reward-log", daemon=True
        )
        thread.start()
        return writing, thread

    def drain(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as stream:
            while data := stream.read(CHUNK):
                self.write(data)

    def write(self, data: bytes) -> None:
        """Append, as long as the log has room; what comes after is lost, and the log says so."""
        with self.lock:
            if self.full:
                return
            room = self.limit - self.size
            if len(data) > room:
                end = f"\n[the log has reached {self.limit} bytes; nothing more is written to it]\n"
                data = data[:room] + end.encode()
                self.full = True
            self.size += len(data)
            try:
                with open(self.path, "ab") as file:
                    file.write(data)
            except OSError:  # a full disk must not stop scoring
                pass
