"""What a command says when it fails or is stopped, and its exit code (see cli.py)."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from tandem.engine.config.secrets import redact
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.folder_lock import OWNED
from tandem.engine.loop import disk

FAILED, BAD_INPUT, RESUMABLE, INTERRUPTED, STOPPED = 1, 2, 75, 130, 143
LINES = 15  # of an error's text


def told(handler: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a command; its errors are told in words. With --debug they are raised."""
    try:
        return handler(args) or 0
    except stop.Stopped as signal:
        return tell_stopped(args, str(signal))
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except (Exception, SystemExit) as error:
        if args.debug:
            raise
        return tell_error(args, error)


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def tell_error(args: argparse.Namespace, error: BaseException) -> int:
    if isinstance(error, ConfigError):
        # an error out of a Ray actor wraps the one that was raised there
        tell(f"error: {getattr(error, 'cause', error)}")
        return BAD_INPUT
    if isinstance(error, SystemExit):
        # a method of the user's called exit(), perhaps with 0: no success
        tell(
            f"failed: code that was called ended the process with exit({error.code!r}); expected "
            f"it to return or to raise an error\nat {place(error)}"
        )
    elif isinstance(error, Exception):
        words = disk.in_words(error, args.run_folder)
        if words:
            tell(f"failed: {words}")
            return FAILED
        tell(f"failed: {type(error).__name__}: {brief(error)}\nat {place(error)}")
    tell(keep_traceback())
    return FAILED


def tell_stopped(args: argparse.Namespace, name: str) -> int:
    """A signal came while there was nothing to save."""
    interrupted = name == "SIGINT"
    trains = args.command == "train"
    if trains and args.resume and list(args.run_folder.glob("checkpoints/step_*")):
        tell(
            f"stopped by {name}; the checkpoint in {args.run_folder} is as it was, go on with "
            "run.resume=true"
        )
        return INTERRUPTED if interrupted else RESUMABLE
    if trains:
        tell(f"stopped by {name} before the first step; there is nothing to resume from")
    else:
        tell(f"stopped by {name} before the end")
    return INTERRUPTED if interrupted else STOPPED


def brief(error: BaseException) -> str:
    """The error's own words: a Ray error carries the remote traceback in its text, which goes to
    the file.
    """
    text = str(getattr(error, "cause", error))
    lines = list(filter(str.strip, text.strip().splitlines()))
    return "\n".join(lines[:LINES]) or "no message"


def raised(error: BaseException) -> str:
    """The error in words, with its place unless it says itself what is wrong where."""
    if isinstance(error, ConfigError):
        return brief(error)
    return f"{type(error).__name__}: {brief(error)}, at {place(error)}"


def place(error: BaseException) -> str:
    """The last line of this project or the user's that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    found = frames[-1]
    installed = f"{os.sep}lib{os.sep}python"
    for frame in frames:
        file = frame.filename
        if os.path.isfile(file) and installed not in file:
            found = frame
    return f"{found.filename}:{found.lineno}, in {found.name}"


def keep_traceback() -> str:
    """Write the traceback into the folder that this process owned, if there was one, and say where
    to look.
    """
    if not OWNED or not OWNED[-1].is_dir():
        return "run again with --debug for the traceback"
    run_folder = OWNED[-1]
    try:
        (run_folder / "error.log").write_text(redact(traceback.format_exc()))
    except OSError as error:
        return (
            f"the traceback could not be kept in {run_folder} ({error.strerror}); run again with "
            "--debug to see it"
        )
    return f"traceback: {run_folder / 'error.log'}   logs: {run_folder}"
