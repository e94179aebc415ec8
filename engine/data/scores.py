"""Score sidecars: numbers about the rows of a dataset in a file of their own, joined by id.

    {"id": "row-17", "perplexity": 3.2, "length": 180}

One line for each row; all lines have the same names, which become columns of the rows. A row's id
is its column `id`, or FILE:LINE where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.config.paths import shown
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.numbers import finite_number
from tandem.engine.core.text import brief, closest
from tandem.engine.data.json_rows import json_lines
from tandem.engine.data.row_ids import row_id

Scores = dict[str, dict[str, float]]  # {id: {name: number}}


@dataclass(frozen=True)
class ScoredRows:
    """Rows with their scores among the columns."""

    rows: Any  # Rows
    scores: Scores

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {**row, **self.scores[row_id(row, self.label(number))]}

    def label(self, number: int) -> str:
        return self.rows.label(number)


def with_scores(rows: Any, length: int, path: str) -> ScoredRows:
    """The rows with the scores of a file. length: how many of them are used.

    Raises ConfigError if one has none, or a column of a score's name.
    """
    name = shown(path)
    scores = read_scores(path)
    columns = next(iter(scores.values()))
    missing = []
    for number in range(length):
        row, label = rows[number], rows.label(number)
        found = row_id(row, label)
        if found not in scores:
            missing.append(found)
        for column in columns:
            if column in row:
                raise ConfigError(
                    f"{name}: a score is called {column!r}, and {label} has a column of that name; "
                    "rename one of them"
                )
    if missing:
        raise ConfigError(
            f"{name}: {len(missing)} of {length} rows have no line there, the first of them with "
            f"id {missing[0]!r}{closest(missing[0], scores)}; a row's id is its column `id`, or "
            "FILE:LINE where it has none"
        )
    return ScoredRows(rows, scores)


def read_scores(path: str) -> Scores:
    """Raises ConfigError for the first wrong line, with how many there are."""
    name = shown(path)
    scores: Scores = {}
    lines: dict[str, int] = {}  # of every id
    columns: set[str] = set()
    faults = []
    count = 0
    try:
        for line, row in json_lines(Path(path), name):
            count += 1
            label = f"{name}:{line}"
            fault = fault_of(row, columns)
            found = row_id(row, label)
            if not fault and found in lines:
                fault = f"id {found!r} has scores already, in line {lines[found]}"
            if fault:
                faults.append(f"{label}: {fault}")
                continue
            lines[found] = line
            scores[found] = {key: float(value) for key, value in row.items() if key != "id"}
            columns = set(scores[found])
    except OSError as error:
        raise ConfigError(f"scores {path!r} cannot be read: {error}") from None
    if faults:
        raise ConfigError(f"{faults[0]} ({len(faults)} of {count} lines are wrong)")
    if not scores:
        raise ConfigError(f"scores {path!r} is empty: expected a line for every row")
    return scores


def fault_of(row: dict[str, Any], columns: set[str]) -> str:
    """What is wrong with a line, or ''. columns: the names that all lines have; empty: not known
    yet.
    """
    names = row.keys() - {"id"}
    if row.get("id") is None:
        return f"there is no id; the line has {', '.join(row) or 'nothing'}"
    if not names:
        return "there is no score beside the id"
    if columns and names != columns:
        return f"the scores are {', '.join(sorted(names))}, elsewhere {', '.join(sorted(columns))}"
    for name in names:
        if finite_number(row[name]) is None:
            return f"score {name!r} is {brief(row[name])}, expected a finite number"
    return ""
