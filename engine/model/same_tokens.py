"""Whether another model means the same by every token id: then responses are scored by their ids,
and no text is tokenised again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.resolve import load_tokenizer

# text on which tokenizers of one vocabulary may still differ
PROBES = (
    "What is 12345 + 678? It is 13,023.",
    "def f(x):\n    return x ** 2  # squared\n",
    "  two  spaces,\ttabs\r\nand\n\n\nlines ",
    "Grüße, naïve café — “quotes”",
    "你好世界。こんにちは",
    "🙂👩‍💻 \\frac{a}{b} $x_{1}$",
)


def check_other_models(config: Config, tokenizer: Any) -> None:
    """Raise ConfigError for a model of the section `models` that is not there, or whose tokenizer
    is another than the run's.
    """
    for name, other in config.models.items():
        if not other.path:
            continue
        key = f"models.{name}.path"
        model = replace(config.model, path=other.path, tokenizer=None)
        try:
            theirs = load_tokenizer(model)
        except ConfigError as error:
            raise ConfigError(str(error).replace("model.path", key)) from error
        difference = first_difference(tokenizer, theirs)
        if difference:
            raise ConfigError(
                f"{key} is {other.path!r}, whose tokenizer is another than that of the model that "
                f"is trained, {config.model.path!r}: {difference}; it would read other words in "
                "the same ids; use a model with the same tokenizer"
            )


def first_difference(ours: Any, theirs: Any) -> str:
    """Of two tokenizers, in words; '' where there is none. Rows that pad an embedding do not
    count.
    """
    our_tokens = {number: token for token, number in ours.get_vocab().items()}
    their_tokens = {number: token for token, number in theirs.get_vocab().items()}
    for number in sorted(our_tokens.keys() | their_tokens.keys()):
        mine, other = our_tokens.get(number), their_tokens.get(number)
        if mine != other:
            return f"id {number} is {other!r} there and {mine!r} here"
    if ours.eos_token_id != theirs.eos_token_id:
        return f"a response ends with id {theirs.eos_token_id} there and {ours.eos_token_id} here"
    for probe in PROBES:
        there = theirs.encode(probe, add_special_tokens=False)
        here = ours.encode(probe, add_special_tokens=False)
        if there != here:
            return f"{probe!r} is {len(there)} tokens there and {len(here)} here, or other ones"
    return ""
