"""`import tandem`: every name of the public face resolves, and the import itself loads nothing."""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tandem

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", tandem.__all__)
def test_every_name_resolves(name):
    assert getattr(tandem, name) is not None
    assert name in dir(tandem)


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        tandem.trian  # noqa: B018  the access itself is the test


def test_the_import_loads_nothing_heavy():
    code = "import sys, tandem; print(tandem.__version__, len(sys.modules))\n"
    code += "heavy = {'torch', 'numpy', 'yaml', 'transformers', 'ray', 'vllm', 'pydantic'}\n"
    code += "print(sorted(heavy & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"


def imported_from_tandem(file: Path) -> set[tuple[str, str]]:
    """(module, name) of every `from tandem... import name`, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tandem"):
            found |= {(str(node.module), alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_a_benchmark_imports_is_there(name):
    """No test runs them, so a moved name would go unnoticed."""
    for module, attribute in sorted(imported_from_tandem(ROOT / "benchmarks" / name)):
        if not hasattr(import_module(module), attribute):
            import_module(f"{module}.{attribute}")


def test_a_path_is_no_config_and_a_text_is_no_list():
    with pytest.raises(TypeError, match=r"takes a Config, not 'c.yaml'; tandem.load\(path\)"):
        tandem.train("c.yaml")
    with pytest.raises(TypeError, match=r"a list of key=value texts, e.g. \['run.steps=1'\]"):
        tandem.load("tandem:inline_debug", "run.steps=1")
    with pytest.raises(TypeError, match="takes the path of a config"):
        tandem.load({"mode": "inline"})


def test_the_wheel_has_every_package():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(tomllib.loads(text)["tool"]["setuptools"]["packages"])
    for room in ("engine", "algorithms", "rollout", "launch"):
        for path in (ROOT / room).rglob("__init__.py"):
            name = ".".join(["tandem", *path.parent.relative_to(ROOT).parts])
            assert name in listed or name == "tandem.launch.tandem"  # installed as `tandem`
