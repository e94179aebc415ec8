"""Names that mean something to Tandem, and names that a config may not use."""

from __future__ import annotations

import re

DEFAULT_SOURCE = "experts"  # of data.sources: it stands at data.experts

# models beside those of the section `models`: the present weights, and what they are held near to
POLICY = "policy"
REFERENCE = "reference"
ALWAYS_THERE = (REFERENCE, POLICY)
AT = "@"  # teacher@informed: the model `teacher` behind the row's other prompt `informed`
LOGP = "logp:"  # begins the name of a stream that a model gives; of the reference it is ref_logp

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


def model_fault(name: object) -> str:
    """What is wrong with the name of a model of the section `models`, or ''."""
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z_]\w*", name) is None:
        return "is no name: expected a letter, then letters, digits and _"
    if name in ALWAYS_THERE:
        return "is the name of a model that is always there; choose another"
    return ""


def logp_of(model: str) -> str:
    """The stream with the log-probs of a model, `NAME` or `NAME@VIEW`."""
    return "ref_logp" if model == REFERENCE else LOGP + model


def model_of(stream: str) -> str | None:
    """The model, `NAME` or `NAME@VIEW`, that gives a stream; None where no model but the present
    one does.
    """
    if stream == logp_of(REFERENCE):
        return REFERENCE
    return stream.removeprefix(LOGP) if stream.startswith(LOGP) else None


def split_view(model: str) -> tuple[str, str]:
    """`NAME@VIEW` -> (NAME, VIEW), `NAME` -> (NAME, '')."""
    name, _, view = model.partition(AT)
    return name, view


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
