"""Configs that come with the package: named, listed, and really in the wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tandem.engine.config.config_file import packaged
from tandem.engine.core.errors import ConfigError
from tandem.launch import cli
from tandem.launch.check_config import load

ROOT = Path(__file__).parents[3]


def test_every_packaged_config_is_listed_with_a_line_about_it(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted((ROOT / "configs").rglob("[!_]*.yaml"))
    assert len(lines) == len(files) == len(packaged())
    for line in lines:
        name, text = line.split(maxsplit=1)
        assert name.startswith("tandem:") and len(text) > 20 and ":" not in name[7:]


@pytest.mark.parametrize("name", ["demo", "methods/chord_mu", "paper/luffy", "cluster/two_nodes"])
def test_a_packaged_config_is_loaded_by_name_from_anywhere(in_tmp, name):
    config = load(f"tandem:{name}", ["run.steps=3"])
    assert config.run.steps == 3 and config.run.dir == str(in_tmp / "runs")


@pytest.mark.parametrize("command", [["train"], ["eval"], ["check-logprobs"], ["doctor"]])
def test_a_typo_is_named_by_every_command(in_tmp, capsys, command):
    assert cli.main([*command, "tandem:methods/chord_um"]) == 2
    assert "did you mean 'methods/chord_mu'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["tandem:", "tandem:../README", "tandem:demo.yaml", "tandem:/etc/x"]
)
def test_what_is_no_packaged_config(name):
    with pytest.raises(ConfigError, match="no such config comes with the package"):
        load(name)


@pytest.mark.whole_run
def test_the_wheel_holds_them(tmp_path):
    """setuptools alone, in a copy, without isolation: no network is needed."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs"):
        (source / name).symlink_to(ROOT / name)
    for name in ("engine", "algorithms", "rollout", "launch"):
        (source / name).symlink_to(ROOT / name)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = zipfile.ZipFile(next(source.glob("*.whl"))).namelist()
    for path in (ROOT / "configs").rglob("*.yaml"):  # bases too
        assert f"tandem/{path.relative_to(ROOT)}" in names
    for room in ("engine", "algorithms", "rollout"):
        for path in (ROOT / room).rglob("*.py"):
            assert f"tandem/{path.relative_to(ROOT)}" in names, "add its folder to pyproject.toml"
    assert "tandem/launch/papers.yaml" in names
