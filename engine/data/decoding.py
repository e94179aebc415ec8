"""From sampled token ids to the text that rewards and rollouts.jsonl see: what was sampled, without
the token that ended it.

Special tokens elsewhere stay: some models write their tags (<think>, <answer>) with them, and one
that was sampled in the middle of a response is part of it. Spaces are not cleaned up. A response is
decoded on its own, without its prompt, so a SentencePiece tokenizer does not show the space before
its first word. Bytes that are no whole character, as at a cut, are U+FFFD.
"""

from __future__ import annotations

import numpy as np

from tandem.engine.core.types import Finish


def response_text(tokenizer, tokens: np.ndarray, finish: Finish = Finish.STOP) -> str:
    """The text of a response: int [T] ids, of which the last one is a stop token if `finish` is
    STOP.
    """
    ids = [int(token) for token in tokens]
    # A forced prefix may be a whole demonstration, stop token included. Then nothing is sampled and
    # finish is LENGTH.
    ends_with_eos = ids[-1:] == [tokenizer.eos_token_id]
    if finish == Finish.STOP or ends_with_eos:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
