"""Two reward functions of one's own: partial credit for the answer, and a bonus for a short one.

    reward:
      functions: [my_reward.py:in_place, my_reward.py:short]
      weights: [1.0, 0.1]
      options: {"my_reward.py:short": {limit: 8}}

A function is given what its parameters name: the completion, the prompt, the expected answer
(`ground_truth`) or any column of the dataset; after the star stand options of the config. What it
raises is an error of that sample, never a score of 0.
"""


def in_place(completion, ground_truth):
    """The part of the expected answer's characters that stand where they should: 0 to 1."""
    found = completion.strip()
    right = sum(mine == expected for mine, expected in zip(found, ground_truth, strict=False))
    return right / max(len(found), len(ground_truth))


def short(completion, *, limit):
    """1 for at most `limit` characters, else 0."""
    return float(len(completion) <= limit)
