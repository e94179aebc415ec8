"""Checks of what a method asks for again: the request of a further wave.

Every check raises MethodError, which names the method and `again`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tandem.algorithms.base import Budget, Method
from tandem.algorithms.checks.method import checked_request, kind, short, title
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import GenRequest, Prompt, Sampling

MOST_WAVES = 16  # of one group, after the first


def check_again(
    method: Method, again: GenRequest | None, request: GenRequest, budget: Budget
) -> GenRequest | None:
    """The request of a further wave for what `request` asked for, or None."""
    where = f"{title(method)}: again()"
    if again is None:
        return None
    checked_request(where, again)
    check_same(where, again, request)
    if request.wave >= MOST_WAVES:
        raise MethodError(
            f"{where} asked more than {MOST_WAVES} times for prompt {request.prompt.id!r}; "
            "expected None once a group is to be trained on as it is"
        )
    check_sampling(where, again.sampling, request.sampling)
    check_prompt(where, again.prompt, budget)
    for number, prefix in enumerate(again.prefixes):
        check_prefix(f"{where}: prefix {number}", prefix, again.sampling, budget)
    return again


def check_same(where: str, again: GenRequest, request: GenRequest) -> None:
    """It is for the same group."""
    if not isinstance(again.prompt, Prompt):
        raise MethodError(
            f"{where} has {kind(again.prompt)} as prompt, expected a Prompt: "
            "dataclasses.replace(request.prompt, content=..., tokens=...)"
        )
    same = again.group == request.group and again.prompt.id == request.prompt.id
    if not same or again.samples < 1:
        raise MethodError(
            f"{where} asks for {again.samples} samples of group {again.group}, prompt "
            f"{again.prompt.id!r}; expected at least one of group {request.group}, prompt "
            f"{request.prompt.id!r}: start from the request it is given, "
            "dataclasses.replace(request, ...)"
        )


def check_sampling(where: str, sampling: Sampling, given: Sampling) -> None:
    """All that a step trains on is scored at one temperature, that of the run. A seed is drawn for
    each wave, whatever the request has.
    """
    if replace(sampling, seed=given.seed) != given:
        raise MethodError(
            f"{where} asks for {sampling}; expected that of the request it is given, {given}: a "
            "step is trained at one way of sampling, that of the config"
        )


def check_prompt(where: str, prompt: Prompt, budget: Budget) -> None:
    tokens, limit = prompt.tokens, budget.max_prompt_tokens
    check_ids(f"{where}: prompt.tokens", tokens, budget)
    if len(tokens) == 0:
        raise MethodError(f"{where}: prompt.tokens is empty, expected at least one id")
    if limit is not None and len(tokens) > limit:
        raise MethodError(
            f"{where}: the prompt has {len(tokens)} tokens, more than data.max_prompt_tokens="
            f"{limit}; return None for such a group (budget.codec.encode is None then), or raise "
            "the limit"
        )


def check_prefix(where: str, prefix: np.ndarray, sampling: Sampling, budget: Budget) -> None:
    if len(prefix) == 0:  # it forces nothing
        return
    check_ids(where, prefix, budget)
    if len(prefix) >= sampling.max_tokens:
        raise MethodError(
            f"{where} has {len(prefix)} tokens, expected fewer than rollout.max_tokens="
            f"{sampling.max_tokens}: the response goes on behind it"
        )


def check_ids(where: str, tokens: np.ndarray, budget: Budget) -> None:
    """Token ids of the model, as far as its vocabulary is known."""
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise MethodError(
            f"{where} is {short(tokens)}, expected token ids: a numpy array of integers, [T]"
        )
    wrong = tokens < 0
    if budget.vocabulary is not None:
        wrong |= tokens >= budget.vocabulary
    if wrong.any():
        at = int(wrong.argmax())
        size = budget.vocabulary or "the size of the vocabulary"
        raise MethodError(
            f"{where} has the id {tokens[at]} at position {at}, expected ids from 0 and below "
            f"{size}"
        )
