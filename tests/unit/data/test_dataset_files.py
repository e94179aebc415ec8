"""Files and folders of datasets: what is unlike, torn or of another kind is named."""

import gzip
import json
from pathlib import Path

import pytest

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.data.rows import open_rows
from tandem.engine.data.sources import ExpertSource
from tandem.engine.model.tiny import make_tiny

ROWS = [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(4)]
CHAT = {"prompt": [{"role": "user", "content": "2+2="}], "response": "4"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, rows) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path, **settings) -> list[dict]:
    rows = open_rows(DatasetConfig(path=str(path), response="response", **settings))
    return [rows[number] for number in range(len(rows))]


def refusal(path: Path, **settings) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, **settings)
    return str(error.value)


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_bom(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())


@pytest.mark.parametrize(
    "name, write",
    [
        ("r.jsonl.gz", write_gz),
        ("list.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
        ("lines.json", lambda path: jsonl(path, ROWS)),
        ("bom.json", write_bom),
        ("folder/a.jsonl", lambda path: jsonl(path, ROWS)),
        ("parts.parquet/part-0.parquet", lambda path: parquet(path, ROWS)),
    ],
)
def test_kinds_of_files_that_give_the_same_rows(name, write, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write(path)
    assert read(tmp_path / Path(name).parts[0]) == ROWS


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("nul.jsonl", b"\0" * 100, [":1", "not valid JSON"]),
        (
            "deep.jsonl",
            b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            [":1", "nested too deeply"],
        ),
        ("deep.json", b"[" * 100_000, ["nested too deeply"]),
        ("utf16.jsonl", json.dumps(ROWS[0]).encode("utf-16") + b"\n", [":1", "not valid JSON"]),
        ("cut.json", b'[{"prompt": "a"},', ["not valid JSON", "a list of JSON objects"]),
        ("numbers.json", b'[{"prompt": "a"}, 3]', [":2", "found int"]),
        ("cut.jsonl.gz", gzip.compress(b"x" * 1000)[:20], ["cut.jsonl.gz", "cannot be read"]),
        ("no.jsonl.gz", b"hello", ["no.jsonl.gz", "cannot be read"]),
        ("r.csv", b"prompt,response\na,b\n", ["path: csv", "data_files: r.csv"]),
    ],
)
def test_files_that_are_no_rows_are_named(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    found = refusal(tmp_path / name)
    assert all(word in found for word in [name, *words]), found


def test_folders_of_unlike_files_are_refused(tmp_path):
    for name in ("columns", "types", "kinds", "torn", "lists", "notes"):
        jsonl(tmp_path / name / "a.jsonl", ROWS)
    jsonl(tmp_path / "columns" / "b.jsonl", [{"question": "x", "answer": "y"}])
    found = refusal(tmp_path / "columns")
    assert "a.jsonl has the columns prompt, response, b.jsonl has question, answer" in found
    jsonl(tmp_path / "types" / "b.jsonl", [CHAT])
    assert "'prompt' is str in a.jsonl, list in b.jsonl" in refusal(tmp_path / "types")
    parquet(tmp_path / "kinds" / "b.parquet", ROWS)
    assert "JSON (a.jsonl), Parquet (b.parquet)" in refusal(tmp_path / "kinds")
    assert read(tmp_path / "kinds", options={"data_files": "*.jsonl"}) == ROWS
    (tmp_path / "torn" / "b.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"pro')
    assert "b.jsonl:2: not valid JSON" in refusal(tmp_path / "torn")
    (tmp_path / "lists" / "b.jsonl").write_text("[1, 2]\n")
    assert "b.jsonl:1: expected a JSON object" in refusal(tmp_path / "lists")
    (tmp_path / "notes" / "README.md").write_text("# Rows\n")
    (tmp_path / "notes" / "LICENSE.txt").write_text("yours\n")
    (tmp_path / "notes" / ".DS_Store").write_text("x")
    assert read(tmp_path / "notes") == ROWS


@pytest.mark.parametrize("options", [{"streaming": True}, {"streaming": True, "split": "train"}])
def test_streamed_datasets_are_refused(options, tmp_path):
    jsonl(tmp_path / "rows" / "a.jsonl", ROWS)
    assert "options.streaming" in refusal(tmp_path / "rows", options=options)


def test_a_split_that_was_saved_alone_is_not_another_one(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(ROWS, split="test")
    one.save_to_disk(str(tmp_path / "one"))
    found = refusal(tmp_path / "one")
    assert "'test' alone" in found and "split: test" in found
    assert read(tmp_path / "one", split="test") == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "nameless"))
    assert read(tmp_path / "nameless") == ROWS
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "all"))
    assert "no split 'test'" in refusal(tmp_path / "all", split="test")


def test_a_row_that_cannot_be_decoded_is_named(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)

    def decode(batch):
        if batch["prompt"] == ["2+2="]:
            raise RuntimeError("no decoder")
        return batch

    rows.set_transform(decode)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    (tmp_path / "rows").mkdir()
    found = open_rows(DatasetConfig(path=str(tmp_path / "rows"), options={"data_files": "x"}))
    assert len(found) == 4 and found[1]
    with pytest.raises(ConfigError, match=r":2: .*no decoder"):
        found[2]


def test_rows_far_behind_are_counted_together_and_found(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr("tandem.engine.data.sources.TOKENISED_ROWS", 1)
    monkeypatch.setattr("tandem.engine.data.sources.BATCH_CHARACTERS", 600)
    model = ModelConfig(path=str(make_tiny(tmp_path / "tiny", hidden=32, layers=1)))
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    long = [3, 50, 90, 70, 3, 200, 99, 5]  # of é: more bytes than tokens
    path = jsonl(tmp_path / "r.jsonl", [{"prompt": "é" * n, "response": "2"} for n in long])
    data = DataConfig(max_prompt_tokens=100, shuffle=False, overlong="drop")
    source = ExpertSource(
        DatasetConfig(path=str(path), response="response"), data, tokenizer, model, 0
    )
    assert [len(t.tokens) - 3 for t in source.take(7)] == [3, 50, 90, 70, 3, 99, 5]
    assert source.dropped == 1 and "r.jsonl:6" in next(source.describe())
