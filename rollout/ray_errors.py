"""What an error of Ray's says about an engine."""

from __future__ import annotations

from tandem.engine.core.errors import EngineDied


def cause_of(error: BaseException) -> BaseException:
    """What the engine raised, where Ray wraps it."""
    return getattr(error, "cause", None) or error


def first_line(error: BaseException) -> str:
    """Ray's errors are a page long."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_death(error: BaseException) -> bool:
    return isinstance(cause_of(error), EngineDied) or is_actor_error(error)


def is_actor_error(error: BaseException) -> bool:
    from ray.exceptions import RayActorError, WorkerCrashedError

    return isinstance(error, (RayActorError, WorkerCrashedError))
