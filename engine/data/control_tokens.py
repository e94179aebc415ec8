"""Control tokens spelled out in a dataset's text: `<|im_end|>` typed into a prompt ends the turn
there.

A control token is one at which generation stops, the BOS, EOS, padding, separator and class tokens,
and every special token that the chat template writes or that is called after a role (<|user|>).
Special tokens in pairs (<think> and </think>) are tags: they may stand in any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ROLES = ("system", "user", "assistant", "tool", "developer", "human", "bot")


def control_texts(tokenizer, stop: Iterable[int], template: str) -> list[str]:
    """The texts of all control tokens of a tokenizer, the longest first."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    named = [
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.sep_token,
        tokenizer.cls_token,
    ]
    stops = [tokenizer.convert_ids_to_tokens(number) for number in stop]
    found = {text for text in (*named, *stops) if text in added}
    for text, special in added.items():
        in_template = text in template or any(role in text.lower() for role in ROLES)
        if special and in_template and not is_tag(text, added):
            found.add(text)
    if tokenizer.unk_token not in stops:
        found.discard(tokenizer.unk_token)
    return sorted(found, key=len, reverse=True)


def is_tag(text: str, known: Iterable[str]) -> bool:
    """Whether `text` is one of a pair <name> and </name>."""
    match = re.fullmatch(r"</?([^<>/]+)>", text)
    if match is None:
        return False
    return f"<{match[1]}>" in known and f"</{match[1]}>" in known


class ControlTokens:
    """Finds the control tokens of a tokenizer in a text."""

    def __init__(self, tokenizer, stop: list[int], template: str):
        texts = control_texts(tokenizer, stop, template)
        self.pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self.stops = tuple(tokenizer.convert_ids_to_tokens(number) for number in stop)

    def find(self, text: str) -> str | None:
        match = self.pattern.search(text) if self.pattern else None
        return match[0] if match else None

    def escape(self, text: str) -> str:
        """`text` with a space behind the first character of every control token in it."""
        if self.pattern is None:
            return text
        return self.pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def split_end(self, text: str) -> tuple[str, str]:
        """(text, the stop token and white space that a response may end with)."""
        bare = text.rstrip()
        for stop in self.stops:
            if stop and bare.endswith(stop):
                at = len(bare) - len(stop)
                return text[:at], text[at:]
        return text, ""
