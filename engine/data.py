"""Prompts to roll out and expert demonstrations, tokenised, in an order that depends on (seed, epoch) alone.

Invariants:
  * The prompt part of a demonstration is, token for token, what a rollout of the same row would be given.
  * A demonstration ends with the token at which the model itself would stop, and holds no such token before.
  * Nothing is cut, skipped or repaired: a row that cannot be used is a ConfigError that names it.
  * Two sources with equal arguments and equal `state_dict` go on identically.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.engine.config import ConfigError, DataConfig, DatasetConfig, ModelConfig, closest
from tandem.engine.rows import open_rows
from tandem.engine.tasks import UNLIMITED, is_generated
from tandem.engine.types import Finish, Prompt, Source, Trajectory

CHECKED_ROWS = 5_000        # rows that are tokenised and checked before the run; later ones are checked when their turn comes
CHECKED_UNLIMITED = 32      # the same for generated rows without end


class PromptSource:
    """An endless sequence of prompts. `len` is the rows of one epoch.

    With `dataset.response` set, every prompt carries the row's demonstration (the response's token ids).
    Raises ConfigError on construction for anything wrong with the dataset or with its first CHECKED_ROWS rows.
    """

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig, seed: int):
        self.dataset, self.encoder = dataset, Encoder(dataset, data, tokenizer, model)
        self.rows, self.cursor = start(self, dataset, data, seed)

    def __len__(self) -> int:
        return self.cursor.length

    def __getitem__(self, number: int) -> Prompt:
        row, label = self.rows[number], self.rows.label(number)
        prompt = self.encoder.prompt(row, label)
        demonstration = self.encoder.response(row, label, prompt) if self.dataset.response else None
        return Prompt(row_id(row, label), prompt.tokens, prompt.content, row, demonstration)

    def take(self, n: int) -> list[Prompt]:
        return [self[self.cursor.next()] for _ in range(n)]

    def state_dict(self) -> dict[str, int]:
        return self.cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.cursor.load_state_dict(state, self.dataset.path)


class ExpertSource:
    """An endless sequence of demonstrations: trajectories whose response tokens are EXPERT. `len` is the rows of one epoch.

    Raises ConfigError like PromptSource.
    """

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig, seed: int):
        self.dataset, self.encoder = dataset, Encoder(dataset, data, tokenizer, model)
        self.rows, self.cursor = start(self, dataset, data, seed)

    def __len__(self) -> int:
        return self.cursor.length

    def __getitem__(self, number: int) -> Trajectory:
        row, label = self.rows[number], self.rows.label(number)
        prompt = self.encoder.prompt(row, label)
        response = self.encoder.response(row, label, prompt)
        source = np.repeat(np.array([Source.PROMPT, Source.EXPERT], np.int8), [len(prompt.tokens), len(response)])
        return Trajectory(row_id(row, label), np.concatenate([prompt.tokens, response]), source, Finish.STOP)

    def take(self, n: int) -> list[Trajectory]:
        return [self[self.cursor.next()] for _ in range(n)]

    def state_dict(self) -> dict[str, int]:
        return self.cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.cursor.load_state_dict(state, self.dataset.path)


def start(source: PromptSource | ExpertSource, dataset: DatasetConfig, data: DataConfig, seed: int):
    """Open and check the rows of a source: (rows, cursor). All rows of a file are read; the first CHECKED_ROWS are tokenised as well."""
    held_out = dataset is data.evaluation
    if is_generated(dataset.path):
        if held_out != (dataset.split == "test"):
            raise ConfigError(f"{dataset.path} with split {dataset.split!r} for {'evaluation' if held_out else 'training'}: "
                              "generated data needs split: test in data.evaluation and split: train elsewhere, so that no evaluation problem is trained on")
    source.rows = rows = open_rows(dataset)
    length = len(rows) if dataset.limit is None else min(len(rows), dataset.limit)
    if length < 1:
        raise ConfigError(f"{dataset.path}: limit is {dataset.limit}, which leaves no rows")
    if length == UNLIMITED and (held_out or isinstance(source, ExpertSource)):
        raise ConfigError(f"{dataset.path}: options.size is not set; demonstrations and evaluation need a fixed number of problems")
    for number in range(min(length, CHECKED_UNLIMITED if length == UNLIMITED else CHECKED_ROWS)):
        source[number]
    return rows, Cursor(length, seed, data.shuffle)


class Cursor:
    """Row numbers without end: every epoch is a permutation of its own, or the plain order."""

    def __init__(self, length: int, seed: int, shuffle: bool):
        self.length, self.seed, self.shuffle = length, seed % 2**63, shuffle and length != UNLIMITED    # rows without end come at random anyway
        self.epoch = self.index = 0
        self.order: tuple[int, np.ndarray] | None = None    # (epoch, permutation)

    def next(self) -> int:
        if self.index == self.length:
            self.epoch, self.index = self.epoch + 1, 0
        self.index += 1
        if not self.shuffle:
            return self.index - 1
        if self.order is None or self.order[0] != self.epoch:
            self.order = self.epoch, np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return int(self.order[1][self.index - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "rows": self.length}

    def load_state_dict(self, state: Mapping[str, int], name: str) -> None:
        if state["rows"] != self.length:
            raise ConfigError(f"dataset {name!r} has {self.length} rows, but {state['rows']} when the checkpoint was written; resume with the same data")
        self.epoch, self.index = state["epoch"], state["index"]


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    content: Any            # str, or the chat messages with the system prompt
    text: str               # what was tokenised
    tokens: np.ndarray      # int32 [T]


class Encoder:
    """From dataset rows to token ids: chat template, system prompt, end-of-turn token, length limits. Every error names the row."""

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig):
        self.dataset, self.data, self.tokenizer, self.system = dataset, data, tokenizer, model.system_prompt
        self.response_column = dataset.response or "response"   # generated rows have a column of this name
        self.stop = stop_tokens(tokenizer, model)

    def prompt(self, row: Mapping[str, Any], label: str) -> EncodedPrompt:
        value = column(row, self.dataset.prompt, "prompt", label)
        chat = isinstance(value, list) if self.data.chat is None else self.data.chat
        if chat:
            content = self.messages(value, label)
            text = self.render(content, label, generation=True)
        else:
            if not isinstance(value, str):
                raise ConfigError(f"{label}: column {self.dataset.prompt!r} holds {type(value).__name__}, but data.chat is false, which wants text")
            if self.system is not None:
                raise ConfigError(f"{label}: model.system_prompt is set, but the prompt is plain text; set data.chat=true, or put the words into the prompt")
            content = text = value
        if not (value if isinstance(value, str) else content[-1]["content"]).strip():
            raise ConfigError(f"{label}: the prompt (column {self.dataset.prompt!r}) is empty")
        tokens = self.encode(text, chat)
        if len(tokens) > self.data.max_prompt_tokens:
            raise ConfigError(f"{label}: the prompt has {len(tokens)} tokens, more than data.max_prompt_tokens={self.data.max_prompt_tokens}; "
                              "raise the limit, or shorten or drop the row")
        return EncodedPrompt(content, text, tokens)

    def response(self, row: Mapping[str, Any], label: str, prompt: EncodedPrompt) -> np.ndarray:
        """int32 [T_response], the last one being a stop token."""
        name = self.response_column
        message = column(row, name, "response", label)
        if isinstance(message, str):
            message = {"role": "assistant", "content": message}
        elif isinstance(message, list) and len(message) == 1:
            message = message[0]
        if not is_message(message) or message["role"] != "assistant":
            raise ConfigError(f"{label}: column {name!r} must hold text or a list of one assistant message, found {short(row[name])}")
        if not message["content"].strip():
            raise ConfigError(f"{label}: the response (column {name!r}) is empty")
        chat = isinstance(prompt.content, list)
        full = self.render([*prompt.content, message], label, generation=False) if chat else prompt.text + message["content"]
        if not full.startswith(prompt.text):
            raise ConfigError(f"{label}: the chat template writes the turns before the response differently once the response is there, so that training would not see "
                              f"what a rollout sees: {short(prompt.text[-80:])} became {short(full[:len(prompt.text)][-80:])}; use a template that only appends")
        tokens = self.with_stop(self.continuation(prompt, full, chat, label), label)
        if len(tokens) > self.data.max_expert_tokens:
            raise ConfigError(f"{label}: the demonstration has {len(tokens)} tokens, more than data.max_expert_tokens={self.data.max_expert_tokens}; "
                              "raise the limit, or shorten or drop the row")
        return tokens

    def continuation(self, prompt: EncodedPrompt, full: str, chat: bool, label: str) -> np.ndarray:
        """Tokens of `full` after those of the prompt. Where a token would span the border, the response is tokenised on its own, as a rollout would write it."""
        joint, n = self.encode(full, chat), len(prompt.tokens)
        if np.array_equal(joint[:n], prompt.tokens):
            return joint[n:]
        apart = self.encode(full[len(prompt.text):], bare=True)
        if self.tokenizer.decode(np.concatenate([prompt.tokens, apart])) != self.tokenizer.decode(joint):
            raise ConfigError(f"{label}: the tokenizer cannot split prompt and response at their border ({short(full[len(prompt.text) - 20:len(prompt.text) + 20])}); "
                              "end the prompt and begin the response so that no token spans both")
        return apart

    def with_stop(self, tokens: np.ndarray, label: str) -> np.ndarray:
        """Cut behind the stop token that the template wrote (only white space may follow it), or append EOS where it wrote none."""
        at = np.flatnonzero(np.isin(tokens, self.stop))
        if len(at) == 0:
            return np.append(tokens, np.int32(self.tokenizer.eos_token_id))
        if self.tokenizer.decode(tokens[at[0] + 1:]).strip():
            raise ConfigError(f"{label}: the response goes on after the token {self.tokenizer.decode(tokens[at[:1]])!r}, at which the model would have stopped; remove it from the text")
        return tokens[:at[0] + 1]

    def messages(self, value, label: str) -> list[dict[str, Any]]:
        """The chat to render: the row's messages, or its text as one user message, after the system prompt."""
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise ConfigError(f"{label}: column {self.dataset.prompt!r} must hold text or a list of messages with role and content, found {short(value)}")
        if messages[-1]["role"] == "assistant":
            raise ConfigError(f"{label}: the last message of the prompt is the assistant's; the answer belongs into a column of its own (data.experts.response)")
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ConfigError(f"{label}: the prompt has a system message of its own, and model.system_prompt is set as well; unset one")
        return [{"role": "system", "content": self.system}, *messages]

    def render(self, messages, label: str, generation: bool) -> str:
        from jinja2 import TemplateError
        if not self.tokenizer.chat_template:
            raise ConfigError(f"{label}: the tokenizer has no chat template; set data.chat=false and use plain text prompts, or model.tokenizer to one that has it")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise ConfigError(f"{label}: the chat template refuses these messages: {error}") from None

    def encode(self, text: str, bare: bool) -> np.ndarray:
        """int32 [T]. bare: without the BOS that the tokenizer puts before plain text; a chat template writes its own."""
        return np.array(self.tokenizer(text, add_special_tokens=not bare).input_ids, np.int32)


def stop_tokens(tokenizer, model: ModelConfig) -> list[int]:
    """Every token at which generation ends: the tokenizer's EOS and those of the model's generation config (an end-of-turn token is often only there)."""
    from transformers import GenerationConfig

    from tandem.engine.model import resolve_model
    try:
        ids = GenerationConfig.from_pretrained(resolve_model(model)).eos_token_id
    except OSError:     # the model has none
        ids = None
    return sorted({tokenizer.eos_token_id, *([ids] if isinstance(ids, int) else ids or [])})


def column(row: Mapping[str, Any], name: str, key: str, label: str) -> Any:
    if name not in row:
        raise ConfigError(f"{label}: there is no column {name!r}{closest(name, row)}; the row has {', '.join(map(str, row)) or 'none'}. Set `{key}:` of the dataset to the right one")
    if row[name] is None:
        raise ConfigError(f"{label}: column {name!r} is null")
    return row[name]


def is_message(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def row_id(row: Mapping[str, Any], label: str) -> str:
    return label if row.get("id") is None else str(row["id"])


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
