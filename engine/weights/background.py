"""Calls that may hang: in a thread that can be left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tandem.engine.core.errors import EngineDied


class Call:
    """A function running in a daemon thread: unlike an executor's, such a thread cannot keep the
    process from exiting when its peer has died.
    """

    def __init__(self, function: Callable[[], Any]):
        self.value: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, args=(function,), daemon=True)
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> None:
        try:
            self.value = function()
        except BaseException as error:  # handed to the caller by check() or result()
            self.error = error

    def done(self) -> bool:
        return not self.thread.is_alive()

    def check(self) -> None:
        """Raise what the function raised, if it has ended that way."""
        if self.error is not None:
            raise self.error

    def result(self, deadline: float) -> Any:
        """`deadline` as time.monotonic has it. Raises EngineDied when it has passed."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            raise EngineDied("a weight transfer did not end within sync.timeout")
        self.check()
        return self.value


def on_this_gpu(function: Callable[[], Any], deadline: float) -> Any:
    """Run a function that may wait in NCCL, which cannot be interrupted: when the deadline has
    passed it is left behind in its thread.
    """
    device = torch.cuda.current_device()

    def run():
        torch.cuda.set_device(device)  # a new thread starts with device 0
        return function()

    return Call(run).result(deadline)
