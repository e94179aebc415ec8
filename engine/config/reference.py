"""The reference of keys and the JSON schema for editors, both made of the types in schema.py.

tandem configs --keys > docs/config_keys.md
tandem configs --schema > docs/config.schema.json
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from tandem.engine.config.keys import keys_of, without_none
from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.schema import Config, DatasetConfig
from tandem.engine.config.validation import BOUNDS, adapter
from tandem.engine.config.words import describe

HEAD = """# Keys of a config

Made by `tandem configs --keys` of `engine/config/schema.py`, where a key is added or changed.
[Configs](config.md) says how files, overrides, paths and secrets work, and how an editor completes
these keys.

`base` names a config that this one is laid over; it stands in a file alone.
"""
BASE = (
    "Another config, which this one is laid over: a file, relative to this one's folder, or "
    "tandem:NAME."
)
# {section: {keys: the class of what stands at each of them}}, told behind it
NAMED = {
    "model": {"models.NAME": OtherModelConfig},
    "data": {"data.prompts, data.experts, data.evaluation, data.sources.NAME": DatasetConfig},
}
LIMITS = {  # of a JSON schema, by pydantic's names
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


class Untitled(GenerateJsonSchema):
    """Without a title for every key, which would say its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """The schema of a config file."""
    schema = adapter().json_schema(schema_generator=Untitled)
    schema["properties"] = {"base": {"type": "string", "description": BASE}} | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def schema_text() -> str:
    return json.dumps(json_schema(), indent=1) + "\n"


def reference() -> str:
    """A page in Markdown: a table for each section."""
    schema = json_schema()
    parts = [HEAD, table("", Config, schema)]
    for name, section in sections(Config):
        parts.append(heading(name, schema["$defs"][section.__name__]))
        parts.append(table(f"{name}.", section, schema["$defs"][section.__name__]))
        for names, named in NAMED.get(name, {}).items():
            rows = schema["$defs"][named.__name__]
            parts.append(heading(names, rows))
            parts.append(table("", named, rows))
    return "\n".join(parts)


def sections(parent: Any) -> list[tuple[str, Any]]:
    """The keys that hold sections of their own kind, with their classes."""
    found = []
    for name, hint in keys_of(parent).items():
        if dataclasses.is_dataclass(hint):
            found.append((name, hint))
    return found


def heading(name: str, section: dict[str, Any]) -> str:
    return f"## {name}\n\n{section['description']}\n"


def table(prefix: str, section: Any, schema: dict[str, Any]) -> str:
    """The keys of a section that are no sections themselves."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, hint in keys_of(section).items():
        if not dataclasses.is_dataclass(hint):
            node = schema["properties"][name]
            meaning = " ".join(node["description"].split()).replace("|", "\\|")
            default = json.dumps(node.get("default", {}))
            lines.append(f"| `{prefix}{name}` | {value(hint, node)} | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


def value(hint: Any, node: dict[str, Any]) -> str:
    """The type in words, with its bounds."""
    kind = without_none(hint)
    words = describe(kind)
    for name, limit in limits(node).items():
        words += f", {BOUNDS[name]} {limit:g}"
    return words if kind == hint else f"{words}, or null"


def limits(node: dict[str, Any]) -> dict[str, float]:
    """The bounds of a key in the schema, by pydantic's names."""
    if "anyOf" in node:  # this, or null
        node = node["anyOf"][0]
    return {name: node[word] for name, word in LIMITS.items() if word in node}
