"""Try the configured rewards on a few dataset rows, before any model is loaded (`tandem doctor
--reward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import shorten
from tandem.engine.core.types import RewardError
from tandem.rollout.rewards.api import Call, Reply, Signature, ground_truth
from tandem.rollout.rewards.runner import RewardRunner

ROWS = 3


def check(
    config: RewardConfig,
    rows: Sequence[Mapping[str, Any]],
    prompt: str = "prompt",
    response: str | None = None,
) -> str:
    """Call every function on the first three rows and report value, returned type and seconds, or
    the error.

    `prompt` and `response` name columns. Each row is scored with two completions: what the dataset
    says is right (the response, else the expected answer) and an empty one. No tokenizer is loaded:
    the token ids a function sees are the text's bytes. Raises ConfigError, with the report in it,
    if any call failed.
    """
    if not rows:
        raise ConfigError("the reward cannot be tried: the dataset has no rows")
    runner = RewardRunner(config)
    lines: list[str] = []
    failures = 0
    try:
        for i, row in enumerate(rows[:ROWS]):
            if prompt not in row:
                raise ConfigError(
                    f"data: row {i} has no column {prompt!r}; it has {', '.join(row)}"
                )
            right = str(ground_truth(row).get("ground_truth", ""))
            if response:
                right = row[response]
            lines.append(f"row {i}: {shorten(right)!r} and an empty completion")
            texts = (right, "")
            for number, signature in enumerate(runner.signatures):
                replies = []
                for call in calls(f"row {i}", row[prompt], row, texts, signature):
                    reply = runner.call(number, call)
                    replies.append(reply.result())
                errors = errors_of(replies)
                failures += len(errors)
                lines.append(f"  {signature.name} ({signature.kind}): {shown(replies)}")
                for error in dict.fromkeys(errors):
                    lines.append(f"    {error.kind}: {error.message}")
    finally:
        runner.close()
    report = "\n".join(lines)
    if failures:
        raise ConfigError(f"rewards failed on {failures} of the completions tried:\n{report}")
    return report


def calls(
    row_id: str,
    prompt: Any,
    row: Mapping[str, Any],
    texts: tuple[str, ...],
    signature: Signature,
) -> list[Call]:
    """One call for all texts, or one for each."""
    ids = tuple(bytes_of(text) for text in texts)
    if signature.per_group:
        return [Call(row_id, prompt, row, texts, ids)]
    found = []
    for number, text in enumerate(texts):
        own_ids = ids[number]
        found.append(Call(row_id, prompt, row, (text,), (own_ids,), number))
    return found


def bytes_of(text: str) -> np.ndarray:
    """int32: the text's bytes in the place of its token ids."""
    encoded = text.encode("utf-8", "surrogatepass")
    return np.frombuffer(encoded, np.uint8).astype(np.int32)


def errors_of(replies: Sequence[Reply]) -> list[RewardError]:
    found = []
    for reply in replies:
        for value in reply.values:
            if isinstance(value, RewardError):
                found.append(value)
    return found


def shown(replies: Sequence[Reply]) -> str:
    """Values, returned type and seconds, in one line."""
    values = []
    for reply in replies:
        for value in reply.values:
            values.append("failed" if isinstance(value, RewardError) else str(value))
    seconds = max(reply.seconds for reply in replies)
    returned = replies[0].returned or "nothing"
    return f"{'   '.join(values)}   returns {returned}, {seconds:.3f} s"
