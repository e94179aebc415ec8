"""A reward with signal from the first step: short responses are better."""


def score(prompt, completion, **columns):
    return 1.0 - len(completion) / 6
