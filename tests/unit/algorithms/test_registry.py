"""Methods by name: those that come with Tandem by listing its folders, those of other packages by
entry point.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tandem.algorithms import registry
from tandem.algorithms.registry import METHODS, make_method, method_class
from tandem.engine.core.errors import ConfigError
from tandem.launch import cli
from tandem.launch.check_config import load

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "method_package"
TINY = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "reward": {"functions": ["exact"]},
    "data": {"prompts": {"path": "task:sort", "options": {"digits": 3}}},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4, "max_tokens": 5},
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path; `packages(name, entry_points)` puts a distribution into it."""
    monkeypatch.syspath_prepend(tmp_path)
    registry.installed.cache_clear()

    def add(name, **points):
        info = tmp_path / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        lines = [f"{method} = {value}" for method, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[tandem.methods]", *lines]))
        return tmp_path

    yield add
    registry.installed.cache_clear()


def test_every_file_of_a_family_is_a_method():
    found = set()
    for family in (ROOT / "algorithms").iterdir():
        if family.name not in registry.NOT_FAMILIES:
            found |= {path.stem for path in family.glob("[a-z]*.py")}
    assert found == set(METHODS) and len(found) >= 21
    for name, family in METHODS.items():
        assert method_class(name).__module__ == f"tandem.algorithms.{family}.{name}"


def test_names_are_listed_without_importing_a_method():
    code = (
        "import sys; from tandem.algorithms.registry import METHODS; assert len(METHODS) >= 21\n"
        "families = {f'tandem.algorithms.{f}' for f in METHODS.values()}\n"
        "sys.exit(str(sorted(m for m in sys.modules if m.rpartition('.')[0] in families)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("classes, words", [("", "defines none"), ("One Two", "defines One, Two")])
def test_a_file_with_another_number_of_methods_is_an_error(classes, words, packages):
    body = "".join(f"class {name}(Method): pass\n" for name in classes.split())
    folder = packages("other")
    (folder / "file_of_methods.py").write_text(f"from tandem.algorithms.base import Method\n{body}")
    with pytest.raises(ValueError, match=f"{words}; expected exactly one class"):
        registry.only_class("file_of_methods")
    del sys.modules["file_of_methods"]


@pytest.mark.whole_run
def test_an_installed_package_trains_under_its_name(tmp_path):
    """The example package, by pip and without a network; then one step by the command line."""
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source)  # pip builds in place
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--disable-pip-version-check", "--target", str(target), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    config = {
        **TINY,
        "method": {"name": "best_of_group"},
        "run": {"steps": 1, "save_model": False, "dir": str(tmp_path)},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def tandem(*words):
        paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "tandem.launch.cli", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)

    done = tandem("train", "c.yaml", "method.margin=-1")
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss/best"] > 0
    listed = tandem("methods").stdout
    assert "from other packages:\n  best_of_group" in listed
    assert "arXiv 2304.06767   tandem-best-of-group 0.1.0" in listed
    refused = tandem("train", "c.yaml", "method.margn=1")
    assert refused.returncode == 2 and "did you mean 'margin'" in refused.stderr


def config_error(tmp_path, name):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**TINY, "method": {"name": name}}))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    return str(caught.value)


def test_an_entry_point_that_is_broken_names_its_package(packages):
    folder = packages(
        "broken-methods",
        absent="no_such_module_at_all:Mine",
        raising="raising_module:Mine",
        other="json:JSONDecoder",
        function="json:dumps",
        bare="json",
    )
    (folder / "raising_module.py").write_text("raise RuntimeError('no luck')")
    owner = "of the installed package broken-methods 1.5"
    for name, words in {
        "absent": "no module named 'no_such_module_at_all'",
        "raising": "RuntimeError: no luck",
        "other": "JSONDecoder'>; expected a dataclass that inherits",
        "function": "expected a dataclass that inherits",
        "bare": "package.module:Name",
    }.items():
        message = config_error(folder, name)
        assert owner in message and words in message, message
    assert make_method("sft", {}), "a package that is not asked for breaks nothing"


def test_a_name_that_is_taken_is_refused(packages):
    packages("first-methods", sft="json:dumps", mine="json:dumps")
    folder = packages("second-methods", mine="json:dumps")
    message = config_error(folder, "sft")
    assert "'sft' is there more than once, from Tandem itself and first-methods 1.5" in message
    message = config_error(folder, "mine")
    assert "first-methods 1.5" in message and "second-methods 1.5" in message


def test_methods_lists_what_is_broken_beside_the_others(packages, capsys):
    packages("broken-methods", absent="no_such_module_at_all:Mine")
    assert cli.main(["methods"]) == 1
    out = capsys.readouterr().out
    assert "absent         cannot be loaded: method 'absent' of the installed package" in out
    assert "hybrid:\n  carft " in out and "\nstaged:\n" in out


def test_a_misspelt_name_may_be_an_installed_one(packages):
    folder = packages("more-methods", best_of_all="json:dumps")
    assert "did you mean 'best_of_all'" in config_error(folder, "best_of_al")


def test_a_policy_that_was_never_read_is_an_error(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.rl.grpo import GRPO\n"
        "@dataclass\nclass Mine(GRPO):\n    def __post_init__(self):\n        self.seen = 0\n"
    )
    with pytest.raises(ValueError, match=r"begin that with super\(\).__post_init__\(\)"):
        make_method(f"{tmp_path}/mine.py:Mine", {})


def test_the_former_name_of_prompts_from_experts_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.rl.grpo import GRPO\n"
        "@dataclass\nclass Mine(GRPO):\n    aligned = True\n"
    )
    with pytest.raises(ValueError, match="called prompts_from_experts now"):
        method_class(f"{tmp_path}/mine.py:Mine")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def rows(self, batch): return []", "Mine has no `terms`, which every method needs"),
        ("def terms(self, batch): return []", "Mine has no `rows`"),
        (
            "def rows(self): return []\n    def terms(self, batch): return []",
            r"Mine.rows is defined as rows\(self\), but is called with \(self, batch\)",
        ),
        (
            "def rows(self, batch): return []\n    def terms(self, batch): return []\n"
            "    def commit(self, step): pass",
            r"Mine.commit is defined as commit\(self, step\), but is called with "
            r"\(self, step, demand, signals\)",
        ),
        (
            "def rows(self, batch): return []\n    def terms(self, batch): return []\n"
            "    def again(self, group, wave): pass",
            r"Mine.again .* is called with \(self, group, wave, request, budget\)",
        ),
        (
            "def rows(self, batch): return []\n    def terms(self, batch): return []\n"
            "    def score(self): pass",
            r"Mine.score .* is called with \(self, batch\)",
        ),
        (
            "def rows(self, batch): return []\n    def terms(self, batch): return []\n"
            "    def probes(self): pass",
            r"Mine.probes .* is called with \(self, batch\)",
        ),
    ],
)
def test_a_method_that_the_run_could_not_call_is_refused_when_it_is_read(tmp_path, body, words):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom tandem import Method\n\n\n"
        f"@dataclass\nclass Mine(Method):\n    {body}\n"
    )
    with pytest.raises(ConfigError, match=words):
        load("tandem:inline_debug", [f"method={{name: '{file}:Mine'}}"])
