"""Names that mean something to Tandem, and names that a config may not use."""

from __future__ import annotations

import re

DEFAULT_SOURCE = "experts"  # of data.sources: it stands at data.experts

# What Tandem itself gives to a template, or what apply_chat_template takes for its own arguments.
RESERVED = (
    "messages",
    "conversation",
    "conversations",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "strftime_now",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


def source_key(name: str) -> str:
    """Where a data source stands in a config."""
    return "data.experts" if name == DEFAULT_SOURCE else f"data.sources.{name}"


def source_fault(name: object) -> str:
    """What is wrong with the name of a data source, or ''."""
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z_][\w-]*", name) is None:
        return "is no name: expected a letter, then letters, digits, _ and -"
    if name == DEFAULT_SOURCE:
        return "is the source that stands at data.experts; move it there, or choose another name"
    return ""


def name_fault(name: str) -> str:
    """What is wrong with a run.name, or ''. It is the name of one folder in run.dir, not a path."""
    if not name.strip():
        return "is empty"
    if name in (".", ".."):
        return "names no folder of its own"
    if "/" in name or "\\" in name:
        return "is a path"
    if name.startswith("-"):
        return "begins with a dash, which commands take for an option"
    if any(not character.isprintable() for character in name):
        return "has a character that cannot be printed"
    return ""
