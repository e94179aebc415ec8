"""`tandem methods --paper` and `--index`: from a paper to the config line that runs it.

tandem methods --index > docs/papers.md
"""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tandem.engine.core.errors import ConfigError

FILE = Path(__file__).with_name("papers.yaml")
NEAREST = 3  # titles that an unknown paper is answered with
HEAD = """# Papers

Made by `tandem methods --index` of `launch/papers.yaml`, where a paper is added or changed;
`tandem methods --paper 2508.11408`, or a word of the title, prints its entry. {runs} of {all}
papers on supervised fine-tuning and what it has to do with RL run today, {needs} do not yet, and
{out} are out of scope. Config lines go into any config of [methods](methods.md), "or" stands
between alternatives, and *not verified* is what could not be confirmed from paper or code.

## The survey
"""
OTHERS = """## Other papers

What else there are methods of, by their short names.
"""


@dataclass(frozen=True)
class Paper:
    """An entry of the index, with exactly one of `runs`, `needs` and `out_of_scope`."""

    says: str
    title: str = ""
    name: str = ""  # a short one, of the method or paper; there is this or a title
    number: int | None = None  # in the survey
    arxiv: str | None = None
    runs: tuple[str, ...] = ()  # config lines, alternatives of each other
    then: tuple[str, ...] = ()  # commands that follow
    needs: str | None = None  # what is missing
    out_of_scope: str | None = None  # why
    note: str | None = None  # how to run it
    unverified: str | None = None

    @property
    def heading(self) -> str:
        if not self.title or self.name in self.title:
            return self.title or self.name
        return f"{self.title} ({self.name})"


@dataclass(frozen=True)
class Index:
    papers: tuple[Paper, ...]  # of the survey, in its order
    others: tuple[Paper, ...]


@cache
def read_index() -> Index:
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return Index(papers_of(found["papers"]), papers_of(found["others"]))


def papers_of(entries: list[dict]) -> tuple[Paper, ...]:
    papers = []
    for entry in entries:
        for lines in ("runs", "then"):
            entry[lines] = tuple(entry.get(lines, ()))
        papers.append(Paper(**entry))
    return tuple(papers)


def print_papers(wanted: str) -> int:
    """Raises ConfigError if no paper has that arXiv id or word."""
    for paper in find(wanted):
        print(in_words(paper))
    return 0


def find(wanted: str) -> list[Paper]:
    """The papers with this arXiv id, or with these words in name or title.

    Raises ConfigError with the closest titles if there is none.
    """
    index = read_index()
    papers = [*index.papers, *index.others]
    found = [paper for paper in papers if matches(paper, wanted)]
    if not found:
        near = nearest(wanted, papers) or "none is close"
        raise ConfigError(
            f"--paper {wanted!r}: no paper of the index has this arXiv id or these words in its "
            f"title; expected such as 2508.11408 or chord. Closest: {near}. All: tandem methods "
            "--index"
        )
    return found


def matches(paper: Paper, wanted: str) -> bool:
    if wanted == paper.arxiv:
        return True
    text = f"{paper.name} {paper.title}".lower()
    words = wanted.lower().split()
    return bool(words) and all(word in text for word in words)


def nearest(wanted: str, papers: list[Paper]) -> str:
    """Titles that have a name, a word or an arXiv id close to the one wanted."""
    titles: dict[str, str] = {}
    for paper in papers:
        words = [paper.arxiv, paper.name, *paper.name.split(), *paper.title.split()]
        for word in filter(None, words):
            titles.setdefault(word.lower().strip(":,()"), paper.heading)
    close = difflib.get_close_matches(wanted.lower(), titles, n=2 * NEAREST, cutoff=0.6)
    different = dict.fromkeys(titles[word] for word in close)  # in order, each once
    return "; ".join(list(different)[:NEAREST])


def in_words(paper: Paper) -> str:
    """The entry as the command prints it."""
    arxiv = f"arXiv {paper.arxiv}" if paper.arxiv else "arXiv id not known here"
    parts = [f"{paper.heading}  ({arxiv})", paper.says]
    for run in paper.runs:
        parts += run.splitlines()
    parts += paper.then
    parts += remarks(paper)
    head, *body = parts
    return "\n".join([head, *(textwrap.indent(part, "  ") for part in body)])


def remarks(paper: Paper) -> list[str]:
    """What there is to say beside the lines that run it."""
    found = []
    if paper.needs:
        found.append(f"not yet: needs {paper.needs}")
    if paper.out_of_scope:
        found.append(f"out of scope: {paper.out_of_scope}")
    if paper.note:
        found.append(paper.note)
    if paper.unverified:
        found.append(f"UNVERIFIED: {paper.unverified}")
    return found


def page() -> str:
    """docs/papers.md."""
    index = read_index()
    counts = {
        "all": len(index.papers),
        "runs": sum(bool(paper.runs) for paper in index.papers),
        "needs": sum(bool(paper.needs) for paper in index.papers),
        "out": sum(bool(paper.out_of_scope) for paper in index.papers),
    }
    parts = [HEAD.format(**counts), table(index.papers), OTHERS, table(index.others)]
    return "\n".join(parts)


def table(papers: tuple[Paper, ...]) -> str:
    lines = ["| # | paper | what it says | in Tandem |", "|---|---|---|---|"]
    for paper in papers:
        number = paper.number or ""
        lines.append(f"| {number} | {linked(paper)} | {paper.says} | {verdict(paper)} |")
    return "\n".join(lines) + "\n"


def linked(paper: Paper) -> str:
    if not paper.arxiv:
        return paper.heading
    return f"{paper.heading} [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"


def verdict(paper: Paper) -> str:
    """The cell of a table: config lines as code, and the remarks."""
    runs = []
    for run in paper.runs:
        runs.append("<br>".join(f"`{line}`" for line in run.splitlines()))
    parts = ["<br>or ".join(runs)] if runs else []
    parts += [f"then `{command}`" for command in paper.then]
    for remark in remarks(paper):
        parts.append(remark.replace("UNVERIFIED:", "*not verified:*"))
    return "<br>".join(parts)
