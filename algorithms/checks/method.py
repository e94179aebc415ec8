"""Checks of what a method hands over: demand, requests, metrics, state. A wrong method stops the
run in its first step; it never trains wrongly without a word.

Every check raises MethodError, which names the method and, where there is one, the term. Terms are
checked in algorithms/checks/terms.py, rows in rows.py, what an objective returns where it is
called, in engine/learner/terms.py.
"""

from __future__ import annotations

import pickle
import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral

from tandem.algorithms.base import Demand, Method
from tandem.engine.config.names import source_key
from tandem.engine.core.errors import MethodError
from tandem.engine.core.text import closest
from tandem.engine.core.types import GenRequest

LINE_KEYS = ("step", "seconds")  # of every line of metrics.jsonl


def title(method: Method) -> str:
    return f"method {type(method).__name__}"


@contextmanager
def naming(method: Method) -> Iterator[None]:
    """Put the method's name before a MethodError of code that does not know it, the learner's."""
    try:
        yield
    except MethodError as error:
        raise MethodError(f"{title(method)}, {error}") from error


# -- before the rollouts


def check_demand(method: Method, demand: Demand, sources: Collection[str] = ()) -> Demand:
    """The demand, if it is one that can be met. sources: names of those of demonstrations."""
    where = f"{title(method)}: demand()"
    if not isinstance(demand, Demand):
        raise MethodError(f"{where} returned {kind(demand)}, expected a Demand{no_return(demand)}")
    check_count(where, "prompts", demand.prompts)
    if isinstance(demand.experts, Mapping):
        for name, count in demand.experts.items():
            check_count(where, f"experts[{name!r}]", count)
    else:
        check_count(where, "experts", demand.experts)
    if demand.by_source and not (method.uses_experts or method.prompts_from_experts):
        raise MethodError(
            f"{where} asks for {sum(demand.by_source.values())} demonstrations, but the method's "
            "uses_experts is False, so none are read; write `uses_experts: ClassVar[bool] = True` "
            "in its class"
        )
    if demand.prompts and not method.uses_rollouts:
        raise MethodError(
            f"{where} asks for rollouts of {demand.prompts} prompts, but the method's "
            "uses_rollouts is False, so there are none; leave uses_rollouts at True in its class"
        )
    check_sources(where, demand, sources)
    check_learning_rate(where, demand.learning_rate)
    updates = demand.updates
    if updates is not None and (not isinstance(updates, Integral) or updates < 1):
        raise MethodError(
            f"{where} asks for updates={updates!r}, expected a whole number >= 1, or None for what "
            "the config says"
        )
    if not isinstance(demand.stop, str):
        raise MethodError(
            f"{where} has stop={short(demand.stop)}, expected the reason as text, '' to go on"
        )
    return demand


def check_count(where: str, name: str, count) -> None:
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 0:
        raise MethodError(f"{where} asks for {name}={count!r}, expected a whole number >= 0")


def check_sources(where: str, demand: Demand, sources: Collection[str]) -> None:
    """Every source that is named exists, one of which nothing is wanted yet too. No names are known
    where a budget was made by hand.
    """
    named = demand.experts if isinstance(demand.experts, Mapping) else demand.by_source
    for name in named:
        if not sources or name in sources:
            continue
        raise MethodError(
            f"{where} asks for demonstrations of the source {name!r}"
            f"{closest(name, sources)}, but {source_key(name)} is not set; the config has "
            f"{', '.join(sources)}; set it, or ask for experts={{name: count}} of those"
        )


def check_learning_rate(where: str, rate) -> None:
    """None stands for the config's. NaN or infinity would ruin the weights without a word."""
    if rate is None:
        return
    number = real(rate)
    if number is None or not 0 <= number < float("inf"):
        raise MethodError(
            f"{where} asks for learning_rate={short(rate)}, expected a finite number >= 0, or None "
            "for that of the config; a Schedule becomes a number with schedule(step, signals)"
        )


def check_request(method: Method, request: GenRequest) -> GenRequest:
    """The rollout request, if it is one that can be met."""
    return checked_request(f"{title(method)}: request()", request)


