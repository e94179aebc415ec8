"""YAML text as plain values, within bounds: a config file, or the value of an override.

Plain values are text, numbers, booleans, null, lists, and mappings whose keys are text or integers.
Aliases and merge keys work, and every use of an alias is a copy of its own.

Refused with a `YamlError` that says what was found and where:
  * text that is no UTF-8, several documents, tags, keys that are given twice;
  * what cannot be read in a moment: large files, deep nesting, aliases that unfold to very much,
    and
    values that hold themselves;
  * what YAML 1.1 reads as something else than most people mean: dates (2026-11-25), octal numbers
    (010 is 8), base 60 (1:30 is 90).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1 << 20  # of a file or an override
MAX_DEPTH = 50  # of lists and mappings in each other
MAX_VALUES = 50_000  # in all, with every alias unfolded
PREFIX = "tag:yaml.org,2002:"
MERGE = PREFIX + "merge"
QUOTES = "put it in quotes if it is text"
OCTAL = re.compile(r"[-+]?0[0-7]+")
BOOLEANS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}

Path = tuple[str | int, ...]  # where a value stands: the keys and list positions down to it
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlError(ValueError):
    """The text is not what this module reads."""


@dataclass
class Document:
    """What a text says.

    `written` has the text of every number and boolean that stands there without quotes: {path:
    text}.
    """

    value: Any = None
    written: dict[Path, str] = field(default_factory=dict)

    def forget(self, path: Path) -> None:
        """Drop what was written at `path` and below: another value takes its place."""
        stale = [other for other in self.written if other[: len(path)] == path]
        for other in stale:
            del self.written[other]


def decode(data: bytes) -> str:
    """The text of a file in UTF-8, without its byte order mark. Raises YamlError."""
    if len(data) > MAX_BYTES:
        raise YamlError(
            f"has {len(data)} bytes, at most {MAX_BYTES} are read; "
            "put data into a data file and name that"
        )
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise YamlError("is UTF-16 text, expected UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise YamlError(
            f"is not UTF-8: byte {data[error.start]:#04x} in line {line}; save it as UTF-8"
        ) from None


def read(text: str) -> Document:
    """The one document of `text`. Raises YamlError."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"has {len(text)} characters, at most {MAX_BYTES} are read")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise YamlError(f"not a text file: a NUL byte in line {line}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise YamlError("not valid Unicode: it holds bytes that are no UTF-8") from None
    try:
        check_events(text)
        node = yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {explain(error, text)}") from None
    if node is None:
        return Document()
    Measure().of(node, "the document")
    document = Document()
    document.value = Reader(document).value(node, ())
    return document


def check_events(text: str) -> None:
    """One document, not nested deeper than MAX_DEPTH. Nothing is built yet and nothing recurses."""
    depth = documents = 0
    for events, event in enumerate(yaml.parse(text, Loader), 1):
        if events > 2 * MAX_VALUES:  # a list or mapping has two: its start and its end
            raise YamlError(
                f"the document holds more than {MAX_VALUES} values {place(event)}; "
                "put data into a data file and name that"
            )
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        if depth > MAX_DEPTH:
            raise YamlError(f"nested more than {MAX_DEPTH} deep {place(event)}")
        if documents > 1:
            raise YamlError(
                f"a second document {place(event)} (after a line ---), "
                "expected one; put it into a file of its own"
            )


class Measure:
    """Counts a document's values with aliases unfolded, each node once."""

    def __init__(self):
        self.known: dict[int, tuple[int, int]] = {}  # by id of the node: values, depth
        self.open: set[int] = set()  # nodes around the present one

    def of(self, node: yaml.Node, name: str) -> tuple[int, int]:
        """(values, depth) of `node`. Recurses no deeper than the text is nested.

        An alias stands behind the node it repeats, so that node is known already, or still open.
        """
        if id(node) in self.open:
            raise YamlError(
                f"{name} {place(node)} holds itself: an alias (*) or merge (<<) in it "
                "names the value that it stands in"
            )
        if id(node) in self.known:
            return self.known[id(node)]
        self.open.add(id(node))
        values, depth = 1, 0
        for child_name, child in children(node):
            child_values, child_depth = self.of(child, child_name)
            values += child_values
            depth = max(depth, child_depth + 1)
        if values > MAX_VALUES:
            raise YamlError(
                f"{name} {place(node)} holds more than {MAX_VALUES} values, "
                "each alias (*) counted with all that it stands for"
            )
        if depth > MAX_DEPTH:
            raise YamlError(f"{name} {place(node)} is nested more than {MAX_DEPTH} deep")
        self.open.remove(id(node))
        self.known[id(node)] = values, depth
        return values, depth


