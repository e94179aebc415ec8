"""What a config file may hold: bombs end at once, and nothing silently becomes another type."""

import pytest

from tandem.engine.config import yaml_reader
from tandem.engine.config.yaml_reader import YamlError, decode, read
from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load

BOMB = (
    "{a: &a [x,x,x,x,x,x,x,x,x,x]"
    + "".join(
        f", {b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=False)
    )
    + "}"
)
CHAIN = "{a0: &a0 [x]" + "".join(f", a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000)) + "}"
BASE = (
    "mode: inline\nmodel: {path: 'tandem:tiny'}\nmethod: {name: grpo}\n"
    "data: {prompts: {path: 'task:sort'}}\n"
)


@pytest.mark.parametrize(
    "text, words",
    [
        (BOMB, "more than 50000 values"),
        (CHAIN, "nested more than 50 deep"),
        ("{a: &a [x, *a]}", "holds itself"),
        ("&a {b: {c: *a}}", "holds itself"),
        ("&a {<<: *a, b: 1}", "holds itself"),
        ("&a {<<: [*a], b: 1}", "holds itself"),
        ("[" * 3000 + "]" * 3000, "nested more than 50 deep"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 deep"),
        ("- " * 3000 + "1", "nested more than 50 deep"),
        ("[" * 500_000, "nested more than 50 deep"),
        ("a: " + "x" * (1 << 20), "at most 1048576"),
        ("[" + "1," * 110_000 + "]", "more than 50000 values"),
        ("a: !!python/object/apply:os.system ['true']", "the tag !!python/object/apply:os.system"),
        ("a: !!binary aGk=", "the tag !!binary"),
        ("a: !mine {b: 1}", "the tag !mine"),
        ("!!set {a}", "the tag !!set"),
        ("a: 1\n---\nb: 2", "a second document (line 2"),
        ("a: 1\n\tb: 2", "use spaces"),
        ("a: \0", "a NUL byte in line 1"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("a: 2026-11-25", "a: found '2026-11-25' (line 1, column 4), which YAML reads as a date"),
        ("a: [2026-11-25 10:00:00]", "a[0]: found '2026-11-25 10:00:00'"),
        ("a: 2026-99-99", "reads as a date"),
        ("a: 010", "reads as octal"),
        ("a: -0_17", "reads as octal"),
        ("a: 1:30", "base 60"),
        ("a: 1:30.5", "base 60"),
        ("a: {no: 1}", "the key 'no' is false to YAML"),
        ("null: 1", "the key 'null' is null"),
        ("2026-11-25: 1", "reads as a date"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ("a: " + "9" * 5000, "which is no int"),
        ("a: !!int x", "which is no int"),
        ("a: !!bool x", "which is no bool"),
        ("<<: 3", "no mapping"),
        ("a: *nobody", "undefined alias"),
    ],
)
def test_refused_in_a_file_and_on_the_command_line(tmp_path, text, words):
    with pytest.raises(YamlError) as caught:
        read(text)
    assert words in str(caught.value) and len(str(caught.value)) < 1000
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    with pytest.raises(ConfigError, match=r"override .method.x="):
        load(path, [f"method.x={text}"])
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config .*c.yaml"):
        load(path)


@pytest.mark.parametrize(
    "data, words",
    [
        ("a: 1".encode("utf-16"), "UTF-16"),
        (b"a: 1\nb: \xe9", "byte 0xe9 in line 2"),
        (b"#" * (1 << 21), "2097152 bytes"),
    ],
)
def test_files_that_are_no_text(data, words):
    with pytest.raises(YamlError, match=words):
        decode(data)


def test_what_is_plain_is_read():
    text = decode(
        b"\xef\xbb\xbf"
        + b"""
base: &base {a: 1, b: [x, 1_000, 0x1F, -1.5e+3, .inf, true, ~, '010', "no", 2026-11]}
more: {<<: *base, a: 2, 7: seven}
first: {<<: [{a: 1}, {a: 2, c: 3}]}
same: [*base, *base]
"""
    )
    found = read(text).value
    numbers = ["x", 1000, 31, -1500.0, float("inf"), True, None, "010", "no", "2026-11"]
    assert found["base"] == {"a": 1, "b": numbers}
    assert found["more"] == {"a": 2, "b": numbers, 7: "seven"}
    assert found["first"] == {"a": 1, "c": 3}
    found["same"][0]["a"] = 9
    assert found["same"][1]["a"] == 1  # an alias is a copy
    assert read("").value is None


def test_the_bomb_is_measured_without_being_unfolded(monkeypatch):
    """Reader.value would run 10^9 times."""

    def never(*_):
        raise AssertionError("a value was made")

    monkeypatch.setattr(yaml_reader.Reader, "value", never)
    with pytest.raises(YamlError):
        read(BOMB)


@pytest.mark.parametrize(
    "change, words",
    [
        ("run.name=no", "run.name: found no, which YAML reads as false, expected text"),
        ("run.name=1_000", "run.name: found 1_000, which YAML reads as a number"),
        ("run.name=1.10", "put text in quotes: '1.10'"),
        ("run={name: On}", "run.name: found On"),
        ("reward.functions=[exact, off]", "reward.functions[1]: found off"),
        ("model.tokenizer=0x10", "model.tokenizer: found 0x10"),
        ("model.dtype=yes", "expected one of float32, bfloat16"),
        ("reward.options={exact: {lang: no}}", "reward.options.exact.lang: found no"),
        ("data.prompts.options.lang=no", "data.prompts.options.lang: found no"),
    ],
)
def test_words_that_yaml_turns_into_something_else(tmp_path, change, words):
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load(path, ["reward.functions=[exact]", change])
    assert words in str(caught.value) and "on the command line" in str(caught.value)


def test_an_override_replaces_what_the_file_had_wrong(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "run: {name: no, save_model: no}\nreward: {functions: [exact]}\n")
    config = load(path, ["run.name='no'", f"run.seed={2**53 + 1}"])
    assert (config.run.name, config.run.save_model, config.run.seed) == ("no", False, 2**53 + 1)
    assert load(path, ["run={name: x}"]).run.name == "x"
    with pytest.raises(ConfigError, match=r"in .*c.yaml"):
        load(path)


@pytest.mark.parametrize(
    "override",
    [
        ".".join("a" * 5000) + "=1",
        "run.steps." + ".".join("a" * 5000) + "=1",
        "run.steps=1e999",
        "run.steps=" + "9" * 400,
        "run.name=[" + "1," * 10_000 + "]",
        "run." + "x" * 100_000 + "=1",
    ],
)
def test_huge_keys_and_values_are_one_screen(tmp_path, override):
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load(path, ["reward.functions=[exact]", override])
    if override != "run.steps=" + "9" * 400:
        assert len(str(caught.value)) < 2500


def test_bytes_that_are_no_utf_8(tmp_path):
    """In a file; and on the command line, where Python keeps them as lone surrogates."""
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8: byte 0xff in line 1"):
        load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("mode: inline\n")
    with pytest.raises(ConfigError, match="no utf-8"):
        load(tmp_path / "c.yaml", ["method.x=a: \udcff"])
