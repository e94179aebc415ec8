"""Text from outside (columns, ids, messages) can neither stop a run that writes it nor make its
files unreadable or huge.
"""

import datetime
import io
import json

import numpy as np
import pytest

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import read_jsonl
from tandem.engine.core.foreign import COLUMN_CHARACTERS, MESSAGE_CHARACTERS, message, text_of
from tandem.engine.core.types import (
    Finish,
    Prompt,
    RewardError,
    RewardOutcome,
    ScoredGroup,
    Trajectory,
)
from tandem.engine.data.row_ids import row_id
from tandem.engine.report.lines import plain_columns, write_line
from tandem.engine.report.telemetry import Telemetry
from tandem.rollout.backends.replay import RecordedPrompts


class Mute:
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def nested(depth: int) -> list:
    value = ["end"]
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = {
    "half an emoji": "note: \ud83d",
    "other half": "\udc00\ud800",
    "surrogate escape of a byte": b"caf\xe9".decode("utf-8", "surrogateescape"),
    "null": "a\x00b",
    "control": "\x1b[2J\x07\r\u2028\u2029\x85",
    "in a list": ["\ud83d", {"\ud83d": "\udfff"}],
    "array": np.array(["\ud83d", "b"]),
    "objects": np.array([None, "\ud83d"], object),
    "complex": np.array([1 + 2j]),
    "dates": np.array(["2026-01-01"], "datetime64[D]"),
    "date": datetime.date(2026, 1, 1),
    "set": {"\ud83d"},
    "mute": Mute(),
    "mute in a list": [Mute()],
    "long integer": 7**9000,
    "deep": nested(500),
    "bytes": b"\xff\x00",
    "long": "x" * 3_000_000,
    "long list": list(range(200_000)),
    "long bytes": bytes(500_000),
    "long surrogates": "\ud83d" * 300_000,
    "\ud83d" * 1000: "a name",
    7: "a number for a name",
}


def group(columns, prompt_id="p", error=None, text="t") -> ScoredGroup:
    prompt = Prompt(prompt_id, np.array([3], np.int32), "say \ud83d", columns)
    trajectory = Trajectory(
        prompt_id, np.array([3, 4], np.int32), np.array([0, 1], np.int8), Finish.STOP
    )
    outcome = RewardOutcome(None, {}, error) if error else RewardOutcome(1.0, {"exact": 1.0})
    return ScoredGroup(
        0, prompt, (trajectory,) * 3, np.ones(3, np.float32), (outcome,) * 3, (text,) * 3
    )


def strict(data: bytes) -> dict:
    """JSON as a strict reader takes it: valid UTF-8, and no half surrogate pairs in it."""
    record = json.loads(
        data.decode("utf-8"), parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
    )
    json.dumps(record, ensure_ascii=False).encode("utf-8")
    return record


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_any_column_can_be_written_and_read_again(tmp_path, name):
    run = Telemetry(Config(), tmp_path)
    run.rollouts(0, [group({name: HOSTILE[name], "answer": "4"})], 0)
    run.event("engines_restarted", reason=HOSTILE[name])
    run.close()
    lines = (tmp_path / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    for line in lines:
        record = strict(line)
        assert record["columns"]["answer"] == "4" and len(record["columns"]) == 2
        assert len(line) < 6 * COLUMN_CHARACTERS + 10_000
    assert len(list(read_jsonl(tmp_path / "rollouts.jsonl"))) == 3
    for line in (tmp_path / "events.jsonl").read_bytes().splitlines():
        strict(line)


def test_columns_that_fit_are_written_as_they_are():
    whole = {
        "answer": "4",
        "text": "x" * COLUMN_CHARACTERS,
        "list": [1, 2.5, None, "ü"],
        "nothing": None,
        "yes": True,
    }
    assert plain_columns(whole) == (whole, [])


def test_a_cut_column_says_so_and_is_named():
    record, shortened = plain_columns(
        {"tests": "x" * 100_000, "list": ["y"] * 100_000, "answer": "4"}
    )
    assert shortened == ["tests", "list"] and record["answer"] == "4"
    assert record["tests"].endswith("x [cut: 65536 of 100000 characters]")
    assert record["list"].startswith('["y","y"')


def test_rewards_never_judge_by_a_column_that_was_recorded_in_part(tmp_path):
    run = Telemetry(Config(), tmp_path)
    run.rollouts(0, [group({"answer": "4", "tests": "x" * 100_000})], 0)
    run.close()
    with pytest.raises(ConfigError, match=r"the columns tests were too long.*set data.prompts"):
        RecordedPrompts(tmp_path / "rollouts.jsonl")


@pytest.mark.parametrize(
    "text",
    ["y" * 3_000_000, "\ud83d" * 3_000_000, "\x00" * 3_000_000, "short \ud83d\x1b[31m"],
    ids=lambda text: ascii(text[:8]),
)
def test_messages_are_short_valid_and_harmless_to_a_terminal(tmp_path, text):
    shown = message(text)
    assert len(shown) <= 6 * MESSAGE_CHARACTERS + 60
    assert shown.encode("utf-8").isascii()
    assert "\x1b" not in shown and "\x00" not in shown
    run = Telemetry(Config(), tmp_path)
    run.event("engines_restarted", reason=text)
    run.close()
    _, line = read_jsonl(tmp_path / "events.jsonl")  # the first is of the start
    assert line["reason"] == shown


def test_objects_without_a_text_have_one_here():
    assert "RuntimeError" in text_of(Mute())


@pytest.mark.parametrize(
    "given, found",
    [
        (None, "rows.jsonl:3"),
        (7, "7"),
        ("q-1", "q-1"),
        ("id \ud83d\x00", "id \\ud83d\\x00"),
        ("z" * 20_000, "rows.jsonl:3"),
        (Mute(), "<Mute without a text: its __str__ raised RuntimeError>"),
    ],
)
def test_ids_of_rows_are_short_and_valid(given, found):
    assert row_id({"id": given}, "rows.jsonl:3") == found


def test_an_error_of_a_reward_is_written_with_its_sample():
    file = io.StringIO()
    error = RewardError("exception", message("ValueError: \ud83d"), "score")
    write_line(file, {"error": vars(error), "text": "\ud83d"})
    assert strict(file.getvalue().encode("utf-8"))["error"]["message"] == "ValueError: \\ud83d"
