"""What other programs left in the environment does not reach a run's own processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.engine.config.schema import ClusterConfig, Config
from tandem.engine.core import hub
from tandem.engine.core.errors import ConfigError
from tandem.launch import variables

LEFT = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "10.9.9.9",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMI_SIZE": "4",
}
ELSEWHERE = {"RAY_ADDRESS": "10.9.9.9:6379", "VLLM_HOST_IP": "10.9.9.9", "VLLM_DP_SIZE": "2"}


@pytest.fixture
def left(monkeypatch):
    for name in list(os.environ):
        if name in variables.foreign(None):
            monkeypatch.delenv(name)
    for name, value in {**LEFT, **ELSEWHERE}.items():
        monkeypatch.setenv(name, value)


def test_variables_of_launchers_are_forgotten_and_named(left):
    line = variables.forget_foreign(Config())
    for name in {**LEFT, **ELSEWHERE}:
        assert name in line and name not in os.environ
    assert variables.forget_foreign(Config()) is None


def test_with_a_cluster_address_its_variables_are_the_users(left):
    config = replace(Config(), cluster=ClusterConfig(address="head:6379"))
    assert not set(ELSEWHERE) & set(variables.foreign(config))
    assert set(LEFT) <= set(variables.foreign(config))


@pytest.mark.whole_run
def test_an_inline_run_under_torchrun_trains(tmp_path):
    """Without the mend it waits for a master at 10.9.9.9."""
    command = [
        sys.executable,
        "-m",
        "tandem.launch.cli",
        "train",
        "tandem:inline_debug",
        "run.steps=1",
        "run.save_model=false",
        "data.evaluation=null",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **LEFT},
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "environment: not used:" in done.stdout and "MASTER_ADDR" in done.stdout


@pytest.fixture
def no_ray_folder(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


def test_a_long_folder_for_temporary_files_is_not_rays(no_ray_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("d" * 80)))
    assert variables.ray_folder() in ("/tmp/ray", "/dev/shm/ray")
    monkeypatch.setenv("TMPDIR", "/tmp/x")
    assert variables.ray_folder() == "/tmp/x/ray"


def test_a_relative_folder_for_temporary_files_is_made_absolute(no_ray_folder, in_tmp, monkeypatch):
    Path("t").mkdir()
    monkeypatch.setattr(variables, "SOCKET_PATH", 1000)
    monkeypatch.setenv("TMPDIR", "t")
    assert variables.ray_folder() == f"{in_tmp}/t/ray"
    assert variables.socket_env()["TMPDIR"] == f"{in_tmp}/t"


def test_no_folder_for_sockets_is_an_error_that_names_all(no_ray_folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/" + "d" * 80)
    monkeypatch.setattr(variables, "can_write", lambda folder: False)
    with pytest.raises(ConfigError) as caught:
        variables.ray_folder()
    for words in ("/tmp/dddd", "too long", "/tmp cannot be written", "set TMPDIR"):
        assert words in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://nowhere.invalid", "http://x:y"])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, endpoint):
    hub.unreachable.cache_clear()
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "cannot be reached" in hub.use_cache_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE is set" in hub.use_cache_if_unreachable()
    hub.unreachable.cache_clear()


@pytest.mark.whole_run
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run.name=\u00e9"], "bytes that are no ascii"),
        (['run={name: "\\u00e9"}'], "run.name is '\\xe9', which holds characters"),
        (['run.dir="\\u00e9"'], "run.dir is '\\xe9', which holds characters"),
    ],
)
def test_a_locale_that_cannot_write_a_name(tmp_path, arguments, words):
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [
        sys.executable,
        "-m",
        "tandem.launch.cli",
        "train",
        "tandem:inline_debug",
        *arguments,
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=100)
    assert done.returncode == 2 and words in done.stderr.decode("ascii")
    assert b"PYTHONUTF8=1" in done.stderr


def test_doctor_tells_what_a_run_will_not_use(left, in_tmp, monkeypatch):
    from tandem.launch import doctor

    monkeypatch.setattr(variables, "can_write", lambda folder: folder == "/tmp")
    checks = {name: (state, detail) for state, name, detail in doctor.surroundings(None)}
    assert checks["environment"][0] == doctor.WARN and "MASTER_ADDR" in checks["environment"][1]
    assert checks["sockets"] == (doctor.OK, "in /tmp/ray")
    assert checks["home"][0] == doctor.WARN
    monkeypatch.setattr(variables, "can_write", lambda folder: False)
    checks = {name: (state, detail) for state, name, detail in doctor.surroundings(None)}
    assert checks["sockets"][0] == doctor.BAD
