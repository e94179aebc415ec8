"""A reward worker process: `python -m tandem.rollout.rewards.worker FD PARENT`, started by
worker_process.py and by nobody else.

It is given the reward config, answers with the functions' signatures and source (or why they cannot
be used), then answers one call at a time. It is started as a program of its own, not by
multiprocessing, which would run the user's main script once more in every worker.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.foreign import message
from tandem.engine.core.loading import install, user_code
from tandem.rollout.rewards.api import Reply
from tandem.rollout.rewards.functions import load_functions
from tandem.rollout.rewards.guard import Guard

PR_SET_PDEATHSIG = 1


def main() -> None:
    descriptor = int(sys.argv[1])
    parent = int(sys.argv[2])
    connection = Connection(descriptor)
    # elsewhere an idle worker ends when its connection closes, a busy one after its call
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # the parent died before it could be watched
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        # a print of any text works
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    pid = os.getpid()
    folder = os.getcwd()
    dumps = pickle.dumps  # kept: user code may put something else in its place
    try:
        config, seed, code = connection.recv()
        install(code)
        functions = load_functions(config, seed)
    except ConfigError as error:
        return connection.send(str(error))
    except BaseException:
        return connection.send(
            f"a reward function's file cannot be imported:\n{message(traceback.format_exc())}"
        )
    os.chdir(folder)  # whatever the import did
    guard = Guard(connection.fileno())
    signatures = [function.signature for function in functions]
    connection.send((signatures, user_code()))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        reply = answer(functions, request)
        # a fork made by the reward came back here: it must not answer in the worker's place
        if os.getpid() != pid:
            os._exit(0)
        guard.restore()
        connection.send_bytes(dumps(reply))


def answer(functions, request: bytes, loads=pickle.loads) -> Reply | str:
    try:
        number, call = loads(request)
    except Exception as error:
        return (
            f"a dataset row cannot be read in a reward worker: {type(error).__name__}: {error}; "
            "columns must be plain values"
        )
    return functions[number](call, passes=())


if __name__ == "__main__":
    main()
