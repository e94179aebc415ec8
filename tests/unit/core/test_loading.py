"""Code of the user's that cannot be imported: one short error, whatever it does at its import."""

import subprocess
import sys

import pytest

from tandem.engine.core.loading import load_object


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
    with pytest.raises(ValueError, match=r"cannot be imported: .*'nowhere_at_all'.*inner.py:1"):
        load_object("hunted_package.inner:Mine", "method")
    with pytest.raises(ValueError, match=r"no module named 'hunted_package.other'; for a file"):
        load_object("hunted_package.other:Mine", "method")
    with pytest.raises(ValueError, match="hunted_package has no 'Mine'"):
        load_object("hunted_package:Mine", "method")


@pytest.mark.parametrize("module", ["sys", "math", "random"])
def test_modules_of_python(module):
    with pytest.raises(ValueError, match="has no 'Mine'"):
        load_object(f"{module}:Mine", "method")


NOTEBOOK = """
import sys
import __main__
from dataclasses import dataclass
from tandem.algorithms.base import Method
from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load

del __main__.__file__       # a notebook has none

@dataclass
class Mine(Method):
    option: float = 1.0
    def rows(self, batch): ...
    def terms(self, batch): ...

print(load(sys.argv[1], ["mode=inline"]).method)
try:
    load(sys.argv[1], ["mode=cluster"])
except ConfigError as error:
    print(error)
"""


@pytest.mark.whole_run
def test_a_class_of_the_script_or_notebook_that_runs(tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    (tmp_path / "config.yaml").write_text("""
model: {path: "tandem:tiny"}
data: {prompts: {path: "task:sort"}}
method: {name: "__main__:Mine", option: 2.0}
reward: {functions: [exact]}
""")
    command = [sys.executable, str(tmp_path / "notebook.py"), str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "{'name': '__main__:Mine', 'option': 2.0}" in done.stdout, done.stderr
    assert "which the processes of mode=cluster do not have" in done.stdout, done.stderr
