"""Secrets are used in memory and written nowhere; ${NAME} stands for an environment variable."""

import pickle
from pathlib import Path

import pytest
import yaml

from tandem.engine.config import secrets
from tandem.engine.config.parse import to_dict
from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.resolve import resolve_model
from tandem.launch import cli
from tandem.launch.check_config import load
from tandem.launch.run import run

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "method": {"name": "grpo"},
    "data": {"prompts": {"path": "task:sort"}, "max_prompt_tokens": 32},
    "reward": {"functions": ["rw.py:judge"]},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 4},
    "run": {"name": "w", "steps": 1, "save_model": False},
}
JUDGE = """
def judge(completion, answer, *, api_key, headers=None):
    if api_key != "from-environment":
        raise ValueError(f"401: wrong key {api_key}")
    return 1.0
"""


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(secrets, "_known", {})


@pytest.fixture
def project(in_tmp, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "from-environment")
    monkeypatch.delenv("ABSENT", raising=False)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("rw.py").write_text(JUDGE)
    return in_tmp


def key(value: str) -> str:
    options = yaml.safe_dump({"rw.py:judge": {"api_key": value}}, default_flow_style=True)
    return f"reward.options={options.strip()}"


def key_in(config):
    return next(iter(config.reward.options.values()))["api_key"]


def found_below(folder: Path, secret: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_a_reference_has_the_value_and_is_written_as_itself(project):
    config = load("c.yaml", [key("Bearer ${JUDGE_KEY}")])
    assert key_in(config) == "Bearer from-environment"
    assert "from-environment" not in repr(config)
    assert "from-environment" not in yaml.safe_dump(to_dict(config))
    again = pickle.loads(pickle.dumps(config))
    assert again == config and key_in(again) == "Bearer from-environment"
    Path("again.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load("again.yaml") == config


@pytest.mark.parametrize(
    "where, found",
    [
        ("run.wandb=${JUDGE_KEY}", lambda c: c.run.wandb),
        ("model.system_prompt=say ${JUDGE_KEY}", lambda c: c.model.system_prompt),
        (
            "data.prompts.options={x: [{y: '${JUDGE_KEY}'}]}",
            lambda c: c.data.prompts.options["x"][0]["y"],
        ),
        ("run.dir=${JUDGE_KEY}/x", lambda c: c.run.dir),
        ("reward.environment=['${JUDGE_KEY}']", lambda c: c.reward.environment[0]),
    ],
)
def test_references_work_in_every_text(project, where, found):
    config = load("c.yaml", [where])
    assert "from-environment" in found(config)
    assert "from-environment" not in yaml.safe_dump(to_dict(config))


def test_numbers_may_come_from_the_environment_and_an_escape_stays(project, monkeypatch):
    monkeypatch.setenv("STEPS", "7")
    config = load("c.yaml", ["run.steps=${STEPS}", "model.system_prompt='$${ABSENT} $5 {x} ${'"])
    assert config.run.steps == 7 and config.model.system_prompt == "${ABSENT} $5 {x} ${"
    Path("again.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load("again.yaml") == config


def test_a_choice_from_the_environment_is_written_as_its_variable(project, monkeypatch):
    monkeypatch.setenv("MODE", "inline")
    config = load("c.yaml", ["mode=${MODE}"])
    assert config.mode == "inline" and to_dict(config)["mode"] == "${MODE}"


def test_a_template_of_a_task_keeps_its_dollars(project):
    options = "data.prompts.options={response: '${answer}$'}"
    assert load("c.yaml", [options]).data.prompts.options["response"] == "${answer}$"


@pytest.mark.parametrize(
    "text, words",
    [
        ("${ABSENT}", "the environment variable ABSENT is not set"),
        ("x${JUDGE_KEYS}", "did you mean 'JUDGE_KEY'"),
        ("${oc.env:JUDGE_KEY}", "expected ${NAME}"),
        ("${}", "expected ${NAME}"),
    ],
)
def test_a_reference_to_nothing_names_the_key(project, text, words):
    with pytest.raises(ConfigError) as caught:
        load("c.yaml", [key(text)])
    assert words in str(caught.value) and "api_key" in str(caught.value)
    assert "write $" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apikey",
        "API_KEY",
        "openai-api-key",
        "token",
        "auth",
        "hf_token",
        "password",
        "passwd",
        "secret",
        "client_secret",
        "Authorization",
        "credentials",
        "aws_secret_access_key",
    ],
)
def test_keys_of_secrets(name):
    assert secrets.hide({name: "abc"}) == {name: "<redacted>"}
    assert secrets.hide({"x": {name: {"deep": [1, "y"]}}}) == {
        "x": {name: {"deep": ["<redacted>", "<redacted>"]}}
    }


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokenizer",
        "token_weight",
        "token_budget",
        "tokens",
        "eos_token",
        "pad_token",
        "key",
        "author",
        "keyword",
        "monkey",
        "micro_batch_tokens",
        "secretary",
    ],
)
def test_keys_of_no_secrets(name):
    assert secrets.hide({name: "abc"}) == {name: "abc"}


