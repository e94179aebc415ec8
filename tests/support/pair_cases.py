"""Hand-made pairs of answers, as a source of pairs gives them."""

from dataclasses import replace

from tandem.engine.learner.by_hand import pair, trajectory

# of 3 and 1 tokens and of 2 and 4
PAIRS = (*pair([1, 2], [5, 6, 3], [7], 40), *pair([4], [8, 3], [9, 8, 6, 3], 41))


def answer(prompt, response, role):
    """Half a pair."""
    return replace(trajectory(prompt, response, expert=True), role=role)
