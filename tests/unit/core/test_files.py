"""Files of a run folder in the states that crashes, power cuts and full disks leave them in."""

import json
import os

import pytest

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import (
    TornFile,
    cut_jsonl,
    end_last_line,
    read_json,
    read_jsonl,
    scan_jsonl,
    write_atomic,
)
from tandem.engine.report.telemetry import Telemetry

BAD_LINES = [
    b"\0" * 8,
    b"garbage",
    b'{"step":1',
    b'{"step":1}{"step":2}',
    b"\xff\xfe",
    b"[1, 2]",
    b"7",
    b"",
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'[{"time": "2', b"\xff\xfe[]", b"nothing"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(TornFile, match=r"state.json is damaged"):
        read_json(tmp_path / "state.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with monkeypatch.context() as patch:

        def full(fd):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomic(path, b"new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_damaged_lines_are_left_out_and_told_with_file_and_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n' + bad + b'\n{"step":2}\n{"ste')
    told = []
    assert list(read_jsonl(path, told.append)) == [{"step": 0}, {"step": 2}]
    (line,) = told
    assert line.startswith(f"{path}:2: ") and len(line) < len(str(path)) + 200
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2"):
        list(read_jsonl(path))


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("end", [b"", b'{"step":3', b"\0\0\0", b"\0\0\0\n"])
def test_cut_moves_damaged_lines_aside(tmp_path, bad, end):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"step":0}\n' + bad + b'\n{"step":1}\n{"step":2}\n' + end)
    cut_jsonl(path, lambda line: "step" in line, lambda line: line["step"] > 1, lambda text: None)
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n'
    assert (tmp_path / "rollouts.jsonl.damaged").read_bytes() == bad + b"\n"
    assert len(os.listdir(tmp_path)) == 2


def test_what_is_appended_stands_apart_from_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    end_last_line(path)
    assert not path.exists()
    path.write_bytes(b'{"kind":"a"}\n{"ki')
    end_last_line(path)
    with open(path, "a") as file:
        file.write('{"kind":"b"}\n')
    assert [line.record for line in scan_jsonl(path)] == [{"kind": "a"}, None, {"kind": "b"}]


@pytest.mark.parametrize("content", [b"", b"[{", b"\0" * 40, b"{}"])
def test_a_damaged_environment_file_is_put_aside(tmp_path, content):
    told = []
    (tmp_path / "environment.json").write_bytes(content)
    Telemetry(Config(), tmp_path, 0, told.append).close()
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    assert (tmp_path / "environment.json.damaged_1").read_bytes() == content
    assert len(told) == 1 and "environment.json" in told[0]


def test_numbers_that_are_lost_are_counted(tmp_path):
    run = Telemetry(Config(), tmp_path)
    for step in range(4):
        run.step(step, {"loss": 1.0})
    run.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0] + b'{"step":null}\n' + lines[2] + lines[3])
    told = []
    Telemetry(Config(), tmp_path, 3, told.append).close()
    assert (
        "metrics.jsonl:2" in told[0]
        and "lacks the numbers of 1 of the 3 steps" in told[1]
        and len(told) == 2
    )
