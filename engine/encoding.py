"""From dataset rows to token ids: chat template, system prompt, end-of-turn token, length limits.

Invariants:
  * The prompt part of a demonstration is, token for token, what a rollout of the same row is given.
  * A demonstration ends with the token at which the model itself would stop, and holds no such token before.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.engine.config import ConfigError, DataConfig, DatasetConfig, ModelConfig, closest


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    content: Any            # str, or the chat messages with the system prompt
    text: str               # what was tokenised
    tokens: np.ndarray      # int32 [T]


class Encoder:
    """Reads and tokenises the rows of one dataset. Every error is a ConfigError that begins with the row's label."""

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig):
        self.dataset, self.data, self.tokenizer, self.system = dataset, data, tokenizer, model.system_prompt
        self.response_column = dataset.response or "response"   # generated rows have a column of this name
        self.stop = stop_tokens(tokenizer, model)

    def read(self, row: Mapping[str, Any], label: str) -> None:
        """Check the columns without tokenising."""
        self.question(row, label)
        if self.dataset.response:
            self.answer(row, label)

    def question(self, row: Mapping[str, Any], label: str) -> str | list[dict[str, Any]]:
        """The prompt as the row has it: text, or messages of which the last one wants an answer."""
        name = self.dataset.prompt
        value = column(row, name, "prompt", label)
        if not isinstance(value, str) and not (isinstance(value, list) and value and all(map(is_message, value))):
            raise ConfigError(f"{label}: column {name!r} must hold text or a list of messages with role and content, found {short(value)}")
        if not isinstance(value, str) and value[-1]["role"] == "assistant":
            raise ConfigError(f"{label}: the last message of the prompt is the assistant's; the answer belongs into a column of its own (data.experts.response)")
        if not (value if isinstance(value, str) else value[-1]["content"]).strip():
            raise ConfigError(f"{label}: the prompt (column {name!r}) is empty")
        return value

    def answer(self, row: Mapping[str, Any], label: str) -> dict[str, Any]:
        """The response as an assistant message."""
        name = self.response_column
        value = column(row, name, "response", label)
        message = {"role": "assistant", "content": value} if isinstance(value, str) else value[0] if isinstance(value, list) and len(value) == 1 else value
        if not is_message(message) or message["role"] != "assistant":
            raise ConfigError(f"{label}: column {name!r} must hold text or a list of one assistant message, found {short(value)}")
        if not message["content"].strip():
            raise ConfigError(f"{label}: the response (column {name!r}) is empty")
        return message

    def prompt(self, row: Mapping[str, Any], label: str) -> EncodedPrompt:
        value = self.question(row, label)
        chat = isinstance(value, list) if self.data.chat is None else self.data.chat
        if chat:
            content = self.messages(value, label)
            text = self.render(content, label, generation=True)
        else:
            if not isinstance(value, str):
                raise ConfigError(f"{label}: column {self.dataset.prompt!r} holds messages, but data.chat is false, which wants text")
            if self.system is not None:
                raise ConfigError(f"{label}: model.system_prompt is set, but the prompt is plain text; set data.chat=true, or put the words into the prompt")
            content = text = value
        tokens = self.encode(text, chat)
        if len(tokens) > self.data.max_prompt_tokens:
            raise ConfigError(f"{label}: the prompt has {len(tokens)} tokens, more than data.max_prompt_tokens={self.data.max_prompt_tokens}; "
                              "raise the limit, or shorten or drop the row")
        return EncodedPrompt(content, text, tokens)

    def response(self, row: Mapping[str, Any], label: str, prompt: EncodedPrompt) -> np.ndarray:
        """int32 [T_response], the last one being a stop token."""
        message = self.answer(row, label)
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


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
