"""Generated data: `task:NAME` (the small tasks of this file) and `reasoning_gym:TASK`, as rows made
on the fly from (seed, number).

    path: task:sort            options: {size: 100, seed: 1, digits: 8, response: "{steps}"}
    path: reasoning_gym:gcd    options: {size: null, seed: 0, response: "<answer>{answer}</answer>",
                               max_numbers: 3}

Invariants:
  * Every problem belongs to one split forever: a hash of its question puts a fifth of all problems
    in `split: test`, the others in `split: train`. Whatever the seeds and sizes, no test problem
    occurs in a training prompt or a demonstration.
  * `size: N` is a fixed set of N different problems; without a size the rows never end and (seed,
    number) alone makes a row.
"""

from __future__ import annotations

import hashlib
import random
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tandem.engine.config.schema import DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import closest

TEST_SHARE = 5  # one problem in so many is a test problem
# draws without a new problem of the split, until the task counts as exhausted
MAX_TRIES = 10_000
UNLIMITED = sys.maxsize  # `len` of rows without a size


def sort(rng: random.Random, digits: int = 8) -> dict[str, str]:
    """Sort the digits of a number. steps: the sorted list after each insertion, e.g. sort 3142= ->
    3,13,134,1234.
    """
    drawn = "".join(str(rng.randrange(10)) for _ in range(digits))
    steps = ["".join(sorted(drawn[:n])) for n in range(1, digits + 1)]
    return {"prompt": f"sort {drawn}=", "answer": steps[-1], "steps": ",".join(steps)}


def chain(rng: random.Random, numbers: int = 5) -> dict[str, str]:
    """Add one-digit numbers. steps: the running sums, e.g. 3+4+8= -> 7,15."""
    drawn = [rng.randrange(1, 10) for _ in range(numbers)]
    question = "+".join(map(str, drawn))
    sums = [str(sum(drawn[:n])) for n in range(2, numbers + 1)]
    return {"prompt": f"{question}=", "answer": str(sum(drawn)), "steps": ",".join(sums)}


def relevance(rng: random.Random, digits: int = 3) -> dict[str, Any]:
    """Score how relevant a number is to a digit: 10 if it has it, else 0. query, positive and
    score (of a judge) are what a reranker's reward reads.
    """
    query = str(rng.randrange(10))
    document = "".join(str(rng.randrange(10)) for _ in range(digits))
    positive = query in document
    score = 10 if positive else 0
    return {
        "prompt": f"is {query} in {document}=",
        "answer": str(score),
        "steps": f"{','.join(document)},{score}",
        "query": query,
        "positive": positive,
        "score": score,
    }


def talk(rng: random.Random, digits: int = 8) -> dict[str, Any]:
    """A dialogue: Ann sorts the digits of a number, and Bob says them backwards. messages: all of
    it; speakers: who says the turns of the assistant.
    """
    row = sort(rng, digits)
    said = [f"Ann: {row['answer']}", f"Bob: {row['answer'][::-1]}"]
    messages = [{"role": "user", "content": row["prompt"]}]
    messages += [{"role": "assistant", "content": text} for text in said]
    return {**row, "messages": messages, "speakers": ["Ann", "Bob"]}


def pairs(rng: random.Random, digits: int = 8) -> dict[str, Any]:
    """sort, and beside the answer a wrong one: its last digit is another. mean_logp: a number as
    another model would give the answer, here drawn.
    """
    row = sort(rng, digits)
    answer = row["answer"]
    last = (int(answer[-1]) + 1) % 10
    return {**row, "wrong": f"{answer[:-1]}{last}", "mean_logp": -rng.random()}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "sort": sort,
    "chain": chain,
    "relevance": relevance,
    "talk": talk,
    "pairs": pairs,
}


def is_generated(path: str) -> bool:
    return path.startswith(("task:", "reasoning_gym:"))