def children(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """What stands directly in `node`, with a name for errors, in the order of the text."""
    if isinstance(node, yaml.SequenceNode):
        return [("an entry of a list", child) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        pairs = []
        for key, value in node.value:
            pairs.append(("a key", key))
            pairs.append((f"the value of {str(key.value)[:60]!r}", value))
        return pairs
    return []


class Reader:
    """Turns measured nodes into plain values and notes what was written."""

    def __init__(self, document: Document):
        self.document = document
        self.constructor = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            expect_tag(node, "map", path)
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            expect_tag(node, "seq", path)
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        value = self.scalar(node, dotted(path) or "the document")
        if value is not None and not isinstance(value, str):
            self.document.written[path] = node.value
        return value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str | int, Any]:
        result: dict[str | int, Any] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                for merged in reversed(merged_nodes(value, path)):
                    result |= self.mapping(merged, path)
        given = set()
        for key, value in node.value:
            if key.tag == MERGE:
                continue
            name = self.key(key, path)
            if str(name) in given:
                raise YamlError(f"the key {str(name)!r} is given twice, again {place(key)}")
            given.add(str(name))
            if name in result:
                self.document.forget((*path, name))  # merged before
            result[name] = self.value(value, (*path, name))
        return result

    def key(self, node: yaml.Node, path: Path) -> str | int:
        owner = f"in {dotted(path)} " if path else ""
        if not isinstance(node, yaml.ScalarNode):
            raise YamlError(f"{owner}{place(node)}: a key is a list or a mapping, expected a word")
        name = self.scalar(node, f"a key {owner}".strip())
        if type(name) in (str, int):
            return name
        raise YamlError(
            f"{owner}{place(node)}: the key {node.value!r} is {kind(name)} to YAML, "
            "not text; put it in quotes"
        )

    def scalar(self, node: yaml.Node, name: str) -> Any:
        """Text, number, boolean or None. `name` is what errors call the place."""
        tag, text = node.tag.removeprefix(PREFIX), node.value
        if tag in ("str", "value", "merge"):
            return text
        if tag == "null":
            return None
        if tag == "bool" and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if tag == "timestamp":
            raise YamlError(
                f"{name}: found {text!r} {place(node)}, which YAML reads as a date; "
                f"put it in quotes: '{text}'"
            )
        if tag not in ("int", "float", "bool"):
            refuse_tag(node, name)
        if ":" in text:
            raise YamlError(
                f"{name}: found {text!r} {place(node)}, which YAML reads as a number "
                f"in base 60; write the number out, or {QUOTES}"
            )
        if tag == "int" and OCTAL.fullmatch(text.replace("_", "")):
            raise YamlError(
                f"{name}: found {text!r} {place(node)}, which YAML reads as octal; "
                f"write the number without the leading 0, or {QUOTES}"
            )
        try:
            return self.constructor.yaml_constructors[node.tag](self.constructor, node)
        except (ValueError, LookupError):
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            raise YamlError(f"{name}: found {shown!r} {place(node)}, which is no {tag}") from None


def merged_nodes(node: yaml.Node, path: Path) -> list[yaml.MappingNode]:
    """The mappings that a merge key names; the first of them wins."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    found = []
    for merged in nodes:
        if not isinstance(merged, yaml.MappingNode):
            raise YamlError(
                f"{dotted(path) or 'the document'} {place(node)}: "
                "a merge (<<) names something that is no mapping"
            )
        found.append(merged)
    return found


def expect_tag(node: yaml.Node, tag: str, path: Path) -> None:
    if node.tag != PREFIX + tag:
        refuse_tag(node, dotted(path) or "the document")


def refuse_tag(node: yaml.Node, name: str) -> None:
    tag = node.tag.replace(PREFIX, "!!")
    raise YamlError(
        f"{name}: found the tag {tag} {place(node)}, expected a plain value; "
        "a config holds text, numbers, true and false, null, lists and mappings"
    )


def kind(value: Any) -> str:
    """What YAML takes `value` for, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "a number" if isinstance(value, (int, float)) else "text"


def dotted(path: Path) -> str:
    """('reward', 'functions', 0) is reward.functions[0]."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def place(item) -> str:
    mark = item.start_mark
    return f"(line {mark.line + 1}, column {mark.column + 1})"


def explain(error: yaml.YAMLError, text: str) -> str:
    """The library's words, the line they are about, and what to do about the commonest slip."""
    words = " ".join(str(error).replace('in "<unicode string>", ', "").split())[:500]
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return words
    line = lines[mark.line]
    words += f": {line[:60]!r}"
    if "${" in line:
        words += "; inside of braces or brackets ${NAME} needs quotes: '${NAME}'"
    if "\t" in line:
        words += "; YAML takes no tab ('\\t') here, use spaces"
    return words
