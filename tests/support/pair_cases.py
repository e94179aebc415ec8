"""Hand-made pairs of answers, as a source of pairs gives them."""

from dataclasses import replace

from tandem.engine.learner.inspect import trajectory


def answer(prompt, response, role, number=0):
    made = trajectory(prompt, response, expert=True, prompt_id=f"p{prompt}")
    return replace(made, role=role, group=number)


# two pairs, of 3 and 1 tokens and of 2 and 4
PAIRS = (
    answer([1, 2], [5, 6, 3], "chosen", 40),
    answer([1, 2], [7], "rejected", 40),
    answer([4], [8, 3], "chosen", 41),
    answer([4], [9, 8, 6, 3], "rejected", 41),
)
