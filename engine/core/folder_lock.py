"""One process owns a folder that is written to: a run's, or the target of an export.

`tandem.lock` in the folder (for an export, a hidden file beside it, as it is complete or absent) is
locked with flock, which the kernel gives up when the process dies, however it dies, and which
children do not keep: they get no descriptor across exec, and close theirs after a fork. The file
says who the owner is.

A disk that several machines share may not carry flock from one to the other, or not have it. So the
owner also touches the file every few seconds. Whoever finds an owner on another machine (or has no
flock) watches for that: a file that stays as it is for STALE_SECONDS has no owner any more. Without
flock, two starts at the same moment are told apart by whose record is left after a pause.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tandem.engine.core.errors import ConfigError

LOCK = "tandem.lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # six beats
SETTLE_SECONDS = 2.0  # without flock: between writing the record and reading it again
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# folders that this process owns or has owned; the last one is where its error log goes
OWNED: list[Path] = []


class FolderTaken(RuntimeError):
    """Another process has become the owner of this one's folder."""


@dataclass(frozen=True)
class Owner:
    """What the lock file says."""

    pid: int
    host: str
    boot: str  # of the kernel: equal for all containers of a machine, new after a restart
    since: str
    token: str  # of this ownership

    @classmethod
    def here(cls) -> Owner:
        return cls(
            pid=os.getpid(),
            host=platform.node(),
            boot=boot_id(),
            since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            token=secrets.token_hex(8),
        )

    def describe(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


class FolderLock:
    """The ownership of a folder, until `release` or the end of the process."""

    def __init__(self, folder: Path, path: Path, descriptor: int, owner: Owner):
        self.folder, self.path, self.descriptor, self.owner = folder, path, descriptor, owner
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.beat, name="folder lock", daemon=True)
        self.thread.start()
        HELD.append(self)

    def beat(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that is away for a moment
                os.utime(self.descriptor)

    def check(self) -> None:
        """Raise FolderTaken if the folder has another owner: this process was stopped for so long,
        or cut off from a shared disk, that it counted as dead; or somebody removed the lock.
        """
        other = read_owner(self.path)
        if other is not None and other.token != self.owner.token:
            raise FolderTaken(
                f"{self.folder} is now owned by {other.describe()}; "
                f"this process ({self.owner.describe()}) writes no more into it"
            )

    def release(self) -> None:
        """Give the folder back."""
        if self not in HELD:  # a child after a fork
            return
        HELD.remove(self)
        self.ended.set()
        self.thread.join()
        with suppress(OSError):
            if same_file(self.path, self.descriptor):
                self.path.unlink()
        os.close(self.descriptor)


HELD: list[FolderLock] = []


def forget_after_fork() -> None:
    """In a child: the lock stays with the parent alone."""
    for lock in HELD:
        os.close(lock.descriptor)
    HELD.clear()


os.register_at_fork(after_in_child=forget_after_fork)


@contextmanager
def owned(folder: Path, say: Callable[[str], None] = print) -> Iterator[FolderLock]:
    """Own a folder that exists, for the block.

    Raises ConfigError that names the owner if there is one, or if the folder cannot be written to.
    `say` is told whose place one takes.
    """
    lock = acquire(folder, folder / LOCK, say)
    OWNED.append(folder)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def owned_from_beside(folder: Path) -> Iterator[FolderLock]:
    """The same for a folder that is not there yet."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error}") from None
    lock = acquire(folder, folder.with_name(f".{folder.name}.{LOCK}"), print)
    try:
        yield lock
    finally:
        lock.release()


def acquire(folder: Path, path: Path, say: Callable[[str], None]) -> FolderLock:
    """The lock `path` of a folder. Raises ConfigError if another process has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written to: {error}") from None
        try:
            exact = lock_file(descriptor)
            if same_file(path, descriptor):  # else its owner has just removed it
                if exact is None:
                    raise in_use(folder, named_owner(path))
                owner = claim(folder, path, descriptor, exact, say)
                return FolderLock(folder, path, descriptor, owner)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def claim(
    folder: Path, path: Path, descriptor: int, exact: bool, say: Callable[[str], None]
) -> Owner:
    """Write this process into the lock file, if whoever stands there is dead.

    `exact`: we have the lock.
    """
    before = read_owner(path)
    if before is not None:
        dead = exact and before.boot == boot_id()  # the same kernel gave us its lock
        if not dead and beats(folder, path, before):
            raise in_use(folder, before)
        say(f"{folder}: in the place of {before.describe()}, which ended without giving it back")
    owner = Owner.here()
    write_owner(descriptor, owner)
    if not exact:
        time.sleep(SETTLE_SECONDS)
        other = read_owner(path)
        if other != owner:
            raise in_use(folder, other)
    return owner


def beats(folder: Path, path: Path, owner: Owner) -> bool:
    """Whether the lock file is still touched.

    Times are those of the disk, as clocks of machines differ.
    """
    seen = modified(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tandem.now.") as file:
        age = os.fstat(file.fileno()).st_mtime - seen
    left = STALE_SECONDS - max(0.0, age)
    if left > 0:
        line = f"{folder}: owned by {owner.describe()}; watching for up to {left:.0f} s"
        print(f"{line} whether that is alive", file=sys.stderr, flush=True)
    end = time.monotonic() + left
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        if modified(path) != seen:
            return True
    return False


def modified(path: Path) -> float:
    """Modification time as the file's server has it: NFS asks it again when a file is opened."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def lock_file(descriptor: int) -> bool | None:
    """True: locked. None: somebody else has it. False: this disk has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in NO_FLOCK:
            return False
        raise


def read_owner(path: Path) -> Owner | None:
    """None if nobody stands there, or nobody that can be read: the owner died while it wrote."""
    try:
        values = json.loads(path.read_bytes())
        return Owner(**{field.name: values[field.name] for field in fields(Owner)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def named_owner(path: Path) -> Owner | None:
    """The owner, who may have the lock and still be about to write that."""
    for _ in range(20):
        owner = read_owner(path)
        if owner is not None:
            return owner
        time.sleep(0.05)
    return None


def write_owner(descriptor: int, owner: Owner) -> None:
    """In place: a new file would not be the locked one."""
    data = json.dumps(asdict(owner)).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    os.fsync(descriptor)


def same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def in_use(folder: Path, owner: Owner | None) -> ConfigError:
    who = owner.describe() if owner is not None else "another process"
    return ConfigError(
        f"{folder} is in use by {who}; wait until it ends, or stop it, or write to another folder "
        "(for a run: choose another run.name)"
    )


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
