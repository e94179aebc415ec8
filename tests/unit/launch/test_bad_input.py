"""What a user does wrong is told in one line of words before anything is started; what a user's own
code does wrong is told with its place.
"""

import json
import shutil

import pytest
import yaml

from tandem.launch import cli

ROWS = [
    {"prompt": f"sort {n}=", "answer": "".join(sorted(str(n))), "demo": "".join(sorted(str(n)))}
    for n in range(21, 29)
]
CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "rows.jsonl"},
        "experts": {"path": "rows.jsonl", "response": "demo"},
        "max_prompt_tokens": 32,
        "max_expert_tokens": 16,
        "experts_per_step": 2,
    },
    "method": {"name": "chord_mu"},
    "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "max_tokens": 4},
    "reward": {"functions": ["exact"]},
    "run": {"steps": 2, "checkpoint_every": 1, "save_model": False},
}
METHOD = (
    "from dataclasses import dataclass\nfrom tandem.algorithms.sft.sft import "
    "SFT\n\n@dataclass\nclass Mine(SFT):\n"
)


@pytest.fixture
def folder(in_tmp):
    (in_tmp / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (in_tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return in_tmp


@pytest.fixture
def refused(folder, capsys):
    """Train with overrides that must be refused with exit code 2; gives the message."""

    def refused(*overrides: str, command: str = "train") -> str:
        capsys.readouterr()
        assert cli.main([command, "c.yaml", *overrides]) == 2
        out, err = capsys.readouterr()
        assert (
            err.startswith("error: ")
            and "Traceback" not in err
            and len(err) < 2000
            and "learner up" not in out
        )
        return err

    return refused


@pytest.mark.parametrize(
    "override",
    [
        "learner.grad_clip=-1",
        "learner.betas=[2, 3]",
        "learner.weight_decay=-0.1",
        "learner.max_skipped_steps=-1",
        "eval.limit=0",
        "eval.temperature=-1",
        "eval.max_tokens=0",
        "reward.timeout=0",
        "reward.max_error_rate=2",
        "run.seed=-1",
        "run.token_budget=0",
        "cluster.port=70000",
        "sync.gate_steps=-1",
        "rollout.kv_cache_gib=0",
        "rollout.gpu_memory_utilization=1.5",
        "run.name=''",
    ],
)
def test_numbers_out_of_range(refused, override):
    message, key = refused(override), override.partition("=")[0]
    assert key in message and "on the command line" in message
    assert "not finite" not in message


def test_numbers_must_be_finite(refused):
    assert "reward.timeout: found inf, expected a number" in refused("reward.timeout=.inf")
    assert "learner.learning_rate: found nan" in refused("learner.learning_rate=.nan")


@pytest.mark.parametrize(
    "content, said",
    [
        ("run: {steps: 1}\nrun: {name: x}\n", "the key 'run' is given twice"),
        ("run:\n\tsteps: 1\n", "'\\t'"),
        (b"# caf\xe9\n", "UTF-8"),
        ("- a\n", "expected a mapping"),
    ],
)
def test_unreadable_config(folder, capsys, content, said):
    (folder / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["train", "bad.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_a_config_with_windows_line_ends_is_the_same_config(folder, capsys):
    text = (folder / "c.yaml").read_text()
    (folder / "crlf.yaml").write_text(text.replace("\n", "\r\n"), newline="")
    for name in ("c.yaml", "crlf.yaml"):
        assert cli.main(["train", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_run_folder_that_cannot_be_made(refused):
    assert "run.dir/run.name" in refused("run.dir=c.yaml")


@pytest.mark.whole_run
def test_model_folder_without_weights_or_with_a_torn_file(folder, refused):
    assert cli.main(["train", "c.yaml", "run.steps=1"]) == 0  # makes models/tiny
    shutil.copytree("models/tiny", "torn")
    (weights,) = (folder / "torn").glob("*.safetensors")
    for size, said in ((weights.stat().st_size - 100, "its header says"), (50, "damaged")):
        weights.write_bytes(weights.read_bytes()[:size])
        for mode in ("mode=inline", "mode=cluster"):
            assert said in refused(
                "run.name=torn",
                "model.path=torn",
                mode,
                "cluster.engine_cpus=0.1",
                "cluster.learner_cpus=0.1",
            )
    weights.unlink()
    assert "has no weights" in refused("run.name=torn", "model.path=torn")


@pytest.mark.parametrize(
    "body, said",
    [
        ("def f(:\n", "SyntaxError"),
        ("import not_there\n", "mine.py:1"),
        ("x = 1\n", "has no 'Mine'"),
        (
            METHOD + "    def __post_init__(self):\n        assert False, 'never'\n",
            "AssertionError: never",
        ),
    ],
)
def test_method_that_cannot_be_made(folder, refused, body, said):
    (folder / "mine.py").write_text(body)
    message = refused("method={name: 'mine.py:Mine'}")
    assert said in message and "mine.py" in message


def test_reward_file_that_raises_on_import_is_named_with_its_line(folder, refused):
    (folder / "reward.py").write_text("\nlimit = 1 / 0\ndef score(completion): return 1.0\n")
    message = refused("reward.functions=['reward.py:score']")
    assert "ZeroDivisionError" in message and "reward.py:2" in message


@pytest.mark.whole_run
def test_a_bug_in_a_users_method_is_told_with_its_line(folder, capsys):
    (folder / "mine.py").write_text(
        METHOD + "    def rows(self, batch):\n        return batch.nothing\n"
    )
    assert cli.main(["train", "c.yaml", "method={name: 'mine.py:Mine'}"]) == 1
    err = capsys.readouterr().err
    assert (
        f"at {folder / 'mine.py'}:7, in rows" in err
        and "AttributeError" in err
        and "Traceback" not in err
    )


@pytest.mark.whole_run
def test_resume_wants_the_run_that_was_begun(refused, capsys):
    assert "holds no complete checkpoint" in refused("run.resume=true")
    assert cli.main(["train", "c.yaml"]) == 0
    assert "already holds a run" in refused()
    for override in ("method.name=sft", "mode=cluster", "learner.zero_stage=2", "run.seed=1"):
        key, _, value = override.partition("=")
        line = next(
            line
            for line in refused("run.resume=true", "run.steps=3", override).splitlines()
            if line.startswith(f"  {key}: ")
        )
        assert line.endswith(f"-> {value}") or line.endswith(f"-> '{value}'")
    assert "has done 2" in refused("run.resume=true", "run.steps=1")


@pytest.mark.whole_run
def test_a_run_that_ended_before_its_model_was_saved_saves_it_when_resumed(folder):
    assert cli.main(["train", "c.yaml"]) == 0
    assert cli.main(["train", "c.yaml", "run.resume=true", "run.save_model=true"]) == 0
    assert (folder / "runs" / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.prompts=rows.jsonl", "expected a section"),
        ("data.prompts={pth: rows.jsonl}", "did you mean 'path'"),
        ("steps=3", "did you mean 'run.steps'"),
    ],
)
def test_what_was_set_on_the_command_line_is_said_to_be(refused, override, said):
    message = refused(override)
    assert said in message and "on the command line" in message


def test_more_tokens_than_the_model_has_context(refused):
    assert "context of 1024" in refused("rollout.max_tokens=1024")
    assert "context of 1024" in refused(
        "mode=cluster",
        "cluster.engine_cpus=0.1",
        "cluster.learner_cpus=0.1",
        "rollout.max_tokens=1000",
    )


def test_nccl_and_ipc_without_gpus(refused):
    assert "sync.transport is nccl" in refused("sync.transport=nccl")
    assert "sync.transport is ipc" in refused("sync.transport=ipc")


def test_record_that_is_none(folder, refused):
    replay = ("rollout.backend=replay", "method={name: grpo}")
    assert "no such file" in refused(*replay, "rollout.record=absent.jsonl")
    assert "no rollout" in refused(*replay, "rollout.record=rows.jsonl")
    (folder / "empty.jsonl").touch()
    assert "holds no rollouts" in refused(*replay, "rollout.record=empty.jsonl")


@pytest.mark.whole_run
def test_checking_log_probs_leaves_the_run_alone(folder, refused, capsys):
    assert cli.main(["train", "c.yaml", "run.steps=1"]) == 0
    before = (folder / "runs" / "run" / "metrics.jsonl").read_bytes()
    assert cli.main(["check-logprobs", "c.yaml"]) == 0
    assert (folder / "runs" / "run" / "metrics.jsonl").read_bytes() == before
    assert "a method that uses rollouts" in refused("method={name: sft}", command="check-logprobs")


def test_picture_with_no_place(folder, capsys):
    for out in ("nowhere/p.png", "p.xyz"):
        assert cli.main(["plot", "runs/run", "-o", out]) == 2
        assert "-o is" in capsys.readouterr().err


def test_a_method_whose_options_would_be_ignored_is_refused(tmp_path):
    from tandem.algorithms.registry import method_class

    file = tmp_path / "mine.py"
    file.write_text(
        "from tandem.algorithms.rl.grpo import GRPO\nclass Mine(GRPO):\n    weight: float = 0.5\n"
    )
    with pytest.raises(ValueError, match=r"weight.*@dataclass"):
        method_class(f"{file}:Mine")
