"""What README and docs call by name is there: files, and `file.py:name` in files."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TOP = "engine|algorithms|rollout|launch|configs|tests|benchmarks|docs|requirements"
# a file or a folder, then perhaps a name in it: `engine/loop/train.py:train`, `docs/examples/`
NAMED = re.compile(rf"`((?:{TOP})/(?:[\w./-]+\.\w+|[\w/-]*/))(?::([\w.]+))?`")
PLACEHOLDER = re.compile(r"NAME|_N\b")


@cache
def names_in(file: Path) -> set[str]:
    """Functions, classes, methods (`Class.method`) and constants of a module."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        found |= own_names(node)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                found |= {f"{node.name}.{name}" for name in own_names(inner)}
    return found


def own_names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_are_there(page):
    missing = []
    for path, name in NAMED.findall((ROOT / page).read_text()):
        if PLACEHOLDER.search(path):
            continue
        if not (ROOT / path).exists():
            missing.append(path)
        elif name and name not in names_in(ROOT / path):
            missing.append(f"{path}:{name}")
    assert not missing
