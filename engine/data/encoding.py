"""From samples to token ids: chat template, end-of-turn token, length limits.

Invariants:
  * The prompt part of a demonstration is, token for token, what a rollout of the same row is given.
  * A demonstration ends with the token at which the model itself would stop, and holds no such
    token before.
  * Whatever a message says is in what is tokenised (unless data.template_changes allows less).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.data.control_tokens import ControlTokens
from tandem.engine.data.lengths import TooLong, most_tokens, refuse_huge
from tandem.engine.data.messages import find_missing, literals, with_markers
from tandem.engine.data.samples import Sample, SampleReader, refuse_surrogates, role_advice
from tandem.engine.data.templates import Template, TemplateFailure
from tandem.engine.data.turns import encode_turns
from tandem.engine.model.context import context_length
from tandem.engine.model.resolve import read_config, resolve_model

SPLIT_BEHIND = ("", "\n", "=", ":", "a")  # texts behind which a response may be tokenised apart
SPARE_TOKENS = 16  # beside the margins of a shape
DROP = "or set data.overlong=drop to leave such rows out"


@dataclass(frozen=True, eq=False)
class Encoded:
    content: Any  # str, or the chat messages with the system prompt
    tokens: np.ndarray  # int32 [T], the prompt
    response: np.ndarray | None  # int32 [T_response], the last one being a stop token
    trained: np.ndarray | None  # bool [T_response]: all of it, or several turns of a chat


class Encoder:
    """Reads and tokenises the rows of one dataset.

    Every error is a ConfigError that begins with the row's label, for a row beyond a limit a
    TooLong.
    """

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig):
        self.data = data
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, data.chat_template_kwargs, data.template_date)
        self.stop = stop_tokens(tokenizer, model)
        source = self.template.source
        self.system = model.system_prompt
        self.control = ControlTokens(tokenizer, self.stop, source)
        self.reader = self.reader_of(dataset)
        self.literals = literals(source)
        self.context = context_length(read_config(model, resolve_model(model)))
        self.prefix = plain_prefix(tokenizer)
        self.margins: dict[tuple, tuple[int, int]] = {}  # of every shape: see `surely_fits`
        self.truncated = 0  # prompts cut so far

    def reader_of(self, dataset: DatasetConfig) -> SampleReader:
        return SampleReader(dataset, self.data, self.system, self.control, self.template.source)

    def read(self, row: Mapping[str, Any], label: str) -> Sample:
        """The row without tokenising it."""
        return self.reader.read(row, label)

    def encode(self, sample: Sample, label: str) -> Encoded:
        shape = self.shape(sample)
        if isinstance(sample.prompt, str):
            chat = False
            text = sample.prompt
        else:
            chat = True
            text = self.render_prompt(sample, label)
            if shape not in self.margins:
                self.check_roles(sample, label)
        tokens = self.prompt_tokens(text, chat, label)
        response = trained = None
        behind = 0
        if sample.turns:
            rest = sample.turn_texts[0]
            if chat:
                rest = self.rendered_response(sample, text, label)
            behind = len(rest) - sum(map(len, sample.turn_texts))
            refuse_huge(
                rest, self.data.max_expert_tokens, self.longest_token, "the response", label
            )
            if len(sample.turns) == 1:
                response = self.with_stop(self.continuation(tokens, text, rest, chat, label), label)
                trained = np.ones(len(response), bool)
            else:
                found = encode_turns(self, sample, text, rest, tokens, label)
                response, trained = found.tokens, found.trained
            self.check_lengths(tokens, response, label)
        if shape not in self.margins:
            before = len(text) - sum(map(len, sample.prompt_texts))
            self.margins[shape] = (before, behind)
        return Encoded(sample.prompt, self.within_limit(tokens), response, trained)

    # -- rows that need not be tokenised

    def shape(self, sample: Sample) -> tuple:
        """What a template may decide by, other than the words: roles, keys, and the marks in
        contents that the template itself speaks of (such as </think>).
        """
        if isinstance(sample.prompt, str):
            return ("plain",)
        parts = []
        for message in sample.messages:
            content = message["content"]
            marks = frozenset(self.literals.findall(content)) if self.literals else frozenset()
            parts.append((message["role"], frozenset(message), marks, not content.strip()))
        return tuple(parts)

    def knows(self, sample: Sample) -> bool:
        """Whether a row of the same shape was encoded."""
        return self.shape(sample) in self.margins and sample.tools is None

    def surely_fits(self, sample: Sample, count: Callable[[str], int] = most_tokens) -> bool:
        """Whether a row of the same shape was encoded, and this one is within every limit by far.

        A shape's margins are the characters that its template adds to prompt and response.
        count: gives the tokens of a text, or a bound on them.
        """
        if not self.knows(sample):
            return False
        margins = self.margins[self.shape(sample)]
        before, behind = (abs(margin) + len(self.prefix) + SPARE_TOKENS for margin in margins)
        prompt = before + sum(count(text) for text in sample.prompt_texts)
        response = 0
        if sample.turns:
            response = behind + sum(count(text) for text in sample.turn_texts)
        if prompt > self.data.max_prompt_tokens or response > self.data.max_expert_tokens:
            return False
        return self.context is None or prompt + response < self.context

    def fitting(self, samples: Sequence[Sample]) -> list[bool]:
        """`surely_fits` of many rows, by the tokens of their texts, all counted at once."""
        texts: list[str] = []
        for sample in samples:
            texts.extend(sample.texts)
        texts = list(dict.fromkeys(texts))
        try:
            found = self.tokenizer(texts, add_special_tokens=False).input_ids
        except Exception:  # of one of them; `encode` will say of which
            return [False] * len(samples)
        counts = {text: len(ids) for text, ids in zip(texts, found, strict=True)}
        return [self.surely_fits(sample, counts.__getitem__) for sample in samples]

    # -- text

    def render(
        self, messages: Sequence[dict], tools: list | None, generation: bool, label: str
    ) -> str:
        if not self.template.source:
            raise ConfigError(
                f"{label}: the tokenizer has no chat template; set data.chat=false and "
                "use plain text prompts, or model.tokenizer to one that has it"
            )
        try:
            text = self.template.render(messages, tools, generation)
        except TemplateFailure as error:
            raise ConfigError(
                f"{label}: the chat template refuses these messages: {error} (it comes "
                "with the tokenizer: model.tokenizer or model.path; "
                "data.chat_template_kwargs gives it variables)"
            ) from None
        refuse_surrogates(text, "what the chat template wrote", label)
        return text

    def render_prompt(self, sample: Sample, label: str) -> str:
        text = self.render(sample.chat, sample.tools, True, label)
        self.check_content(text, sample.chat, label)
        self.check_tools(text, sample.tools, label)
        return text

    def rendered_response(self, sample: Sample, text: str, label: str) -> str:
        """The text behind the prompt's `text`: the response and what ends the turn."""
        full = self.render(sample.messages, sample.tools, False, label)
        if not full.startswith(text):
            became = full[: len(text)]
            raise ConfigError(
                f"{label}: the chat template writes the turns before the response differently "
                "once the response is there, so that training would not see what a rollout sees: "
                f"{brief(text[-80:])} became {brief(became[-80:])}; use a template that only "
                "appends"
            )
        self.check_content(full, sample.messages, label)
        return full[len(text) :]

    def check_content(self, text: str, messages: Sequence[dict], label: str) -> None:
        """Raise ConfigError if a message's words are not in the rendered text."""
        if self.data.template_changes == "allow":
            return
        found = find_missing(text, list(messages))
        if found is not None:
            self.refuse_change(text, *found, label)

    def refuse_change(self, text: str, message: dict, name: str, wanted: str, label: str) -> None:
        role = message["role"]
        change = "drops or changes"
        if "".join(wanted.split()) in "".join(text.split()):
            change = "changes the white space of"
        raise ConfigError(
            f"{label}: the chat template {change} the {name} of role {role!r}"
            f"{role_advice(role)}: {brief(wanted)} is not in what it wrote, "
            f"{brief(text[-160:])}; change the row or the template, or set "
            "data.template_changes=allow to train on what it writes"
        )

    def check_roles(self, sample: Sample, label: str) -> None:
        """Raise ConfigError if the template leaves out messages of some role. Contents that occur
        nowhere else show it even where a real content is found in the template's own words."""
        if self.data.template_changes == "allow" or not self.template.source:
            return
        marked = with_markers(sample.messages)
        try:
            text = self.template.render(marked, sample.tools, not sample.turns)
        except TemplateFailure:  # it wants a content of some form
            return
        missing = find_missing(text, marked)
        if missing is not None and missing[1] == "content":
            message = sample.messages[marked.index(missing[0])]
            self.refuse_change(text, message, "content", message["content"], label)

    def check_tools(self, text: str, tools: list | None, label: str) -> None:
        for tool in tools or []:
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in text and self.data.template_changes == "error":
                raise ConfigError(
                    f"{label}: the chat template does not write the tool {name!r}: it may "
                    "know no tools; use another template, leave `tools:` of the dataset "
                    "out, or set data.template_changes=allow"
                )

    # -- tokens

    def prompt_tokens(self, text: str, chat: bool, label: str) -> np.ndarray:
        """All tokens of the prompt, int32 [T].

        Raises TooLong unless too long a one is to be cut.
        """
        limit = self.data.max_prompt_tokens
        cut = self.data.overlong == "truncate_left"
        if not cut:
            refuse_huge(text, limit, self.longest_token, "the prompt", label)
        tokens = self.tokens(text, chat, label)
        if len(tokens) > limit and not cut:
            raise TooLong(
                f"{label}: the prompt has {len(tokens)} tokens, more than "
                f"data.max_prompt_tokens={limit}; raise the limit, shorten the row, set "
                "data.overlong=truncate_left to use the end of the prompt, " + DROP
            )
        kept = min(len(tokens), limit)
        if self.context is not None and kept >= self.context:
            raise TooLong(
                f"{label}: the prompt has {kept} tokens, and the model's context is "
                f"{self.context}: there is no room for a response; shorten the row, {DROP}"
            )
        return tokens

    def within_limit(self, tokens: np.ndarray) -> np.ndarray:
        """The prompt as it is used: too long a one without its beginning, but with its BOS."""
        limit = self.data.max_prompt_tokens
        if len(tokens) <= limit:
            return tokens
        self.truncated += 1
        head = tokens[: len(self.prefix)]
        if len(head) >= limit or head.tolist() != self.prefix:
            return tokens[-limit:]
        return np.concatenate([head, tokens[len(head) - limit :]])

    def check_lengths(self, prompt: np.ndarray, response: np.ndarray, label: str) -> None:
        limit = self.data.max_expert_tokens
        if len(response) > limit:
            raise TooLong(
                f"{label}: the demonstration has {len(response)} tokens, more than "
                f"data.max_expert_tokens={limit}; raise the limit, shorten the row, {DROP} "
                "(a response is never cut)"
            )
        total = min(len(prompt), self.data.max_prompt_tokens) + len(response)
        if self.context is not None and total > self.context:
            raise TooLong(
                f"{label}: prompt and response have {total} tokens together, more than the "
                f"model's context of {self.context}; shorten the row, {DROP}"
            )

    def continuation(
        self, prompt: np.ndarray, text: str, rest: str, chat: bool, label: str
    ) -> np.ndarray:
        """Tokens of `rest` after those of the prompt.

        Where a token would span the border, the rest is tokenised on its own, as a rollout would
        write it.
        """
        joint = self.tokens(text + rest, chat, label)
        if np.array_equal(joint[: len(prompt)], prompt):
            return joint[len(prompt) :]
        wanted = self.decode(joint)
        for lead in SPLIT_BEHIND:  # tokenizers that put a space before a text need one
            head = self.tokens(lead, True, label)
            apart = self.tokens(lead + rest, True, label)
            if np.array_equal(apart[: len(head)], head):
                apart = apart[len(head) :]
                if self.decode(np.concatenate([prompt, apart])) == wanted:
                    return apart
        raise ConfigError(
            f"{label}: the tokenizer cannot split prompt and response at their border "
            f"({brief(text[-20:] + rest[:20])}); end the prompt and begin the response so "
            "that no token spans both"
        )

    def with_stop(self, tokens: np.ndarray, label: str) -> np.ndarray:
        """Cut behind the first stop token, or append EOS where the template wrote none.

        Only white space and more stop tokens may follow: some templates close the turn and then the
        conversation.
        """
        at = np.flatnonzero(np.isin(tokens, self.stop))
        if len(at) == 0:
            return np.append(tokens, np.int32(self.tokenizer.eos_token_id))
        behind = tokens[at[0] + 1 :]
        if self.decode(behind[~np.isin(behind, self.stop)]).strip():
            raise ConfigError(
                f"{label}: the response goes on after the token "
                f"{self.decode(tokens[at[:1]])!r}, at which the model would have stopped; "
                "remove it from the text"
            )
        return tokens[: at[0] + 1]

    def tokens(self, text: str, chat: bool, label: str) -> np.ndarray:
        """int32 [T]. Plain text gets what the tokenizer puts before it (BOS), unless it begins with
        that, and nothing of what the tokenizer puts behind it (EOS): the text is to go on. A chat
        template writes its own."""
        try:
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        except Exception as error:
            raise ConfigError(
                f"{label}: the tokenizer fails on this text with {type(error).__name__}: {error}"
            ) from None
        if not chat and ids[: len(self.prefix)] != self.prefix:
            ids = self.prefix + ids
        return np.array(ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))


def plain_prefix(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a plain text."""
    for text in ("0", "a", "="):
        bare = list(tokenizer(text, add_special_tokens=False).input_ids)
        whole = list(tokenizer(text).input_ids)
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return whole[:at]
    return []


def stop_tokens(tokenizer, model: ModelConfig) -> list[int]:
    """Every token at which generation ends: the tokenizer's EOS and those of the model's generation
    config (an end-of-turn token is often only there)."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(resolve_model(model)).eos_token_id
    except OSError:  # the model has none
        ids = None
    if isinstance(ids, int):
        ids = [ids]
    return sorted({tokenizer.eos_token_id, *(ids or [])})