def held_out(question: str) -> bool:
    """Whether a problem belongs to the test split."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % TEST_SHARE == 0


class GeneratedRows:
    """Rows of a generated dataset, by number: `rows[i]` -> dict with prompt, answer, response and
    the task's other columns.

    Raises ConfigError for an unknown task, split or option, and for a `size` larger than the number
    of different problems that can be found.
    """

    def __init__(self, dataset: DatasetConfig):
        self.path, self.split = dataset.path, dataset.split
        if self.split not in ("train", "test"):
            raise ConfigError(f"{self.path}: split is {self.split!r}, expected train or test")
        options = dict(dataset.options)
        self.size = options.pop("size", None)
        self.seed = options.pop("seed", 0)
        self.template = options.pop("response", "{answer}")
        if self.size is not None and not is_count(self.size):
            raise ConfigError(
                f"{self.path}: options.size is {self.size!r}, expected an integer of at "
                "least 1, or null for rows without end"
            )
        if not isinstance(self.seed, int) or not isinstance(self.template, str):
            raise ConfigError(
                f"{self.path}: options.seed is {self.seed!r} and options.response is "
                f"{self.template!r}, expected an integer and a text with {{answer}}"
            )
        kind, _, name = self.path.partition(":")
        maker = task_maker if kind == "task" else reasoning_gym_maker
        self.make = maker(name, options)
        self.fixed = None if self.size is None else self.different(self.size)

    def __len__(self) -> int:
        return UNLIMITED if self.size is None else self.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.draw(number) if self.fixed is None else self.fixed[number]
        # many right answers, none of them given: fine as a prompt, no demonstration
        if row["answer"] is None and "{answer}" in self.template:
            return {**row, "response": None}

        def column(match: re.Match) -> str:
            return str(row.get(match[1], match[0]))

        # not str.format: \boxed{...} must pass
        return {**row, "response": re.sub(r"\{(\w+)\}", column, self.template)}

    def label(self, number: int) -> str:
        return f"{self.path}/{self.split}/seed{self.seed}:{number}"

    def draw(self, number: int) -> dict[str, Any]:
        """The problem of this number: the first of a random sequence of its own that lies in the
        split.
        """
        for attempt in range(MAX_TRIES):
            row = self.make(random.Random(f"{self.seed}/{number}/{attempt}"))
            if held_out(row["prompt"]) == (self.split == "test"):
                return row
        raise ConfigError(
            f"{self.path}: {MAX_TRIES} draws gave no problem for split {self.split!r}; make "
            "the task larger by its options"
        )

    def different(self, size: int) -> list[dict[str, Any]]:
        """The first `size` different problems."""
        found: dict[str, dict[str, Any]] = {}
        number = repeats = 0
        while len(found) < size:
            row = self.draw(number)
            repeats = repeats + 1 if row["prompt"] in found else 0
            found.setdefault(row["prompt"], row)
            if repeats > MAX_TRIES:
                raise ConfigError(
                    f"{self.path}: options.size is {size}, but split {self.split!r} has no "
                    f"more than about {len(found)} different problems; "
                    "lower the size or make the task larger by its options"
                )
            number += 1
        return list(found.values())


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def task_maker(name: str, options: Mapping[str, Any]) -> Callable[[random.Random], dict[str, Any]]:
    if name not in TASKS:
        raise ConfigError(
            f"unknown task {name!r}{closest(name, TASKS)}; known: {', '.join(TASKS)}, and "
            "reasoning_gym:TASK"
        )
    task = TASKS[name]
    known = task.__code__.co_varnames[1 : task.__code__.co_argcount]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"task:{name}: unknown option {key!r}{closest(key, known)}; known: size, "
                f"seed, response, {', '.join(known)}"
            )
        if not isinstance(value, int) or not 1 <= value <= 1000:
            raise ConfigError(
                f"task:{name}: options.{key} is {value!r}, expected an integer from 1 to 1000"
            )
    return lambda rng: task(rng, **options)


def reasoning_gym_maker(
    name: str, options: Mapping[str, Any]
) -> Callable[[random.Random], dict[str, Any]]:
    """Rows of a reasoning-gym task: prompt and question (the same text), answer, metadata,
    source_dataset.

    Every row is item 0 of a dataset with a seed of its own: reasoning-gym seeds item i with seed +
    i, so that two of its datasets with nearby seeds are the same problems, shifted.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"reasoning_gym:{name} needs the package reasoning-gym, which cannot be imported "
            f"here: {error}"
        ) from None
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ConfigError(
            f"reasoning_gym:{name}: there is no such task{closest(name, DATASETS)}; see the "
            f"reasoning-gym package for its {len(DATASETS)} tasks"
        )

    def make(rng: random.Random) -> dict[str, Any]:
        state = random.getstate()
        random.seed(rng.getrandbits(63))  # list_functions draws from the global generator as well
        try:
            seed = rng.getrandbits(31)
            item = reasoning_gym.create_dataset(name, seed=seed, size=1, **options)[0]
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"reasoning_gym:{name}: the task refuses options {dict(options)}: {error}"
            ) from None
        finally:
            random.setstate(state)
        return {
            "prompt": item["question"],
            "question": item["question"],
            "answer": item["answer"],
            "metadata": dict(item["metadata"]),
            "source_dataset": name,
        }

    return make
