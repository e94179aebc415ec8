"""Columns, roles and score files of demonstrations."""

import pytest
from source_cases import demonstrations, rows_file

from tandem.engine.config.schema import DataConfig, DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.data.sources import PromptSource

ROWS = [{"id": name, "prompt": f"{name}=", "response": name, "who": name.upper()} for name in "abc"]
SCORES = [{"id": row["id"], "length": i, "loss": i / 2} for i, row in enumerate(ROWS)]


@pytest.fixture
def source(tmp_path, tokenizer, model):
    def make(scores=None, rows=ROWS, **options):
        if scores is not None:
            options["scores"] = rows_file(tmp_path, scores, "scores.jsonl")
        path = rows_file(tmp_path, rows)
        options.setdefault("response", "response")
        return demonstrations(path, tokenizer, model, **options)

    return make


def test_a_demonstration_has_its_row_and_its_role(source):
    found = source(role="who").take(3)
    assert [t.columns for t in found] == ROWS
    assert [t.role for t in found] == ["A", "B", "C"]
    assert [t.role for t in source().take(3)] == ["", "", ""]


@pytest.mark.parametrize("value, words", [(None, "null"), (3, "is 3, expected a word"), ("", "''")])
def test_a_role_is_a_word_in_every_row(value, words, source):
    with pytest.raises(ConfigError, match=f"rows.jsonl:4: column 'who' .*{words}"):
        source(rows=[*ROWS, {**ROWS[0], "who": value}], role="who")


def test_scores_join_the_columns_by_id(source, tmp_path, tokenizer, model):
    """In any order; ids that the dataset does not have do not matter."""
    more = [{"id": "z", "length": 9, "loss": 9}, *SCORES[::-1]]
    found = source(more).take(3)
    assert [t.columns["length"] for t in found] == [0, 1, 2]
    assert [t.columns["loss"] for t in found] == [0, 0.5, 1]
    assert found[1].columns["who"] == "B"
    dataset = DatasetConfig(
        path=str(tmp_path / "rows.jsonl"), scores=str(tmp_path / "scores.jsonl"), limit=1
    )
    (prompt,) = PromptSource(dataset, DataConfig(), tokenizer, model, 0).take(1)
    assert prompt.columns["loss"] == 0


def test_rows_without_an_id_are_called_by_their_line(source, tmp_path):
    rows = [{"prompt": "1=", "response": "1"}, {"prompt": "2=", "response": "2"}]
    scores = [{"id": f"{tmp_path}/rows.jsonl:{line}", "s": line} for line in (1, 2)]
    assert [t.columns["s"] for t in source(scores, rows).take(2)] == [1, 2]


def changed(line: int, **more) -> list[dict]:
    scores = [dict(score) for score in SCORES]
    scores[line - 1].update(more)
    return scores


@pytest.mark.parametrize(
    "scores, words",
    [
        (SCORES[:1], ["scores.jsonl: 2 of 3 rows", "id 'b'"]),
        ([], ["is empty"]),
        (changed(2, id="a"), ["scores.jsonl:2: id 'a'", "in line 1", "(1 of 3 lines are wrong)"]),
        ([*SCORES, *SCORES[:2]], ["scores.jsonl:4: id 'a'", "in line 1", "(2 of 5 lines"]),
        (changed(3, loss="high"), ["scores.jsonl:3: score 'loss' is 'high'", "finite number"]),
        (changed(3, loss=True), ["scores.jsonl:3: score 'loss' is True"]),
        (changed(3, loss=10**400), ["scores.jsonl:3: score 'loss' is 1000", "finite number"]),
        (changed(3, loss=None), ["scores.jsonl:3: score 'loss' is None"]),
        (changed(3, loss=float("nan")), ["scores.jsonl:3: score 'loss' is nan"]),
        (changed(2, more=1), ["scores.jsonl:2: the scores are length, loss, more, elsewhere"]),
        (changed(2, id=None), ["scores.jsonl:2: there is no id"]),
        ([{"id": "a"}], ["scores.jsonl:1: there is no score"]),
        (changed(1, who=1, length=0)[:1], ["a score is called 'who'", "rows.jsonl:1"]),
    ],
)
def test_wrong_score_files(scores, words, source):
    with pytest.raises(ConfigError) as error:
        source(scores)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_score_file_that_is_not_there(tmp_path, tokenizer, model):
    path, scores = rows_file(tmp_path, ROWS), str(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        demonstrations(path, tokenizer, model, response="response", scores=scores)