@pytest.mark.parametrize(
    "text",
    [
        "sk-proj-abcdefghijkl",
        "hf_abcdefghijklmn",
        "ghp_abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "xoxb-123456789-abc",
        "https://user:hunter22@host/x",
        "glpat-abcdefghijklmnopq",
        "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc",
    ],
)
def test_shapes_of_tokens_are_hidden_wherever_they_stand(text):
    assert "<redacted>" in secrets.redact(f"a {text} b")
    assert "<redacted>" in secrets.hide({"x": [text]})["x"][0]


@pytest.mark.parametrize(
    "text",
    [
        "api_key=abcdef",
        "{api_key: abcdef}",
        "--token=abcdef",
        '"password": "abcdef"',
        "Authorization: Bearer abcdef",
    ],
)
def test_assignments_in_running_text(text):
    assert "abcdef" not in secrets.redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "api_key: ${NAME}",
        "max_tokens=256",
        "unexpected token: <eos>",
        "task-sort sk-1 risk-free",
        "run.steps=10",
        "http://127.0.0.1:80/a",
    ],
)
def test_other_text_stays(text):
    assert secrets.redact(text) == text


@pytest.mark.whole_run
def test_a_run_with_a_secret_in_plain_text_writes_it_nowhere(project, monkeypatch):
    """The command line, a reward that fails with the key in its words, a crash, and the resume."""
    secret = "plain-old-secret"
    command = [
        "train",
        "c.yaml",
        key(secret),
        "run.checkpoint_every=1",
        "reward.max_error_rate=1",
        "reward.on_error=zero",
    ]
    monkeypatch.setattr("sys.argv", ["tandem", *command])
    assert cli.main(list(command)) == 0
    assert cli.main([*command, "run.steps=2", "run.resume=true"]) == 0
    assert (
        cli.main(
            [
                *command,
                "run.name=crash",
                "reward.max_error_rate=0",
                "run.steps=50",
                "reward.on_error=drop",
            ]
        )
        == 1
    )
    assert (project / "runs/crash/error.log").is_file()
    assert found_below(project / "runs", secret) == []
    assert "<redacted>" in (project / "runs/w/environment.json").read_text()
    with pytest.raises(ConfigError, match="api_key: found <redacted>"):
        load("runs/w/config.yaml")


@pytest.mark.whole_run
def test_a_run_with_a_reference_uses_it_and_resumes(project):
    resolve_model(ModelConfig(path="tandem:tiny"))
    overrides = [key("${JUDGE_KEY}"), "run.checkpoint_every=1"]
    assert run.train(load("c.yaml", overrides)) == 0
    assert run.train(load("runs/w/config.yaml", ["run.resume=true", "run.steps=2"])) == 0
    assert "${JUDGE_KEY}" in (project / "runs/w/config.yaml").read_text()
    assert found_below(project / "runs", "from-environment") == []
    assert '"reward":1.0' in (project / "runs/w/rollouts.jsonl").read_text()


def test_workers_get_the_value(project):
    import numpy as np

    from tandem.engine.core.types import Prompt
    from tandem.rollout.rewards.runner import RewardRunner

    runner = RewardRunner(load("c.yaml", [key("${JUDGE_KEY}")]).reward)
    prompt = Prompt("p", np.zeros(1, np.int32), "p", {"answer": "1"})
    outcomes = runner.submit(prompt, ["a"], [np.zeros(1, np.int32)]).result(60)
    runner.close()
    assert [outcome.value for outcome in outcomes] == [1.0]
