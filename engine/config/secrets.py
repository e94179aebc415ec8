"""Values that come from the environment, and secrets: used in memory, written nowhere.

`${NAME}` in a config's text stands for the environment variable NAME. It becomes a `Reference`:
text with the variable's value, whose written form is `${NAME}`. `$${` stands for `${`.

What is written (config.yaml, environment.json, error.log, trackers) goes through `hide` or
`redact`: references are written as such; a value whose key looks like that of a secret, and
anything that has the shape of a well-known token, becomes <redacted>.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from tandem.engine.config.yaml_reader import dotted
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest

REDACTED = "<redacted>"
SHORTEST = 6  # characters of a secret that is looked for in running text
REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

WORDS = (
    r"api[-_]?keys?|access[-_]?keys?|private[-_]?keys?|secret[-_]?keys?|password|passwd|passphrase"
    r"|secrets?|credentials?|authorization|bearer"
    r"|(?:auth|access|api|hf|bot|refresh|secret)[-_]?token"
)
SECRET_KEY = re.compile(rf"(?:.*[-_.])?(?:{WORDS}|token|auth)", re.IGNORECASE)
NO_SECRET = re.compile(
    r"(?:.*[-_.])?(?:eos|bos|pad|unk|sep|cls|mask|stop|start|end|special|image)"
    r"[-_]token",
    re.IGNORECASE,
)
ASSIGNED = re.compile(
    rf"""((?:(?:{WORDS})["']?\s*[:=]|\btoken=)\s*["']?(?:bearer\s+)?)"""
    r"""([^\s"',}\])]+)""",
    re.IGNORECASE,
)
SHAPES = re.compile(
    r"\bsk-[A-Za-z0-9_-]{6,}"  # OpenAI, Anthropic and others
    r"|\bhf_[A-Za-z0-9]{8,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"  # GitHub
    r"|\bglpat-[A-Za-z0-9_-]{16,}"  # GitLab
    r"|\bxox[abeprs]-[A-Za-z0-9-]{8,}"  # Slack
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # Amazon
    r"|\bAIza[A-Za-z0-9_-]{30,}"  # Google
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # JSON web tokens
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user:password@ in an address
)

_known: dict[str, str] = {}  # secret value: what is written in its place


class Reference(str):
    """Text with the value of environment variables. `reference` is the text that names them."""

    reference: str

    def __new__(cls, value: str, reference: str):
        self = super().__new__(cls, value)
        self.reference = reference
        return self

    def __repr__(self) -> str:
        return repr(self.reference)

    def __reduce__(self):
        return Reference, (str.__str__(self), self.reference)


def resolve(value: Any, path: tuple = ()) -> Any:
    """`value` with every `${NAME}` in its texts read from the environment; `path` are the keys to
    it.

    Raises ConfigError that names the key for a variable that is not set, and for a value that was
    redacted when the config was written.
    """
    if isinstance(value, dict):
        return {key: resolve(entry, (*path, key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [resolve(entry, (*path, i)) for i, entry in enumerate(value)]
    if not isinstance(value, str) or "${" not in value or is_template(path):
        return value
    text = REFERENCE.sub(lambda match: variable(match, value, dotted(path)), value)
    return Reference(text, value)


def is_template(path: tuple) -> bool:
    """`options.response` of generated data: {NAME} stands for a column there, also behind a $."""
    return path[:1] == ("data",) and path[2:] == ("options", "response")


def variable(match: re.Match, text: str, key: str) -> str:
    """What stands for one `${NAME}` or `$${`."""
    if match[0] == "$${":
        return "${"
    name = match[1]
    escape = f"for these very characters write ${match[0]}"
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{key}: found {brief(text)}, expected ${{NAME}} with the name of an "
            f"environment variable; {escape}"
        )
    if name not in os.environ:
        raise ConfigError(
            f"{key}: found {brief(text)}, but the environment variable {name} is not "
            f"set{closest(name, os.environ)}; set it, or {escape}"
        )
    remember(os.environ[name], match[0])
    return os.environ[name]


def remember(value: str, written: str) -> None:
    """From now on `redact` writes `written` where it meets `value`. Paths and numbers stay."""
    if len(value) >= SHORTEST and not value.startswith("/") and not value.isdigit():
        _known[value] = written


def is_secret_key(key: Any) -> bool:
    """Whether a key names a secret: api_key, token, password, ...; not max_tokens or eos_token."""
    text = str(key)
    return bool(SECRET_KEY.fullmatch(text)) and not NO_SECRET.fullmatch(text)


def hide(value: Any, secret: bool = False) -> Any:
    """`value` as it may be written: plain, references as such, secrets <redacted>."""
    if isinstance(value, Mapping):
        return {key: hide(entry, secret or is_secret_key(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide(entry, secret) for entry in value]
    if isinstance(value, Reference):
        return value.reference
    if secret and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        if str(value) not in ("", REDACTED):
            remember(str(value), REDACTED)
        return REDACTED if str(value) else value
    if isinstance(value, str):
        return SHAPES.sub(REDACTED, value)
    return value


def redact(text: str) -> str:
    """Running text (an error, a command line) without the secrets that can be told."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, _known[value])
    text = ASSIGNED.sub(hide_assigned, text)
    return SHAPES.sub(REDACTED, text)


def hide_assigned(match: re.Match) -> str:
    """KEY=VALUE with a key that names a secret; a reference stays as it is."""
    if match[2].startswith(("${", REDACTED)):
        return match[0]
    return match[1] + REDACTED


def find_redacted(value: Any, path: tuple = ()) -> tuple | None:
    """Where a value stands that was redacted when it was written, or None."""
    if isinstance(value, str):
        return path if REDACTED in value else None
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = enumerate(value)
    for key, entry in entries:
        found = find_redacted(entry, (*path, key))
        if found is not None:
            return found
    return None
