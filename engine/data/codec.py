"""For methods that write prompts of their own, such as a hint or a privileged view."""

from __future__ import annotations

from typing import Any

import numpy as np

from tandem.engine.core.types import Finish
from tandem.engine.data.decoding import response_text
from tandem.engine.data.encoding import Encoder
from tandem.engine.data.lengths import TooLong


class PromptCodec:
    """From words to ids and back, as the run's own prompts are read and its responses shown."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def encode(self, content: Any) -> np.ndarray | None:
        """int32 [T]: ids of a prompt, plain text or chat messages with the system prompt among
        them, as Prompt.content has it. None if it is longer than data.max_prompt_tokens or the
        model's context: what a method writes is not cut, whatever data.overlong says.

        Control tokens that are spelled out are escaped or refused, as data.control_tokens says. A
        row's tools are not in its content, and so not in these ids.

        Raises ConfigError if the chat template refuses it, or for such a control token.
        """
        encoder = self.encoder
        label = "a prompt that the method wrote"
        chat = not isinstance(content, str)
        if chat:
            messages = [encoder.reader.checked_message(one, label) for one in content]
            text = encoder.render(messages, None, True, label)
        else:
            text = encoder.reader.checked(content, "the text", label)
        try:
            tokens = encoder.prompt_tokens(text, chat, label)
        except TooLong:
            return None
        return tokens if len(tokens) <= encoder.data.max_prompt_tokens else None

    def decode(self, response: np.ndarray) -> str:
        """The text of response ids, int [T], without the token that ends them."""
        return response_text(self.encoder.tokenizer, response, Finish.STOP)
