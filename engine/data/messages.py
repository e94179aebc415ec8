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
    message = {key: entry for key, entry in value.items() if entry is not None}
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
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            raise ValueError(f"expected a content of text or of text parts, found {brief(part)}")
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, all the way down."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
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
    for message in value if isinstance(value, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in MEDIA_PARTS:
                return part["type"]
    return None


def what_must_show(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of all that a template has to write of a message."""
    for key in REASONING:
        if isinstance(message.get(key), str):
            yield key, message[key]
    yield "content", message["content"]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield "tool call", function["name"]


def find_missing(text: str, messages: list[dict[str, Any]]) -> tuple[dict, str, str] | None:
    """(message, name, its text) of what a rendered conversation lacks; None if it has everything.

    White space around a content does not count. The contents must come in the order of the
    messages; a system message may stand anywhere, as some templates put it before the last turn.
    """
    place = 0
    for message in messages:
        anywhere = message["role"] in ("system", "developer")
        for name, wanted in what_must_show(message):
            start = 0 if anywhere or name != "content" else place
            found = text.find(wanted.strip(), start)
            if found < 0:
                return message, name, wanted
            if not anywhere and name == "content":
                place = found + len(wanted.strip())
    return None


def with_markers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with contents that occur nowhere else: a short content, such as `a`, would
    be found in the words of the template."""
    return [
        {**message, "content": f"MESSAGE-{number}-HERE"} for number, message in enumerate(messages)
    ]


def literals(template: str) -> re.Pattern | None:
    """What a template may look for in a content: its quoted texts with a sign in them, </think>."""
    quoted = re.findall(r"'([^'\n]{3,40})'|\"([^\"\n]{3,40})\"", template)
    found = {text for pair in quoted for text in pair if re.search(r"[^\w\s]", text)}
    if not found:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(found)))
