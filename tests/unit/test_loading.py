"""Code of the user's that cannot be imported: one short error, whatever it does at its import."""

import pytest

from tandem.engine.loading import load_object


@pytest.mark.parametrize(
    "code, words",
    [
        ("import sys\nsys.exit(0)", r"cannot be imported: SystemExit: 0 \(.*mine.py:2\)"),
        ("raise ValueError('no')", r"cannot be imported: ValueError: no \(.*mine.py:1\)"),
        ("import nowhere", "No module named 'nowhere'"),
        ("def f(:", "SyntaxError"),
        ("from .other import x", "named by its package: package.module:Name"),
        ("X = 1", "mine.py has no 'Mine'"),
    ],
)
def test_files(code, words, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(ValueError, match=words):
        load_object(f"{path}:Mine", "method")


def test_a_long_error_is_cut(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise ValueError('x' * 100_000)")
    with pytest.raises(ValueError) as caught:
        load_object(f"{path}:Mine", "method")
    assert len(str(caught.value)) < 2000


def test_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "hunted_package"
    package.mkdir()
    (package / "inner.py").write_text("import nowhere_at_all")
    with pytest.raises(ValueError, match="cannot be imported: .*'nowhere_at_all'.*inner.py:1"):
        load_object("hunted_package.inner:Mine", "method")
    with pytest.raises(ValueError, match="no module named 'hunted_package.other'; for a file"):
        load_object("hunted_package.other:Mine", "method")
    with pytest.raises(ValueError, match="hunted_package has no 'Mine'"):
        load_object("hunted_package:Mine", "method")


@pytest.mark.parametrize("module", ["sys", "math", "random"])
def test_modules_of_python(module):
    with pytest.raises(ValueError, match="has no 'Mine'"):
        load_object(f"{module}:Mine", "method")
