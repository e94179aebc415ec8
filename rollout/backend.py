"""The rollout seam: what an inference engine must do to serve rollouts and take new weights.

A backend of your own is a class that inherits `Backend`, named in a config by
`rollout.backend: my_backend.py:MyBackend` (docs/backends.md). It then serves in mode=inline and, in
one Ray actor per engine, in mode=cluster. `tests/contract/test_backends.py` is the suite that every
backend passes.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from tandem.engine.config.options import typed
from tandem.engine.config.schema import Config
from tandem.engine.config.words import describe
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.loading import load_object
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.text import brief, closest
from tandem.engine.core.types import GenRequest, Trajectory

BUILTIN: dict[str, str] = {
    "vllm": "tandem.rollout.vllm.backend:VllmBackend",
    "hf": "tandem.rollout.backends.hf:HFBackend",
    "replay": "tandem.rollout.backends.replay:ReplayBackend",
}
GIVEN = ("model_path", "config", "seed")  # to every backend, before its options


class CacheCounts(NamedTuple):
    """Prompt tokens since the start, and those of them whose keys and values were in a cache."""

    prompt_tokens: int
    cached_tokens: int


class Backend(ABC):
    """One inference engine. All its coroutines run on one event loop.

    Weights count as version 0 until the first update. Between start_weight_update and
    finish_weight_update a backend samples nothing, and after an update that failed it raises
    EngineDied: half-loaded weights never sample a token.
    """

    # False: `update_weights` is given named tensors. True: the backend joins the learner's transfer
    # group itself and is given the messages of vLLM's weight transfer
    joins_transfer: ClassVar[bool] = False
    # its samples are those of another run: nothing is counted as generated
    recorded: ClassVar[bool] = False

    def __init__(self, model_path: str, config: Config, seed: int, **options: Any):  # noqa: B027
        """`options` is what rollout.backend_options has: keyword arguments of your own."""

    @classmethod
    async def start(cls, model_path: str, config: Config, seed: int, **options: Any) -> Self:
        """A backend with the weights of the folder `model_path`.

        Override it where starting must await something, or where it can fail late.
        """
        return cls(model_path, config, seed, **options)

    # -- generation

    @abstractmethod
    async def generate(self, request: GenRequest) -> Sequence[Trajectory]:
        """All samples of one request, in order; called for several requests at once.

        POLICY tokens carry the log-prob under the distribution they were sampled from and the
        weight version. `trajectories.trajectory` puts one together. Raises EngineDied if the engine
        is lost: the request is then asked again elsewhere.
        """

    async def generate_all(self, requests: Sequence[GenRequest]) -> Sequence[Sequence[Trajectory]]:
        """The samples of each request: how mode=inline asks, for all that wait at once."""
        jobs = [self.generate(request) for request in requests]
        answers = await asyncio.gather(*jobs, return_exceptions=True)
        groups = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            groups.append(answer)
        return groups

    async def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [n - 1]: the log-prob of each of int32 [n] tokens after those before it, at
        temperature 1, computed anew whatever a cache holds.

        A backend that has it is compared with itself around the first weight update.
        """
        raise NotImplementedError

    async def abort(self, request: GenRequest) -> None:  # noqa: B027  optional
        """Let a running request end early: its `generate` returns soon, samples that had not ended
        as they are, with Finish.ABORT. A request that is not running is ignored. A backend that
        computes while it is called has nothing to do here.
        """

    async def sleep(self) -> None:
        """Give the GPU's memory away until the next weight update (rollout.sleep)."""
        raise NotImplementedError

    # -- weights

    @property
    def transfer_ranks(self) -> int:
        """How many ranks of the transfer group this engine takes."""
        return 1

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the transfer group of the learner; only where `joins_transfer`."""
        raise NotImplementedError

    @abstractmethod
    async def start_weight_update(self) -> None:
        """No weight is changed before this call. Running requests are paused and kept."""

    @abstractmethod
    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take some of the parameters: {"named": [(name in the checkpoint, tensor), ...]}.

        Called several times in an update. The tensors are good until it returns: copy them.
        """

    @abstractmethod
    async def finish_weight_update(self, version: int) -> Installed:
        """Make the new weights live, drop caches computed with the old ones, stamp `version` on all
        tokens sampled from now on. Raises SyncError if a parameter was not sent.

        Returns what `weights.verify` compares with what the learner sent and with the other
        engines. It is found before running requests go on: asked later, an engine would answer
        between two of its steps only, and the learner would wait for it.
        """

    @abstractmethod
    async def weight_version(self) -> int:
        """The version that tokens are stamped with now."""

    @abstractmethod
    async def active_digest(self) -> str:
        """One digest over the weights the engine computes with, in its own layout: equal on equal
        engines, changed by every real update.
        """

    # -- life

    async def health(self) -> None:  # noqa: B027  optional
        """Raise EngineDied if the engine cannot serve."""

    async def cache_counts(self) -> CacheCounts | None:
        """None: no prefix cache, or none that counts."""
        return None

    async def close(self) -> None:  # noqa: B027  optional
        """Release everything; no child process may survive. Called once or more."""


