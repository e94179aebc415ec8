"""What a run may be called. Imports nothing: the rules of a config use it."""
from __future__ import annotations


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
