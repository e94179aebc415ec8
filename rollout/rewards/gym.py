"""reasoning-gym's own verifier of a task.

The dataset row is an entry of the task: question, answer, metadata, source_dataset.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Literal

from tandem.rollout.rewards.builtin import inside

EXTRACT = {
    "answer_tags": lambda text: inside(text, "answer"),
    "last_integer": lambda text: (re.findall(r"-?\d+", text) or [None])[-1],
    "whole": lambda text: text,
}


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
    found = EXTRACT[extract](completion)
    entry = {
        "question": question,
        "answer": answer,
        "metadata": json.loads(metadata) if isinstance(metadata, str) else metadata,
    }
    return verifier(source_dataset)(None if found is None else found.strip(), entry)


@functools.cache
def verifier(task: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
