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
        them, as Prompt.content has it. None if it is longer than the run allows.

        Raises ConfigError if the chat template refuses it.
        """
        label = "a prompt that the method wrote"
        chat = not isinstance(content, str)
        text = content
        if chat:
            text = self.encoder.render(content, None, True, label)
        try:
            tokens = self.encoder.prompt_tokens(text, chat, label)
        except TooLong:
            return None
        return self.encoder.within_limit(tokens)

    def decode(self, response: np.ndarray) -> str:
        """The text of response ids, int [T], without the token that ends them."""
        return response_text(self.encoder.tokenizer, response, Finish.STOP)
