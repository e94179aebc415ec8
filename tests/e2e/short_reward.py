"""A reward with signal from the first step: short responses are better."""


def score(prompt, completion, completion_ids, **columns):
    return 1.0 - len(completion_ids) / 8
