"""What an error of Ray's says about an engine."""

from __future__ import annotations

from tandem.engine.core.errors import EngineDied
from tandem.engine.core.text import first_line


def cause_of(error: BaseException) -> BaseException:
    """What the engine raised, where Ray wraps it."""
    return getattr(error, "cause", None) or error


def why_died(error: BaseException) -> str:
    """What the engine raised, in a line: Ray's errors are a page long."""
    cause = cause_of(error)
    return f"{type(cause).__name__}: {first_line(cause)}"


def is_death(error: BaseException) -> bool:
    return isinstance(cause_of(error), EngineDied) or is_actor_error(error)


def is_actor_error(error: BaseException) -> bool:
    from ray.exceptions import RayActorError, WorkerCrashedError

    return isinstance(error, (RayActorError, WorkerCrashedError))
