"""Try the configured rewards on a few dataset rows, before any model is loaded (`tandem doctor
--reward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import RewardError
from tandem.rollout.rewards.api import Call, ground_truth
from tandem.rollout.rewards.runner import RewardRunner


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
    try:
        lines, failures = [], 0
        for i, row in enumerate(rows[:3]):
            if prompt not in row:
                raise ConfigError(
                    f"data: row {i} has no column {prompt!r}; it has {', '.join(row)}"
                )
            right = row[response] if response else str(ground_truth(row).get("ground_truth", ""))
            texts = (right, "")
            lines.append(f"row {i}: {short(right)!r} and an empty completion")
            ids = tuple(
                np.frombuffer(t.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)
                for t in texts
            )
            for number, signature in enumerate(runner.signatures):
                starts = (0,) if signature.per_group else (0, 1)
                size = len(texts) // len(starts)
                replies = [
                    runner.call(
                        number,
                        Call(
                            f"row {i}", row[prompt], row, texts[k : k + size], ids[k : k + size], k
                        ),
                    ).result()
                    for k in starts
                ]
                values = [value for reply in replies for value in reply.values]
                errors = [v for v in values if isinstance(v, RewardError)]
                failures += len(errors)
                shown = "   ".join(
                    "failed" if isinstance(v, RewardError) else str(v) for v in values
                )
                lines.append(
                    f"  {signature.name} ({signature.kind}): {shown}   returns "
                    f"{replies[0].returned or 'nothing'}, "
                    f"{max(r.seconds for r in replies):.3f} s"
                )
                lines += [f"    {e.kind}: {e.message}" for e in dict.fromkeys(errors)]
    finally:
        runner.close()
    report = "\n".join(lines)
    if failures:
        raise ConfigError(f"rewards failed on {failures} of the completions tried:\n{report}")
    return report


def short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