def checked_request(where: str, request: GenRequest) -> GenRequest:
    if not isinstance(request, GenRequest):
        raise MethodError(
            f"{where} returned {kind(request)}, expected a GenRequest{no_return(request)}"
        )
    samples, prefixes = request.samples, request.prefixes
    if not isinstance(samples, Integral) or samples < 0:
        raise MethodError(f"{where} asks for samples={samples!r}, expected a whole number >= 0")
    if len(prefixes) not in (0, samples):
        raise MethodError(
            f"{where} gives {len(prefixes)} prefixes for {samples} samples; expected one for each "
            "sample (an empty one forces nothing), or () for none"
        )
    return request


def check_accept(method: Method, accepted: bool) -> bool:
    """The answer of `accept`. None would redraw every group until the prompts are used up."""
    where = f"{title(method)}: accept()"
    if accepted is None or isinstance(accepted, str):
        raise MethodError(
            f"{where} returned {short(accepted)}, expected True or False{no_return(accepted)}"
        )
    try:
        return bool(accepted)
    except (ValueError, RuntimeError):  # an array or tensor of several
        raise MethodError(
            f"{where} returned {kind(accepted)} of several values, expected True or False: "
            "write .any() or .all() behind it"
        ) from None


# -- after the update


def check_metrics(method: Method, metrics: Mapping[str, float]) -> dict[str, float]:
    """What `metrics` reports, if it is numbers by name."""
    where = f"{title(method)}: metrics()"
    if not isinstance(metrics, Mapping):
        raise MethodError(
            f"{where} returned {kind(metrics)}, expected {{name: number}}{no_return(metrics)}"
        )
    found = {}
    for name, value in metrics.items():
        number = real(value)
        if number is None:
            raise MethodError(f"{where}: {name!r} is {short(value)}, expected a number")
        name = str(name)
        if name in LINE_KEYS or name.startswith("eval/"):
            raise MethodError(
                f"{where} reports {name!r}, a name that metrics.jsonl has for something else "
                f"(also: {', '.join(LINE_KEYS)}, eval/...); choose another, e.g. 'my/{name}'"
            )
        found[name] = number
    return found


def check_state(method: Method) -> Mapping:
    """What the method's state_dict returns, if it can be saved: without `return` a resume would
    start its state over, and what cannot be pickled would end the run at its first checkpoint."""
    where = f"{title(method)}: state_dict()"
    state = method.state_dict()
    if not isinstance(state, Mapping):
        raise MethodError(f"{where} returned {kind(state)}, expected a mapping{no_return(state)}")
    for name, value in state.items():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise MethodError(
                f"{where}: {name!r} is {kind(value)} that cannot be pickled "
                f"({type(error).__name__}: {error}), so no checkpoint could hold it; return what "
                "it is made from: numbers, text, lists, mappings, arrays, tensors"
            ) from error
    return state


# -- words


def check_list(where: str, found, item: type) -> None:
    """`found` is a list or tuple of `item`. A generator is used up by the first look at it."""
    if isinstance(found, item):
        raise MethodError(f"{where} returned one {item.__name__}, expected a list: [...]")
    if not isinstance(found, (list, tuple)):
        raise MethodError(
            f"{where} returned {kind(found)}, expected a list of {item.__name__}{no_return(found)}"
        )
    for number, one in enumerate(found):
        if isinstance(one, type) or not isinstance(one, item):
            raise MethodError(
                f"{where} returned a list whose entry {number} is {kind(one)}, "
                f"expected {item.__name__}"
            )


def real(value) -> float | None:
    """The one number that `value` is; None for text, for several numbers, and for what no float
    can hold."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        if hasattr(value, "item"):  # of numpy or torch
            value = value.item()
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def short(found) -> str:
    """How Python writes it, cut to fit on a screen."""
    return reprlib.repr(found)


def kind(found) -> str:
    if found is None:
        return "None"
    if isinstance(found, type):
        return f"the class {found.__name__}"
    return f"a {type(found).__name__}"


def no_return(found) -> str:
    if found is None:
        return ": does it end without `return`?"
    if isinstance(found, Iterator):
        return ": it is used up by the first look at it, write list(...) around it"
    return ""
