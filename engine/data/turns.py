"""A chat with several trained turns as tokens: of each, exactly what the model would have sampled.

A turn is what the chat template adds to the conversation before it, header of the answer included;
the tokens up to the one at which the model stops are trained. So every conversation that ends with
a trained turn must be the beginning of the whole one. Templates that write earlier turns otherwise
once later ones are there, such as those that strip former reasoning, are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.data.samples import Sample


@dataclass(frozen=True, eq=False)
class Turns:
    tokens: np.ndarray  # int32 [T], behind the prompt; the last one is a stop token
    trained: np.ndarray  # bool [T]


def encode_turns(
    encoder, sample: Sample, text: str, rest: str, prompt: np.ndarray, label: str
) -> Turns:
    """The tokens behind a prompt. encoder: of encoding.py; text, prompt: what the template made of
    the prompt, and its tokens; rest: the text behind it.

    Raises ConfigError that names the turn.
    """
    whole = text + rest
    done = text
    tokens = prompt
    trained: list[np.ndarray] = []
    for turn in sample.trained:
        last = turn == sample.trained[-1]
        before = text
        if turn > 0:
            before = rendered(encoder, sample, turn, whole, label)
        between = encoder.continuation(tokens, done, before[len(done) :], True, label)
        tokens = np.concatenate([tokens, between])
        done = whole
        if not last:
            done = rendered(encoder, sample, turn, whole, label, answered=True)
        piece = encoder.continuation(tokens, before, done[len(before) :], True, label)
        if not last and not np.isin(piece, encoder.stop).any():
            raise ConfigError(
                f"{name_of(encoder, sample, turn, label)}: the chat template ends it without a "
                f"token at which the model stops ({brief(done[-40:])}), so the model would not "
                "learn to; add that token to the model's generation config, or set "
                "`train_on: last` of the dataset"
            )
        answer = encoder.with_stop(piece, label)
        if last:
            piece = answer
        tokens = np.concatenate([tokens, piece])
        trained.append(np.zeros(len(between), bool))
        trained.append(np.arange(len(piece)) < len(answer))
    return Turns(tokens[len(prompt) :], np.concatenate(trained))


def rendered(
    encoder, sample: Sample, turn: int, whole: str, label: str, answered: bool = False
) -> str:
    """The conversation before a turn, with the header of the answer, or up to its end.

    Raises ConfigError unless the whole conversation begins with it.
    """
    messages = [*sample.chat, *sample.turns[:turn]]
    if answered:
        messages.append(sample.turns[turn])
    text = encoder.render(messages, sample.tools, not answered, label)
    if whole.startswith(text):
        return text
    same = 0
    while text[same : same + 1] == whole[same : same + 1]:  # ends: `whole` has another character
        same += 1
    raise ConfigError(
        f"{name_of(encoder, sample, turn, label)}: the chat template writes the conversation up to "
        "it differently once later turns are there, so that training would not see what the model "
        f"samples: {brief(text[same : same + 60])} became {brief(whole[same : same + 60])}; use a "
        "template that only appends, a row of its own for each turn, or `train_on: last` of the "
        "dataset"
    )


def name_of(encoder, sample: Sample, turn: int, label: str) -> str:
    """The turn as a message of the row, the first being 1."""
    own = len(sample.chat) + turn + 1
    if encoder.system is not None:
        own -= 1  # the system prompt of the config comes first
    return f"{label}: message {own} (assistant)"
