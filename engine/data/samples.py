"""From a dataset row to a sample: prompt and response as text or messages, checked, not rendered
yet.

Every error is a ConfigError that begins with the row's label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.engine.config.schema import DataConfig, DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest
from tandem.engine.data.control_tokens import ControlTokens
from tandem.engine.data.messages import ALIASES, media_part, read_message, read_messages, read_tools

MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Sample:
    prompt: str | list[dict[str, Any]]  # plain text, or a chat that wants an answer
    # the messages behind it, if the dataset has responses: one, or all from the first trained one
    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None  # for the chat template
    trained: tuple[int, ...] = (0,)  # numbers of the turns that are trained

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages of the prompt; none where it is plain text."""
        return [] if isinstance(self.prompt, str) else self.prompt

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages of a chat."""
        return [*self.chat, *self.turns]

    @property
    def prompt_texts(self) -> list[str]:
        """The prompt's text, or the contents of its messages."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [message["content"] for message in self.chat]

    @property
    def texts(self) -> list[str]:
        return [*self.prompt_texts, *self.turn_texts]

    @property
    def answered_before(self) -> bool:
        """Whether the prompt holds a turn of the assistant's."""
        return any(message["role"] == "assistant" for message in self.chat)

    @property
    def turn_texts(self) -> list[str]:
        return [message["content"] for message in self.turns]


