"""What a backend sampled, as a Trajectory, and whether its answers are what they must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import Finish, GenRequest, Source, Trajectory


def trajectory(
    request: GenRequest,
    prefix: np.ndarray,
    sampled: np.ndarray,
    logp: np.ndarray,
    version: np.ndarray | int,
    finish: Finish,
) -> Trajectory:
    """One answer to `request`: its prompt, `prefix` (int32, the forced first ids, may be empty) and
    the `sampled` ids int32 [n], with float32 [n] log-probs under the distribution that they were
    sampled from, and the weight version that sampled them (one, or int32 [n]).
    """
    prompt = request.prompt.tokens
    given = len(prompt) + len(prefix)
    length = given + len(sampled)
    source = np.full(length, Source.POLICY, np.int8)
    source[: len(prompt)] = Source.PROMPT
    source[len(prompt) : given] = request.prefix_source
    tokens = np.concatenate([prompt, prefix, sampled])
    behaviour_logp = np.full(length, np.nan, np.float32)
    behaviour_logp[given:] = logp
    versions = np.full(length, -1, np.int32)
    versions[given:] = version
    return Trajectory(
        prompt_id=request.prompt.id,
        tokens=tokens.astype(np.int32),
        source=source,
        finish=finish,
        behaviour_logp=behaviour_logp,
        version=versions,
        group=request.group,
        wave=request.wave,
    )


def prefixes_of(request: GenRequest) -> list[np.ndarray]:
    """int32 ids that each sample is made to start with, mostly none.

    Raises ValueError if there are prefixes, and not one per sample.
    """
    if not request.prefixes:
        none = np.zeros(0, np.int32)
        return [none] * request.samples
    if len(request.prefixes) != request.samples:
        raise ValueError(
            f"group {request.group}: {len(request.prefixes)} prefixes for {request.samples} "
            "samples; give one per sample (may be empty) or none"
        )
    return [np.asarray(prefix, np.int32) for prefix in request.prefixes]


def checked_answer(request: GenRequest, answer: Any) -> tuple[Trajectory, ...]:
    """What a backend's `generate` returned. Raises ConfigError unless it is one Trajectory per
    sample.
    """
    count = len(answer) if isinstance(answer, (list, tuple)) else None
    if count != request.samples:
        found = repr(answer) if count is None else f"{count} of them"
        raise ConfigError(
            f"rollout.backend: `generate` was asked for {request.samples} trajectories of prompt "
            f"{request.prompt.id!r} and returned {found}; one per sample is expected"
        )
    for entry in answer:
        if not isinstance(entry, Trajectory):
            raise ConfigError(
                f"rollout.backend: `generate` returned a {type(entry).__name__} for prompt "
                f"{request.prompt.id!r}, expected a Trajectory (rollout/trajectories.py makes one)"
            )
    return tuple(answer)


def checked_installed(answer: Any) -> Installed:
    """What a backend's `finish_weight_update` returned. Raises ConfigError for anything else."""
    if not isinstance(answer, Installed):
        raise ConfigError(
            f"rollout.backend: `finish_weight_update` returned {answer!r}, expected an Installed "
            "(what it received, its version, and the digest of its active weights)"
        )
    return answer


def sampled(trajectories: Sequence[Trajectory]) -> int:
    """Tokens that were sampled, over all of a request's trajectories."""
    count = 0
    for one in trajectories:
        is_sampled = one.source == Source.POLICY
        count += int(is_sampled.sum())
    return count
