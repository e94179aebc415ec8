"""The index of papers: complete, current, and every config line in it is one that works."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tandem.algorithms.parts.demos import OBJECTIVES
from tandem.algorithms.registry import METHODS, configured, method_class
from tandem.launch import cli
from tandem.launch.check_config import load
from tandem.launch.papers import find, page, read_index

ROOT = Path(__file__).parents[2]
INDEX = read_index()
ALL = (*INDEX.papers, *INDEX.others)
RUNS = [run for paper in ALL for run in paper.runs]
BLOCKS = [yaml.safe_load(run) for run in RUNS]
ADD = "add it to launch/papers.yaml, then: tandem methods --index > docs/papers.md"


def test_the_committed_page_is_current():
    again = "make it again: tandem methods --index > docs/papers.md"
    assert (ROOT / "docs" / "papers.md").read_text() == page(), again


def test_the_page_is_printed(capsys):
    assert cli.main(["methods", "--index"]) == 0
    assert capsys.readouterr().out == page()


def test_all_papers_of_the_survey_are_there_in_order():
    assert [paper.number for paper in INDEX.papers] == list(range(1, 120))
    assert all(paper.title for paper in INDEX.papers)


def test_an_entry_is_whole():
    for paper in ALL:
        verdicts = (paper.runs, paper.needs, paper.out_of_scope)
        assert sum(bool(verdict) for verdict in verdicts) == 1, paper
        assert paper.heading and paper.says[0].isupper() and paper.says.endswith("."), paper
        assert paper.runs or not paper.then, paper
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv), paper


def test_the_counts_of_the_page_are_those_of_its_rows():
    text = page()
    survey = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    verdicts = [line.split(" | ")[3] for line in survey]
    runs = sum(verdict.startswith("`method: {name: ") for verdict in verdicts)
    needs = sum(verdict.startswith("not yet: needs ") for verdict in verdicts)
    out = sum(verdict.startswith("out of scope: ") for verdict in verdicts)
    assert runs + needs + out == len(survey) == 119
    text = " ".join(text.split())
    assert f"{runs} of 119 papers" in text
    assert f"{needs} do not yet" in text and f"{out} are out of scope" in text


def test_a_row_has_four_cells_whatever_its_text():
    for line in page().splitlines():
        if line.startswith("|"):
            assert line.count("|") == 5, line


@pytest.mark.parametrize("block", BLOCKS, ids=RUNS)
def test_a_config_line_makes_its_method(block):
    assert configured(block["method"]) is not None


def test_a_method_that_a_remark_names_is_there():
    remarks = [remark for paper in ALL for remark in (paper.needs, paper.note) if remark]
    named = re.findall(r"`(method: \{.*?\})`", " ".join(remarks))
    assert len(named) > 3
    for line in named:
        assert configured(yaml.safe_load(line)["method"]) is not None


def test_a_config_line_with_more_than_a_method_is_a_config(tmp_path):
    longer = [block for block in BLOCKS if len(block) > 1]
    assert longer
    for block in longer:
        shipped = ROOT / "configs" / "methods" / f"{block['method']['name']}.yaml"
        based = {"base": str(shipped), **block}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(based))
        assert load(tmp_path / "c.yaml").method["name"] == block["method"]["name"]


def test_a_command_that_follows_is_one_of_tandem():
    commands = [command for paper in ALL for command in paper.then]
    assert commands
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "tandem" and cli.parse(words).handler is cli.merge


def test_every_method_and_objective_is_there_and_every_arxiv_id():
    names = {block["method"]["name"] for block in BLOCKS}
    assert set(METHODS) <= names, f"{set(METHODS) - names}: {ADD}"
    objectives = {configured(block["method"]).demos.objective for block in BLOCKS if demos(block)}
    assert set(OBJECTIVES) <= objectives, f"{set(OBJECTIVES) - objectives}: {ADD}"
    ids = {paper.arxiv for paper in ALL}
    for name in METHODS:
        assert method_class(name).paper in (*ids, ""), f"{name}: {ADD}"


def demos(block: dict) -> bool:
    return "demos" in block["method"] or block["method"]["name"] == "sft"


@pytest.mark.parametrize("wanted", ["2508.11408", "chord", "Harmonizing RL"])
def test_a_paper_is_found(wanted, capsys):
    assert cli.main(["methods", "--paper", wanted]) == 0
    text = capsys.readouterr().out
    assert "(arXiv 2508.11408)" in text and "\n  method: {name: chord_mu}\n" in text


def test_every_paper_is_found_by_its_title_and_id():
    for paper in ALL:
        for wanted in (paper.title or paper.name, paper.arxiv):
            assert not wanted or paper in find(wanted)


@pytest.mark.parametrize(
    ("wanted", "near"), [("chrod", "(CHORD)"), ("2508.11409", "Dynamic Weighting"), ("", "none is")]
)
def test_an_unknown_paper_is_bad_input(wanted, near, capsys):
    assert cli.main(["methods", "--paper", wanted]) == 2
    error = capsys.readouterr().err
    assert f"--paper {wanted!r}: no paper of the index" in error and near in error
