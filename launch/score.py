"""`tandem score`: what a model says of a config's demonstrations, as a file of scores that a
dataset's `scores:` joins to its rows (engine/data/scores.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tandem.algorithms.registry import configured
from tandem.algorithms.rows import expert_row
from tandem.engine.config.paths import shown
from tandem.engine.config.schema import Config, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import write_atomic
from tandem.engine.core.text import closest
from tandem.engine.core.types import Row, Trajectory
from tandem.engine.data import templates
from tandem.engine.data.pairs import demonstration_source
from tandem.engine.data.row_ids import row_id
from tandem.engine.data.sources import ExpertSource
from tandem.engine.learner.scorer import Measured, Scorer
from tandem.engine.model.context import engine_length
from tandem.engine.model.load import load_policy
from tandem.engine.model.resolve import load_tokenizer, resolve_model
from tandem.engine.model.rope import follow_engines
from tandem.launch.machine import check_weights

TERM = "score"
AT_ONCE = 256  # rows that are tokenised and packed together
SECONDS = 5.0  # between two lines of progress
Scores = dict[str, float]


def nll(measured: Measured) -> float:
    return -mean_logp(measured)


def entropy(measured: Measured) -> float:
    assert measured.entropy is not None, "the scorer was asked for it"
    return float(measured.entropy.mean(dtype=float))


def sum_logp(measured: Measured) -> float:
    return float(measured.logp.sum(dtype=float))


def mean_logp(measured: Measured) -> float:
    return float(measured.logp.mean(dtype=float))


def tokens(measured: Measured) -> float:
    return len(measured.logp)


# of the trained tokens of a row
WHAT: dict[str, Callable[[Measured], float]] = {
    made.__name__: made for made in (nll, entropy, sum_logp, mean_logp, tokens)
}


@dataclass(frozen=True, eq=False)
class Reader:
    """The rows as one model reads them."""

    prefix: str  # of the names of its scores
    model: ModelConfig
    source: ExpertSource

    def names(self, what: Sequence[str]) -> Iterator[str]:
        """The names of a row's scores; those of a pair begin with the role of the answer."""
        for answer in self.answers(0):
            for name in what:
                yield self.name(answer, name)

    def name(self, answer: Trajectory, score: str) -> str:
        role = f"{answer.role}_" if self.is_pair else ""
        return f"{self.prefix}{role}{score}"

    @property
    def is_pair(self) -> bool:
        return self.source.dataset.chosen is not None

    def answers(self, number: int) -> tuple[Trajectory, ...]:
        made = self.source.make(number)
        return made if isinstance(made, tuple) else (made,)


def score(config: Config, args: argparse.Namespace) -> str:
    """Write the file; says what was written, in words.

    Raises ConfigError, before any model is loaded for what can be told before.
    """
    what = wanted(args.what)
    dataset = chosen_dataset(config, args.source)
    out = target(args.out, dataset)
    device = chosen_device(config)
    try:
        readers = open_readers(config, dataset, args)
        ids = row_ids(readers[0].source)
        refuse_taken(readers, what)
        found: list[Scores] = [{} for _ in ids]
        for reader in readers:
            score_rows(config, reader, what, device, found)
    finally:
        templates.WORKER.stop()
    lines = []
    for own_id, scores in zip(ids, found, strict=True):
        line = json.dumps({"id": own_id, **scores})
        lines.append(f"{line}\n")
    write_atomic(out, "".join(lines))
    return f"{', '.join(found[0])} of {len(lines)} rows written to {shown(out)}"


# -- before a model is loaded


def wanted(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WHAT:
            raise ConfigError(
                f"--what has {name!r}{closest(name, WHAT)}; expected names out of "
                f"{', '.join(WHAT)}, with commas between them"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"--what names a score twice: {text}")
    return names


def chosen_dataset(config: Config, name: str) -> DatasetConfig:
    known = config.data.demonstrations
    if name not in known:
        hint = "this config has no demonstrations: set data.experts"
        if known:
            hint = f"expected one of {', '.join(known)}"
        raise ConfigError(
            f"--source is {name!r}{closest(name, known)}, whose rows would be scored; {hint}"
        )
    return known[name]


def target(out: str | None, dataset: DatasetConfig) -> Path:
    """Where the scores go. Raises ConfigError if nothing can be written there."""
    if out is None and dataset.scores is None:
        raise ConfigError(
            "--out is not set, and neither is `scores:` of the dataset, which would say where the "
            "scores are read; write --out scores.jsonl"
        )
    path = Path(out or dataset.scores or "").expanduser()
    if path.suffix != ".jsonl" or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"the scores would go to {shown(path)}: expected a file NAME.jsonl in a folder that "
            "exists"
        )
    if path.exists():
        raise ConfigError(f"{shown(path)} exists; remove it, or name another file with --out")
    return path


