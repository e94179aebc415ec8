"""Chat messages as datasets have them, read into one form: a list of {role, content, ...}.

    ShareGPT        {from: human, value: ...} is {role: user, content: ...}; gpt is the assistant
    parts           a content that is a list of text parts is their text
    null            a key whose value is null counts as not given: Parquet fills in such keys
    tool calls      an assistant's message with tool_calls needs no content

Everything else is a ValueError that says what was found; the caller adds the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from tandem.engine.core.text import brief

ALIASES = {"human": "user", "gpt": "assistant"}
MEDIA_PARTS = ("image", "image_url", "video", "audio", "input_audio")
REASONING = ("reasoning_content", "reasoning", "thinking")


def read_messages(value: Any, template: str) -> list[dict[str, Any]]:
    """`value` of a column as messages. template: the chat template's source, which may know role
    names of its own. Raises ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"expected text or a list of messages with role and content, found {brief(value)}"
        )
    return [read_message(message, template) for message in value]


def read_message(value: Any, template: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a message with role and content, found {brief(value)}")
    message = {}
    for key, entry in value.items():
        if entry is not None:
            message[key] = entry
    if "role" not in message and "from" in message:
        message = sharegpt(message)
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"expected a message with role and content, found {brief(value)}")
    if role in ALIASES and not names_role(template, role):
        message["role"] = ALIASES[role]
    if "tool_calls" in message:
        message["tool_calls"] = without_nulls(message["tool_calls"])
        message.setdefault("content", "")
    message["content"] = read_content(message.get("content"), value)
    return message


def sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    out = {"role": message["from"]}
    for key, entry in message.items():
        if key == "value":
            out["content"] = entry
        elif key != "from":
            out[key] = entry
    return out


def names_role(template: str, role: str) -> bool:
    """Whether a template has a case for this role: its name in quotes."""
    return f"'{role}'" in template or f'"{role}"' in template


def read_content(content: Any, message: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"expected a message with role and content, found {brief(message)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"expected a content of text or of text parts, found {brief(part)}")
        texts.append(text)
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, all the way down."""
    if isinstance(value, dict):
        kept = {}
        for key, entry in value.items():
            if entry is not None:
                kept[key] = without_nulls(entry)
        return kept
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of JSON schemas, or that list as JSON. Raises ValueError."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"expected a list of tools as JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"expected a list of tools, each a JSON schema, found {brief(value)}")
    for tool in value:
        if not isinstance(tool, dict):
            raise ValueError(f"expected a tool as a JSON schema, found {brief(tool)}")
    return without_nulls(value) or None


def media_part(value: Any) -> str | None:
    """The kind of the first part of some message that is no text, or None."""
    for message in dicts_of(value):
        for part in dicts_of(message.get("content")):
            kind = part.get("type")
            if kind in MEDIA_PARTS:
                return kind
    return None


def dicts_of(value: Any) -> list[dict[str, Any]]:
    """The entries of a list that are mappings; none of what is no list."""
    if not isinstance(value, list):
        return []
    return [entry for entry in value if isinstance(entry, dict)]


def what_must_show(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of all that a template has to write of a message."""
    for key in REASONING:
        text = message.get(key)
        if isinstance(text, str):
            yield key, text
    yield "content", message["content"]
    for call in dicts_of(message.get("tool_calls")):
        function = call.get("function", call)
        if not isinstance(function, dict):
            continue
        name = function.get("name")
        if isinstance(name, str):
            yield "tool call", name


def find_missing(text: str, messages: list[dict[str, Any]]) -> tuple[dict, str, str] | None:
    """(message, name, its text) of what a rendered conversation lacks; None if it has everything.

    White space around a content does not count. The contents must come in the order of the
    messages; a system message may stand anywhere, as some templates put it before the last turn.
    """
    place = 0
    for message in messages:
        anywhere = message["role"] in ("system", "developer")
        for name, wanted in what_must_show(message):
            stripped = wanted.strip()
            in_order = name == "content" and not anywhere
            start = place if in_order else 0
            found = text.find(stripped, start)
            if found < 0:
                return message, name, wanted
            if in_order:
                place = found + len(stripped)
    return None


def with_markers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with contents that occur nowhere else: a short content, such as `a`, would
    be found in the words of the template."""
    marked = []
    for number, message in enumerate(messages):
        marker = f"MESSAGE-{number}-HERE"
        marked.append({**message, "content": marker})
    return marked


def literals(template: str) -> re.Pattern | None:
    """What a template may look for in a content: its quoted texts with a sign in them, </think>."""
    quoted = re.findall(r"'([^'\n]{3,40})'|\"([^\"\n]{3,40})\"", template)
    found = set()
    for text in chain.from_iterable(quoted):
        if re.search(r"[^\w\s]", text):
            found.add(text)
    if not found:
        return None
    escaped = [re.escape(text) for text in sorted(found)]
    return re.compile("|".join(escaped))
