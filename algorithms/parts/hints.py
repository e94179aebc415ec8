"""Hints: a part of a demonstration's text shown in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.engine.core.errors import MethodError


def first_words(text: str, share: float) -> str:
    """The first `share` of the text's characters, back to the last white space; in a text without
    any, to the character.
    """
    size = round(share * len(text))
    cut = text[:size]
    if size == len(text) or text[size].isspace():
        return cut.rstrip()
    words = cut.rsplit(maxsplit=1)
    if len(words) < 2 or not any(mark.isspace() for mark in cut.strip()):
        return cut
    return cut[: len(cut) - len(words[1])].rstrip()


def with_hint(content: Any, template: str, hint: str) -> Any:
    """A prompt's content with `template`, of which {hint} is the hint, behind its text, or behind
    that of the last message of the user.

    Raises MethodError for a chat in which the user says nothing.
    """
    addition = template.replace("{hint}", hint)
    if isinstance(content, str):
        return content + addition
    users = [i for i, message in enumerate(content) if message["role"] == "user"]
    if not users:
        raise MethodError("a prompt without a message of the user has no place for a hint")
    messages: list[Mapping[str, Any]] = list(content)
    last = messages[users[-1]]
    messages[users[-1]] = {**last, "content": last["content"] + addition}
    return messages
