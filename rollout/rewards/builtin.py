"""Rewards that need no other package: exact, format, length, and random ones for plumbing.

Parameters after `*` are set by reward.options.
"""

from __future__ import annotations

import random
import re

from tandem.rollout.rewards.answers import expected_texts


def exact(
    completion: str,
    ground_truth,
    *,
    tag: str | None = None,
    marker: str | None = None,
) -> float:
    """1 if the answer is the expected one, white space around both aside, else 0.

    The answer is the whole completion; with `marker` what follows the last marker; with `tag` what
    stands in the last <tag>...</tag> of that. Raises ValueError if there is no expected answer
    (answers.py).
    """
    expected = expected_texts(ground_truth)
    answer = after(completion, marker) if marker else completion
    if tag and answer is not None:
        answer = inside(answer, tag)
    return float(answer is not None and answer.strip() in expected)


def matches_format(
    completion: str, *, pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>"
) -> float:
    """1 if the completion, white space around it aside, is `pattern` from its first to its last
    character (a dot also matches a line break), else 0.
    """
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


def length(
    completion: str,
    completion_ids: list[int],
    *,
    max_tokens: int,
    buffer_tokens: int,
) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476 eq. 13: 0 up to max_tokens - buffer_tokens,
    then falling linearly to -1 at max_tokens and beyond.
    """
    left = max_tokens - buffer_tokens - len(completion_ids)
    return max(-1.0, min(0.0, left / buffer_tokens))


def fake(completion: str, prompt_id: str, sample_index: int, run_seed: int) -> float:
    """A number in [0, 1) that depends on the seed, the prompt and the sample's number alone."""
    return random.Random(f"{run_seed} {sample_index} {prompt_id}").random()


def inside(text: str, tag: str) -> str | None:
    """What stands in the last <tag>...</tag>, None without one."""
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return found[-1] if found else None


def after(text: str, marker: str) -> str | None:
    """What follows the last `marker`, None without one."""
    _, found, rest = text.rpartition(marker)
    return rest if found else None