def chosen_device(config: Config) -> torch.device:
    gpus = config.cluster.learner_gpus
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.learner_gpus is {gpus:g}, but torch finds no GPU here; add "
            "cluster.learner_gpus=0 cluster.engine_gpus=0 to score on the CPU"
        )
    return torch.device("cuda")


def open_readers(config: Config, dataset: DatasetConfig, args: argparse.Namespace) -> list[Reader]:
    """The config's model, then the others, each with its own tokenizer and chat template."""
    models = {args.prefix: config.model}
    for word in args.reference:
        name, _, path = word.rpartition("=")
        prefix = f"{name or 'reference'}_"
        if prefix in models:
            raise ConfigError(
                f"--reference {word}: another model's scores begin with {prefix!r} too; write "
                "--reference NAME=MODEL with a name for each"
            )
        models[prefix] = replace(config.model, path=path, tokenizer=None)
    readers = []
    for prefix, model in models.items():
        path = resolve_model(model)
        check_weights(path)
        # the scores that are to be made need not be there
        plain = replace(dataset, scores=None)
        kind = demonstration_source(plain)
        tokenizer = load_tokenizer(model)
        source = kind(plain, config.data, tokenizer, model, config.run.seed)
        if source.dropped:
            first = source.first_dropped.partition(";")[0]  # without advice
            raise ConfigError(
                f"{dataset.path}: {source.dropped} rows are too long and left out "
                f"(data.overlong=drop), the first: {first}. A file of scores has a line for every "
                "row: raise the limit for this command, or shorten these rows"
            )
        readers.append(Reader(prefix, model, source))
    return readers


def row_ids(source: ExpertSource) -> list[str]:
    """Of all rows. Raises ConfigError for one that two rows have."""
    labels: dict[str, str] = {}
    for number in range(len(source)):
        label = source.rows.label(number)
        name = row_id(source.rows[number], label)
        if name in labels:
            raise ConfigError(
                f"{label} has the id {name!r}, as has {labels[name]}; scores join by id, so each "
                "row needs its own, or none at all"
            )
        labels[name] = label
    return list(labels)


def refuse_taken(readers: Sequence[Reader], what: Sequence[str]) -> None:
    """Raise ConfigError for a score that has the name of a column."""
    source = readers[0].source
    for reader in readers:
        for name in reader.names(what):
            if name in source.rows[0]:
                raise ConfigError(
                    f"{source.rows.label(0)} has a column {name!r}, the name of a score; choose "
                    "another beginning: --prefix my_, or --reference NAME=MODEL"
                )


# -- with a model


def score_rows(
    config: Config,
    reader: Reader,
    what: Sequence[str],
    device: torch.device,
    found: list[Scores],
) -> None:
    """Add the scores of one model to those of each row."""
    torch.set_num_threads(config.cluster.threads)
    policy = load_policy(reader.model)
    policy.requires_grad_(False)
    policy.to(device)
    if configured(config.method).uses_rollouts:
        follow_engines(policy.model, engine_length(config))
    scorer = Scorer(
        policy,
        device,
        config.learner.micro_batch_tokens,
        config.learner.head_chunk,
        entropy="entropy" in what,
    )
    progress = Progress(shown(reader.model.path), len(found))
    for first in range(0, len(found), AT_ONCE):
        end = min(first + AT_ONCE, len(found))
        owners: list[tuple[int, Trajectory]] = []
        rows: list[Row] = []
        for number in range(first, end):
            for answer in reader.answers(number):
                owners.append((number, answer))
                rows.append(expert_row(answer, TERM))
        for (number, answer), measured in zip(owners, scorer(rows, TERM), strict=True):
            for name in what:
                value = WHAT[name](measured)
                if not math.isfinite(value):
                    label = reader.source.rows.label(number)
                    raise ConfigError(
                        f"{label}: {name} under {shown(reader.model.path)} is {value}, expected a "
                        "finite number; is the model whole, and made for this dtype (model.dtype)?"
                    )
                found[number][reader.name(answer, name)] = value
        total = sum(len(row.tokens) for row in rows)
        progress.tell(end, total)


class Progress:
    """A line now and then about one model."""

    def __init__(self, name: str, total: int):
        self.name = name
        self.total = total
        self.tokens = 0
        self.started = time.monotonic()
        self.told = self.started

    def tell(self, rows: int, more: int) -> None:
        """rows: so far; more: tokens since the last time."""
        self.tokens += more
        now = time.monotonic()
        if rows < self.total and now - self.told < SECONDS:
            return
        self.told = now
        seconds = max(now - self.started, 1e-9)
        rate = self.tokens / seconds
        print(
            f"{self.name}: {rows} of {self.total} rows, {rate:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
