"""What vLLM sampled, as a Trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tandem.engine.core.types import Finish, GenRequest, Trajectory
from tandem.rollout.trajectories import trajectory

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}


def sampled(request: GenRequest, prefix: np.ndarray, output: CompletionOutput) -> Trajectory:
    """vLLM's output as a Trajectory.

    Raises RuntimeError if a token has no log-prob or no weight version.
    """
    from vllm.logprobs import FlatLogprobs

    ids = list(output.token_ids)
    logprobs = output.logprobs
    if not ids:
        logp = np.zeros(0)
        version = np.zeros(0, np.int32)
    elif (
        not isinstance(logprobs, FlatLogprobs)
        or logprobs.token_ids != ids
        or len(logprobs.logprobs) != len(ids)
        or output.weight_versions is None
    ):
        raise RuntimeError(
            f"group {request.group}: vLLM gave the tokens {ids} with the log-probs {logprobs} and "
            f"the weight versions {output.weight_versions}; expected one of each per token"
        )
    else:
        logp = np.array(logprobs.logprobs, np.float32)
        version = np.full(len(ids), -1, np.int32)
        for span in output.weight_versions:
            version[span.start : span.end] = int(span.version)
    finish = FINISH.get(output.finish_reason or "", Finish.ABORT)
    tokens = np.array(ids, np.int32)
    return trajectory(request, prefix, tokens, logp, version, finish)
