"""Checks of the models that terms ask, and of the views behind which they ask them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from tandem.algorithms.base import Term
from tandem.engine.config.names import logp_of, model_of, split_view
from tandem.engine.core.errors import CarrierError, MethodError
from tandem.engine.core.text import closest
from tandem.engine.core.types import Row
from tandem.engine.model.quantities import Quantity


def asked_models(term: Term, brought: Collection[str] = ()) -> list[str]:
    """The models, `NAME` or `NAME@VIEW`, that a term's streams and quantities are of; without
    those of streams that are `brought`.
    """
    found: set[str] = set()
    for need in term.needs:
        model = model_of(need)
        if model is not None and need not in brought:
            found.add(model)
    for quantity in term.quantities.values():
        found.update(quantity.models)
    return sorted(found)


def check_models(where: str, asked: Iterable[str], models: Collection[str]) -> None:
    """Every model is there. models: names of all there are; none are known where a budget was made
    by hand.
    """
    for model in asked:
        name, _ = split_view(model)
        if models and name not in models:
            raise MethodError(
                f"{where} asks for the model {name!r}{closest(name, models)}, but models.{name} is "
                f"not set; the run has {', '.join(models)}; add to the config "
                f"models: {{{name}: {{path: FOLDER}}}}"
            )


def check_probed_models(
    where: str, probes: Mapping[str, Quantity], models: Collection[str]
) -> None:
    """As check_models; and probes look from no view, which only some rows may have."""
    for name, quantity in probes.items():
        check_models(f"{where} {name!r}", quantity.models, models)
        for model in quantity.models:
            if split_view(model)[1]:
                raise MethodError(
                    f"{where} {name!r} reads {model!r}, a model behind a view, which only a term "
                    f"can ask for: needs={{'{logp_of(model)}'}}, or a quantity of its own"
                )


def check_views(where: str, row: Row, terms: Sequence[Term]) -> None:
    """Every view that is looked from behind the row's tokens is there, and is a prompt."""
    for name, prompt in row.views.items():
        here = f"{where}: views[{name!r}]"
        if not isinstance(prompt, np.ndarray) or prompt.dtype.kind not in "iu" or prompt.ndim != 1:
            raise MethodError(f"{here} is {prompt!r}, expected the ids of a prompt, int32 [T]")
        if len(prompt) == 0 or prompt.min() < 0:
            raise MethodError(f"{here} must have at least one token, and ids of the vocabulary")
    for term in terms:
        weight = row.weights.get(term.name)
        if weight is None or not weight.any():
            continue
        for model in asked_models(term, row.streams):
            _, view = split_view(model)
            if not view:
                continue
            try:
                row.at_view(view)
            except CarrierError as error:
                raise MethodError(
                    f"{where}: term {term.name!r} asks for {model!r}: {error}"
                ) from error
