"""Disk space: how much a run will need, checked before it starts, and errors that say that the disk
is at fault.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
PROBE_BYTES = 1 * MIB
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
MASTER_BYTES = 12  # per trained parameter: float32 weights and the two moments of Adam
AVERAGE_BYTES = 4  # per parameter of a moving average of the policy


class DiskError(OSError):
    """The disk took no more. The text names it, what is free and what would help."""


def checkpoint_bytes(config: Config, parameters: int, trained: int | None = None) -> int:
    """What one checkpoint takes at least: the learner's state, and the model to use. `trained`: how
    many of the parameters are; None: all.
    """
    if trained is None:
        trained = parameters
    averages = [other for other in config.models.values() if other.kind == "ema"]
    state = trained * MASTER_BYTES + len(averages) * parameters * AVERAGE_BYTES
    return state + model_bytes(config, parameters, trained)


def model_bytes(config: Config, parameters: int, trained: int) -> int:
    """The model to use, or the adapters that are saved in its place."""
    saved = trained if config.scope.export == "adapter" else parameters
    return saved * model_item(config.model.dtype)


def model_item(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def room_needed(config: Config, parameters: int, trained: int | None = None) -> int:
    """Bytes of a whole run: a new checkpoint is written before the oldest goes, and the model is
    saved at the end.
    """
    one = checkpoint_bytes(config, parameters, trained)
    models = 0
    if config.run.save_model:
        models = model_bytes(config, parameters, trained or parameters)
    return one * (config.run.keep_checkpoints + 1) + models


def check_room(
    config: Config,
    parameters: int | None,
    folder: Path,
    warn: Callable[[str], None],
    trained: int | None = None,
) -> None:
    """Raise ConfigError if not even one checkpoint fits; `warn` if the run may fill the disk later.
    `parameters` is None where the model's size is not known, `trained` where all of them are.
    """
    if parameters is None or config.run.rollout_only:
        return
    one = checkpoint_bytes(config, parameters, trained)
    whole = room_needed(config, parameters, trained)
    present = sum(map(tree_bytes, folder.glob("checkpoints/step_*")))  # those of a resumed run
    usage = shutil.disk_usage(existing(folder))
    free = usage.free
    if usage.total == 0:
        return  # a file system without a size, such as a bucket's
    sizes = (
        f"{show(free)} are free on the disk of {folder} (run.dir), "
        f"a checkpoint of this model takes at least {show(one)}"
    )
    if free < one:
        raise ConfigError(f"{sizes}; make room, or choose another disk with run.dir")
    if free + present < whole:
        warn(
            f"warning: {sizes}, the whole run about {show(whole)} (run.keep_checkpoints="
            f"{config.run.keep_checkpoints}, and one more while it is written)"
        )


def disk_fault(error: BaseException | None) -> str:
    """What the operating system says if `error`, or its origin, is a fault of a disk; else ''."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in FAULTS:
            return os.strerror(one.errno)
        # a library in C++ or Rust, or another process, may give the text alone
        for code in FAULTS[:3]:
            if os.strerror(code) in str(one):
                return os.strerror(code)
    return ""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def probe(folder: Path) -> str:
    """What the operating system says to a file in `folder`; '' if it takes one. Some libraries hide
    why they could not write.
    """
    path = folder / ".probe"
    try:
        with open(path, "wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return ""
    except OSError as error:
        return error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)


def in_words(error: Exception, run_folder: Path | None) -> str:
    """What to tell the user of an error that is the disk's fault, with the file where that is
    known; '' if it is another error.
    """
    if isinstance(error, DiskError):
        return str(error)
    fault = disk_fault(error)
    if not fault:
        return ""
    file = file_of(error)
    if file is None:
        words = f"a file of the run could not be written: {fault}"
        place = run_folder or Path.cwd()
    else:
        words = f"{file} could not be written: {fault}"
        place = Path(file).parent
    left = ""
    if run_folder is not None and list(run_folder.glob("checkpoints/step_*")):
        left = "; the checkpoints are intact, go on with run.resume=true"
    return f"{words}: {describe(place)}. Make room{left}"


def file_of(error: Exception) -> str | None:
    """The file that the error, or its origin, names first."""
    for one in chain(error):
        if isinstance(one, OSError) and isinstance(one.filename, str):
            return one.filename
    return None


def describe(folder: Path) -> str:
    """The disk of `folder` and its numbers."""
    usage = shutil.disk_usage(existing(folder))
    return f"the disk of {folder.absolute()} ({show(usage.free)} of {show(usage.total)} free)"


def checkpoint_failed(
    error: Exception,
    tmp: Path,
    step: int,
    before: list[Path],
) -> DiskError | None:
    """The error for a checkpoint that could not be written to `tmp`, if that is the disk's fault.
    `before`: the checkpoints there are, newest first.
    """
    fault = disk_fault(error) or probe(tmp)
    if not fault:
        return None
    if before:
        need = f"one takes {show(tree_bytes(before[0]))}"
        left = (
            f"The checkpoints before it are intact, the newest is {before[0].name}: "
            "make room and go on with run.resume=true"
        )
    else:
        need = f"it takes more than {show(tree_bytes(tmp))}"
        left = "There is none before it, so nothing to resume from: make room and start again"
    place = describe(tmp.parent)
    return DiskError(
        f"the checkpoint of step {step} could not be written to {place}: {fault}; {need}. {left}"
    )


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def show(size: float) -> str:
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / MIB:.1f} MiB"
