"""Names that a config may not use."""

from __future__ import annotations

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
