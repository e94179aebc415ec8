"""Environment variables and limits that other programs left to this one, before a run starts its
own processes.

A run starts its engines and learner itself. What torchrun, accelerate, MPI, an operator or a Ray
job set for theirs would send them to a master that is not there, or change what they compute.
"""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError

# Of launchers of processes: torchrun, torch.distributed operators, MPI, accelerate.
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
)
LAUNCHER_PREFIXES = (
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
    "OMPI_COMM_WORLD_",
    "MV2_COMM_WORLD_",
    "PMIX_",
)
# Where another cluster is; with cluster.address these are the user's to set.
ADDRESSES = ("RAY_ADDRESS", "RAY_NAMESPACE", "VLLM_HOST_IP", "VLLM_PORT")
ADDRESS_PREFIXES = ("VLLM_DP_",)

SOCKET_PATH = 107  # bytes of a Unix socket's path that Linux takes
RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
VLLM_SOCKET = "/01234567-0123-0123-0123-0123456789ab"


def foreign(config: Config | None) -> list[str]:
    """Names of variables that are set here and that a run must not see."""
    names = LAUNCHERS
    prefixes = LAUNCHER_PREFIXES
    if config is None or config.cluster.address is None:
        names += ADDRESSES
        prefixes += ADDRESS_PREFIXES
    found = []
    for name in os.environ:
        if name in names or name.startswith(prefixes):
            found.append(name)
    return sorted(found)


def forget_foreign(config: Config) -> str | None:
    """Take those variables out of this process, whose children inherit the rest.

    Returns a line about it, None if there were none.
    """
    names = foreign(config)
    for name in names:
        del os.environ[name]
    return f"environment: not used: {', '.join(names)}" if names else None


def short_folder(inside: str) -> str:
    """A folder for sockets whose path ends in `inside`: RAY_TMPDIR, TMPDIR, /tmp or /dev/shm.

    Raises ConfigError if none of them is short enough and can be written.
    """
    tried = []
    ray_tmpdir = os.environ.get("RAY_TMPDIR")
    tmpdir = os.environ.get("TMPDIR")
    for folder in (ray_tmpdir, tmpdir, "/tmp", "/dev/shm"):
        if not folder:
            continue
        folder = os.path.abspath(folder)
        if too_long(folder + inside):
            tried.append(f"{folder} is too long for a socket ({SOCKET_PATH} bytes with {inside})")
        elif not can_write(folder):
            tried.append(f"{folder} cannot be written")
        else:
            return folder
    raise ConfigError(
        f"no folder for the sockets of Ray and vLLM: {'; '.join(tried)}; "
        "set TMPDIR to a short one that can be written"
    )


def ray_folder() -> str:
    """Where a local Ray keeps its sessions. Raises ConfigError."""
    return short_folder("/ray" + RAY_SOCKET) + "/ray"


def socket_env() -> dict[str, str]:
    """Variables for actors whose temporary folder is too long for sockets, or relative."""
    env = {}
    if os.environ.get("TMPDIR"):
        env["TMPDIR"] = os.path.abspath(os.environ["TMPDIR"])
    folder = os.path.abspath(tempfile.gettempdir())
    if too_long(folder + VLLM_SOCKET):
        env["VLLM_RPC_BASE_PATH"] = short_folder(VLLM_SOCKET)
    return env


def too_long(path: str) -> bool:
    """Whether Linux would refuse the path for a Unix socket."""
    return len(os.fsencode(path)) > SOCKET_PATH


def can_write(folder: str) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that exists."""
    path = Path(folder)
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def raise_file_limit() -> None:
    """Ray and vLLM hold hundreds of files open: as many as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
