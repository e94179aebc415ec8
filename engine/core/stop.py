"""Signals that ask this process to stop, and when they take effect.

    while a command starts, and in      at once: Stopped is raised, and every clean-up runs
    commands that do not train
    in the training loop (`hold`)       the handler only sets a flag. The loop ends its step, writes
                                        a checkpoint and leaves. What may be given up
                                        (`abandonable`: waiting for rollouts, an evaluation) is
                                        left with Stopped
    a second Ctrl-C                     KeyboardInterrupt, at once, whatever came first

A handler prints nothing and takes no lock: it runs between any two instructions of the main thread.
The state is that of the process, as signals are; handlers run in the main thread only.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

# What terminals, shells and schedulers send to end a program; XCPU when its CPU time runs out.
NUMBERS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
LOOK_SECONDS = 0.1  # how often a waiting thread looks at the flag
AGAIN_SECONDS = 0.05  # until the handler tries again


class Stopped(KeyboardInterrupt):
    """A signal asked to stop; its text is the signal's name. A KeyboardInterrupt, so that code in
    between lets it through.
    """


@dataclass
class State:
    handling: bool = False
    requested: str = ""  # name of the first signal
    at_once: bool = False  # a second Ctrl-C came
    holding: bool = False  # the loop looks at `requested` itself
    abandonable: bool = False  # what the loop does now may be given up
    computing: bool = False  # and is code of the model or the user, which holds nothing to save


STATE = State()


def receive(number: int, frame: Any) -> None:
    """The handler."""
    if not STATE.requested:
        STATE.requested = signal.Signals(number).name
    elif number == signal.SIGINT:
        STATE.at_once = True
    else:
        return
    signal.signal(signal.SIGALRM, deliver)
    deliver(number, frame)


def deliver(number: int, frame: Any) -> None:
    """Raise what is due. Where that is lost or would do harm, the alarm clock brings us here again:
    an exception ends nothing in a `__del__` or a callback of a weak reference, and inside the
    import of a C++ module it aborts the process.
    """
    error = due()
    if error is None or arriving():
        return
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    if STATE.holding or not importing(frame):
        raise error


def due() -> KeyboardInterrupt | None:
    """What the present state asks the handler to raise."""
    if STATE.at_once:
        return KeyboardInterrupt()
    if STATE.holding and not (STATE.abandonable and STATE.computing):
        return None
    return Stopped(STATE.requested)


def arriving() -> bool:
    """Whether this thread is leaving because of an earlier call of the handler: its clean-ups are
    not to be disturbed.
    """
    kinds = (KeyboardInterrupt,) if STATE.at_once else (KeyboardInterrupt, Stopped)
    error = sys.exception()
    while error is not None and type(error) not in kinds:
        error = error.__context__
    return error is not None


def importing(frame: Any) -> bool:
    """Whether `frame` runs because of an import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def arm() -> None:
    """Install the handler; again after a library has put its own there. SIGHUP that nohup ignores
    stays ignored.
    """
    if not STATE.handling or threading.current_thread() is not threading.main_thread():
        return
    for number in NUMBERS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle the signals until the block ends. Within another such block, or in another thread, it
    changes nothing.
    """
    global STATE
    if STATE.handling or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)}
    STATE = State(handling=True)
    arm()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        STATE = State()
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """For the start of a library that installs handlers of its own, which leave by SystemExit: ours
    are back after it.

    The processes that it starts never see the signals, which schedulers send to all processes of a
    job: they are needed for the checkpoint, and end with this process.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)  # children inherit it
    try:
        yield
    except SystemExit:
        STATE.requested = STATE.requested or signal.SIGTERM.name
        raise Stopped(STATE.requested) from None
    finally:
        arm()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore() -> None:
    """The process is about to end with an exit code that a late signal must not change."""
    for number in NUMBERS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def requested() -> str:
    """The name of the first signal that asked to stop, or ''."""
    return STATE.requested


def hold() -> None:
    """From here on a first signal is only noted. Raises Stopped if there was one that some code
    swallowed.
    """
    STATE.holding = True
    if STATE.requested:
        raise Stopped(STATE.requested)


def check_start() -> None:
    """For threads that start components: raise Stopped if a signal came before the loop began. The
    handler reaches the main thread only.
    """
    if STATE.requested and not STATE.holding:
        raise Stopped(STATE.requested)


@contextlib.contextmanager
def abandonable() -> Iterator[None]:
    """What is done in this block may be given up: `check`, `result` and `computing` raise Stopped
    in it.
    """
    STATE.abandonable = True
    try:
        check()
        yield
    finally:
        STATE.abandonable = False


def check() -> None:
    """Raise Stopped if a signal came and what is done now may be given up."""
    if STATE.at_once and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
    in_main = threading.current_thread() is threading.main_thread()
    if STATE.requested and STATE.abandonable and in_main:
        raise Stopped(STATE.requested)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Around code of the model or the user that may take long in this process; where it may be
    given up, a signal leaves it.
    """
    check()
    if threading.current_thread() is not threading.main_thread() or STATE.computing:
        yield
        return
    STATE.computing = True
    try:
        yield
    finally:
        STATE.computing = False
    check()  # of a signal whose exception the code swallowed


def result(future: Future) -> Any:
    """future.result(), but left with Stopped where the wait may be given up."""
    while not future.done():
        check()
        try:
            future.exception(LOOK_SECONDS)  # computes it, if it is one of rollout.local
        except (TimeoutError, CancelledError):
            continue
    return future.result()
