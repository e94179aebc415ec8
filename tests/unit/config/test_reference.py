"""The page of keys and the JSON schema are those of the types."""

import json
from pathlib import Path

import pytest

from tandem.engine.config.config_file import packaged, read_tree
from tandem.engine.config.reference import json_schema, reference, schema_text
from tandem.launch import cli

DOCS = Path(__file__).parents[3] / "docs"
AGAIN = "make it again: tandem configs --keys > docs/config_keys.md; tandem configs --schema > "


def test_the_committed_pages_are_current():
    assert (DOCS / "config_keys.md").read_text() == reference(), AGAIN
    assert (DOCS / "config.schema.json").read_text() == schema_text(), AGAIN


def test_the_commands_print_them(capsys):
    assert cli.main(["configs", "--keys"]) == 0
    assert capsys.readouterr().out == reference()
    assert cli.main(["configs", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_every_key_has_a_meaning_and_its_bounds():
    text = reference()
    assert "| `run.steps` | an integer, at least 1 | `10` |" in text
    assert "| `rollout.top_p` | a number, more than 0, at most 1 | `1.0` |" in text
    assert "| `eval.limit` | an integer, at least 1, or null | `null` |" in text
    assert "| `run.resume` | one of false, true, auto | `false` |" in text
    for line in text.splitlines():
        if line.startswith("| `"):
            assert len(line.split(" | ")[-1]) > 8, line


@pytest.mark.whole_run
def test_every_shipped_config_fits_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in packaged().values():
        validator.validate(read_tree(path).values)


@pytest.mark.parametrize(
    "config",
    [
        {"learner": {"zero_stage": 4}},
        {"learner": {"zero_stge": 1}},
        {"run": {"steps": 0}},
        {"run": {"steps": True}},
        {"learner": {"betas": [0.9]}},
        {"base": 3},
    ],
)
def test_a_mistake_does_not_fit(config):
    jsonschema = pytest.importorskip("jsonschema")
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(config)