COROUTINES = [name for name in vars(Backend) if inspect.iscoroutinefunction(getattr(Backend, name))]


def backend_class(config: Config) -> type[Backend]:
    """The class that rollout.backend names, with options that fit it. Raises ConfigError."""
    name = config.rollout.backend
    if name == "auto":
        name = "vllm" if config.mode == "cluster" else "hf"
    try:
        found = load_object(BUILTIN.get(name, name), "backend")
    except ValueError as error:
        raise ConfigError(f"rollout.backend: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(
            f"rollout.backend is {name!r}, which is {brief(found)}; expected a class that inherits "
            "tandem.rollout.backend.Backend"
        )
    check_calls(name, found)
    check_options(name, found, config.rollout.backend_options)
    if config.rollout.sleep and not overrides(found, "sleep"):
        raise ConfigError(
            f"rollout.sleep is true, but backend {name!r} has no `sleep`; write it, or set "
            "rollout.sleep=false"
        )
    if config.sync.transport in ("nccl", "ipc") and not found.joins_transfer:
        raise ConfigError(
            f"sync.transport is {config.sync.transport}, which backend {name!r} does not take "
            "part in (joins_transfer is false); use auto, shm (one machine) or gloo"
        )
    return found


def check_calls(name: str, cls: type[Backend]) -> None:
    """Raise ConfigError that names the calls which are missing or no coroutines."""
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise ConfigError(
            f"rollout.backend {name!r}: the class lacks {', '.join(missing)}; "
            "tandem.rollout.backend.Backend says what each must do"
        )
    plain = [call for call in COROUTINES if not is_coroutine(getattr(cls, call))]
    if plain:
        raise ConfigError(
            f"rollout.backend {name!r}: {', '.join(plain)} must be written with `async def`"
        )


def is_coroutine(function: Any) -> bool:
    """Whether it is written with `async def`, under whatever decorators."""
    return inspect.iscoroutinefunction(inspect.unwrap(function))


def check_options(name: str, cls: type[Backend], options: dict[str, Any]) -> None:
    """Raise ConfigError for an option that the class does not know, that is not of the type it is
    annotated with, or that it needs and has not got.
    """
    factory = cls.start if overrides(cls, "start") else cls
    parameters = inspect.signature(factory).parameters
    any_name = False
    known = []
    needed = []
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            any_name = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in GIVEN:
            known.append(parameter.name)
            if parameter.default is parameter.empty:
                needed.append(parameter.name)
    for option in options:
        unknown = option not in known and not any_name
        if unknown or option in GIVEN:
            raise ConfigError(
                f"backend {name!r} has no option {option!r}{closest(option, known)}, set in "
                f"rollout.backend_options; its options: {', '.join(known) or 'none'}"
            )
    for option in needed:
        if option not in options:
            raise ConfigError(
                f"backend {name!r} needs the option {option!r}: set rollout.backend_options: "
                f"{{{option}: ...}}"
            )
    check_types(factory, options)


def check_types(factory: Any, options: dict[str, Any]) -> None:
    """As far as annotations can be read: others are the class's own to check."""
    function = factory.__init__ if isinstance(factory, type) else factory
    try:
        hints = typing.get_type_hints(function)
    except Exception:
        return
    for option in options.keys() & hints.keys():
        key = f"rollout.backend_options.{option}"
        value = options[option]
        try:
            read = typed(hints[option], value, key)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if isinstance(value, str) and not isinstance(read, str):  # it would arrive as text
            raise ConfigError(
                f"{key}: found {value!r}, expected {describe(hints[option])}; write it without "
                "quotes"
            )


def overrides(cls: type[Backend], name: str) -> bool:
    """Whether a backend has a call of its own and not the default."""
    return function_of(cls, name) is not function_of(Backend, name)


def function_of(cls: type[Backend], name: str) -> Any:
    """The function behind a method, a classmethod's too."""
    method = getattr(cls, name)
    return getattr(method, "__func__", method)