class SampleReader:
    """Reads the rows of one dataset. system: the system prompt that comes before every chat."""

    def __init__(
        self,
        dataset: DatasetConfig,
        data: DataConfig,
        system: str | None,
        control: ControlTokens,
        template: str,
    ):
        self.dataset = dataset
        self.data = data
        self.system = system
        self.control = control
        self.template = template

    def read(self, row: Mapping[str, Any], label: str) -> Sample:
        self.refuse_media(row, label)
        found = self.prompt_and_turns(row, label)
        prompt: Any = found.prompt
        plain = isinstance(prompt, str)
        chat = not plain if self.data.chat is None else self.data.chat
        if not chat and not plain:
            raise ConfigError(
                f"{label}: column {self.dataset.prompt!r} holds messages, but "
                "data.chat is false, which wants text"
            )
        if not chat and self.system is not None:
            raise ConfigError(
                f"{label}: model.system_prompt is set, but the prompt is plain text; "
                "set data.chat=true, or put the words into the prompt"
            )
        if chat:
            prompt = self.with_system(prompt, label)
            prompt = [self.checked_message(message, label) for message in prompt]
        else:
            prompt = self.checked(prompt, f"the prompt (column {self.dataset.prompt!r})", label)
        turns = []
        for number, turn in enumerate(found.turns):
            check = self.checked_response if number in found.trained else self.checked_message
            turns.append(check(turn, label))
        return Sample(prompt, turns, self.tools(row, chat, label), found.trained)

    # -- columns

    def prompt_and_turns(self, row: Mapping[str, Any], label: str) -> Sample:
        """The columns as they are, without tools."""
        name = self.dataset.prompt
        value = column(row, name, "prompt", label)
        if self.dataset.response == name:
            messages = self.chat_with_answer(value, label)
            numbers = trained_turns(messages, self.dataset.train_on, label)
            first, last = numbers[0], numbers[-1]
            for number in numbers:
                self.refuse_empty(messages[number], label)
            trained = tuple(number - first for number in numbers)
            return Sample(messages[:first], messages[first : last + 1], None, trained)
        prompt = self.read_prompt(value, label)
        if not self.dataset.response:
            return Sample(prompt, [], None)
        return Sample(prompt, [self.read_response(row, self.dataset.response, label)], None)

    def read_prompt(self, value: Any, label: str) -> str | list[dict[str, Any]]:
        name = self.dataset.prompt
        if isinstance(value, str):
            last = value
        else:
            value = self.messages(value, name, label)
            last = value[-1]["content"]
            if value[-1]["role"] == "assistant":
                raise ConfigError(
                    f"{label}: the last message of the prompt is the assistant's; if it is "
                    f"the response, set `response: {name}` of the dataset as well, and the "
                    "column is split there, else remove it"
                )
        if not last.strip():
            raise ConfigError(f"{label}: the prompt (column {name!r}) is empty")
        return value

    def read_response(self, row: Mapping[str, Any], name: str, label: str) -> dict[str, Any]:
        """The response as an assistant's message."""
        value = column(row, name, "response", label)
        found = value
        if isinstance(value, str):
            value = {"role": "assistant", "content": value}
        elif isinstance(value, list) and len(value) == 1:
            value = value[0]
        try:
            message = read_message(value, self.template)
        except ValueError:
            message = None
        if message is None or message["role"] != "assistant":
            raise ConfigError(
                f"{label}: column {name!r} must hold text or a list of one assistant "
                f"message, found {brief(found)}; if it is a chat that ends with the response, set "
                f"`prompt: {name}` of the dataset as well"
            )
        self.refuse_empty(message, label)
        return message

    def chat_with_answer(self, value: Any, label: str) -> list[dict]:
        """One column for both: a chat whose last turn is the assistant's."""
        name = self.dataset.prompt
        messages = self.messages(value, name, label)
        if messages[-1]["role"] != "assistant":
            raise ConfigError(
                f"{label}: column {name!r} is prompt and response of the dataset, so its "
                f"last message must be the assistant's, found the role "
                f"{messages[-1]['role']!r}"
            )
        return messages

    def messages(self, value: Any, name: str, label: str) -> list[dict[str, Any]]:
        try:
            return read_messages(value, self.template)
        except ValueError as error:
            raise ConfigError(f"{label}: column {name!r}: {error}") from None

    def refuse_empty(self, message: dict[str, Any], label: str) -> None:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise ConfigError(f"{label}: the response (column {self.dataset.response!r}) is empty")

    def tools(self, row: Mapping[str, Any], chat: bool, label: str) -> list[dict] | None:
        name = self.dataset.tools
        if name is None:
            return None
        if name not in row:
            column(row, name, "tools", label)  # raises
        if not chat:
            raise ConfigError(
                f"{label}: `tools: {name}` is set, but the prompt is plain text; tools "
                "reach a model by its chat template: set data.chat=true, or give messages"
            )
        try:
            return read_tools(row[name])
        except ValueError as error:
            raise ConfigError(f"{label}: column {name!r}: {error}") from None

    def with_system(self, prompt: str | list[dict], label: str) -> list[dict[str, Any]]:
        """The chat: the row's messages, or its text as the user's, after the system prompt."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ConfigError(
                f"{label}: the prompt has a system message of its own, and "
                "model.system_prompt is set as well; unset one"
            )
        return [{"role": "system", "content": self.system}, *messages]

    # -- texts

    def checked_message(self, message: dict[str, Any], label: str) -> dict[str, Any]:
        role = message["role"]
        content = self.checked(message["content"], f"the content of role {role!r}", label)
        return {**message, "content": content}

    def checked_response(self, message: dict[str, Any], label: str) -> dict[str, Any]:
        """It may end with a stop token, as it would have been sampled."""
        text, end = self.control.split_end(message["content"])
        where = f"the response (column {self.dataset.response!r})"
        return {**message, "content": self.checked(text, where, label) + end}

    def checked(self, text: str, where: str, label: str) -> str:
        """`text`, escaped if the config wants that. Raises ConfigError for what cannot be tokenised
        as text."""
        if not text.isascii():
            refuse_surrogates(text, where, label)
        if self.data.control_tokens == "allow":
            return text
        found = self.control.find(text)
        if found is None:
            return text
        if self.data.control_tokens == "escape":
            escaped = self.control.escape(text)
            if self.control.find(escaped) is None:
                return escaped
        raise ConfigError(
            f"{label}: {where} spells {found!r}, which the tokenizer reads as a control token: "
            "the turn goes on or ends there; remove it from the text, or set "
            "data.control_tokens=escape to put a space into it, or =allow if the text was rendered "
            "by a chat template already"
        )

    def refuse_media(self, row: Mapping[str, Any], label: str) -> None:
        if self.data.media == "ignore":
            return
        value = row.get(self.dataset.prompt)
        for name in MEDIA_COLUMNS:
            if name != self.dataset.prompt and row.get(name):
                raise ConfigError(f"{label}: the row has a column {name!r}, {MEDIA_ADVICE}")
        kind = media_part(value)
        if kind is not None:
            raise ConfigError(
                f"{label}: column {self.dataset.prompt!r} has a part of type {kind!r}, "
                "and only text can be given to the model; remove such rows"
            )
        texts = [value] if isinstance(value, str) else contents(value)
        if any(PLACEHOLDER in text for text in texts):
            raise ConfigError(
                f"{label}: the prompt holds the placeholder {PLACEHOLDER!r}, {MEDIA_ADVICE}"
            )


def trained_turns(messages: list[dict[str, Any]], train_on: str, label: str) -> list[int]:
    """The numbers of the assistant's turns that are trained: the last, all but tool calls, or all.

    Raises ConfigError if there are none, or if no message comes before the first.
    """
    last = len(messages) - 1
    if train_on == "last":
        turns = [last]
    else:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "all":
            turns = [i for i in turns if not messages[i].get("tool_calls")]
    if not turns:
        raise ConfigError(
            f"{label}: every turn of the assistant is a tool call, so nothing would be trained; "
            "set `train_on: all_and_calls` of the dataset, or remove the row"
        )
    if turns[0] == 0:
        raise ConfigError(f"{label}: no message comes before the assistant's: there is no prompt")
    return turns


MEDIA_ADVICE = (
    "but the model would be trained on the text alone: images, video and audio are not "
    "supported; remove such rows, or set data.media=ignore to use the text alone"
)


def contents(value: Any) -> list[str]:
    """The texts in the messages of a column, whatever form they have."""
    found = []
    for message in value if isinstance(value, list) else []:
        if isinstance(message, dict):
            text = message.get("content", message.get("value"))
            found.extend([text] if isinstance(text, str) else [])
    return found


def refuse_surrogates(text: str, where: str, label: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{label}: {where} holds a lone surrogate, U+{ord(text[error.start]):04X} at "
            f"character {error.start}: half of a character, which has no form in UTF-8, "
            "often an emoji that was cut; repair or remove the row"
        ) from None


def column(row: Mapping[str, Any], name: str, key: str, label: str) -> Any:
    if name not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise ConfigError(
            f"{label}: there is no column {name!r}{closest(name, row)}; the row has "
            f"{columns}. Set `{key}:` of the dataset to the right one"
        )
    if row[name] is None:
        raise ConfigError(f"{label}: column {name!r} is null")
    return row[name]


def role_advice(role: str) -> str:
    """What may be meant by a role that a template does not write."""
    known = ("system", "user", "assistant", "tool")
    if role in known:
        return ""
    return closest(ALIASES.get(role, role), known)
