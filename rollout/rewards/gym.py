"""reasoning-gym's own verifier of a task.

The dataset row is an entry of the task: question, answer, metadata, source_dataset.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any, Literal

from tandem.rollout.rewards.builtin import inside


def score(
    completion: str,
    question: str,
    answer: str,
    metadata: dict | str,
    source_dataset: str,
    *,
    extract: Literal["answer_tags", "last_integer", "whole"] = "answer_tags",
) -> float:
    """The task's `score_answer`, mostly 1 for right, and 0 or a small number for wrong.

    `extract` says what is taken for the answer: answer_tags (in the last <answer>...</answer>,
    white space around it aside), last_integer, or whole.
    """
    found = answer_in(completion, extract)
    if found is not None:
        found = found.strip()
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    entry = {
        "question": question,
        "answer": answer,
        "metadata": metadata,
    }
    verify = verifier(source_dataset)
    return verify(found, entry)


def answer_in(completion: str, extract: str) -> str | None:
    if extract == "answer_tags":
        return inside(completion, "answer")
    if extract == "whole":
        return completion
    integers = re.findall(r"-?\d+", completion)
    return integers[-1] if integers else None


@functools.cache
def verifier(task: str) -> Callable[[str | None, dict], float]:
    import reasoning_gym

    # its annotation says that it takes no arguments
    function: Any = reasoning_gym.get_score_answer_fn(task)
    return function
