"""The command line as a user meets it: exit codes, one-screen errors, dry runs, the list of
methods.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tandem.algorithms.registry import METHODS, method_class
from tandem.engine.core.errors import ConfigError
from tandem.launch import cli, machine, reservation
from tandem.launch.check_config import load

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 8, "seed": 1}},
        "max_prompt_tokens": 32,
        "max_expert_tokens": 16,
        "experts_per_step": 2,
    },
    "method": {"name": "chord_mu"},
    "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "max_tokens": 4},
    "reward": {"functions": ["exact"]},
    "run": {"steps": 1, "save_model": False},
}


@pytest.fixture
def config(in_tmp):
    (in_tmp / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return "c.yaml"


def tandem(*words):
    """Run the command as its own process: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tandem.launch.cli", *words],
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from tandem.launch import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets'} & "
        "set(sys.modules); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for command in (
        "train",
        "eval",
        "methods",
        "doctor",
        "check-logprobs",
        "export",
        "fetch",
        "plot",
    ):
        assert f"\n    {command}" in done.stdout


@pytest.mark.whole_run
def test_inline_training_imports_no_cluster_package(config):
    code = (
        "import sys; from tandem.launch import cli\n"
        f"assert cli.main(['train', {config!r}]) == 0\n"
        "heavy = {'ray', 'vllm', 'deepspeed'} & set(sys.modules); sys.exit(f'imported "
        "{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


def test_methods_lists_each_with_paper_and_file(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in METHODS:
        cls = method_class(name)
        entry = out[out.index(f"  {name:<14} {cls.title}") :].splitlines()[1]
        assert (cls.paper or "no single paper") in entry
        assert os.path.isfile(entry.split()[-1])


def test_dry_run_prints_config_and_placement_and_starts_nothing(config, in_tmp, capsys):
    assert (
        cli.main(
            [
                "train",
                config,
                "mode=cluster",
                "--dry-run",
                "run.steps=77",
                "cluster.learner_ranks=2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    resolved = yaml.safe_load(out)
    assert resolved["run"]["steps"] == 77 and resolved["learner"]["zero_stage"] == 1
    assert "1 engine(s) of {CPU 1}, 2 learner rank(s) of {CPU 1}" in out
    assert [p.name for p in in_tmp.iterdir()] == ["c.yaml"]
    (in_tmp / "resolved.yaml").write_text(out)
    assert load("resolved.yaml") == load(
        config, ["mode=cluster", "run.steps=77", "cluster.learner_ranks=2"]
    )


@pytest.mark.whole_run
def test_bad_input_is_exit_2_on_one_screen(config):
    code, out, err = tandem("train", config, "learner.zero_stge=1")
    assert code == 2 and out == ""
    assert (
        err.startswith("error: unknown key 'learner.zero_stge' (did you mean 'zero_stage'?)")
        and "Traceback" not in err
        and err.count("\n") < 25
    )
    code, _, err = tandem("train", config, "learner.zero_stge=1", "--debug")
    assert code == 1 and "Traceback" in err and "ConfigError" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", "absent.yaml"], "no such file"),
        (
            [
                "train",
                "c.yaml",
                "mode=cluster",
                "cluster.engine_gpus=512",
                "cluster.learner_gpus=512",
            ],
            "GPU",
        ),
        (["train", "c.yaml", "mode=cluster", "cluster.engines=9999"], "fractions"),
        (["train", "c.yaml", "mode=cluster", "cluster.learner_cpus=0"], "both 0"),
        (
            [
                "train",
                "c.yaml",
                "mode=cluster",
                "cluster.engine_cpus=0.1",
                "cluster.learner_cpus=0.1",
                "cluster.strategy=STRICT_SPREAD",
            ],
            "one node",
        ),
        (["eval", "."], "not a run folder"),
        (["export", ".", "out"], "neither a run folder"),
        (["export", ".", "."], "not empty"),
        (["doctor", "--reward"], "needs a config"),
    ],
)
def test_other_bad_input(config, capsys, words, said):
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_port_in_use_is_found_before_anything_starts(config, capsys):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert (
            cli.main(
                [
                    "train",
                    config,
                    "mode=cluster",
                    f"cluster.port={port}",
                    "cluster.engine_cpus=0.1",
                    "cluster.learner_cpus=0.1",
                ]
            )
            == 2
        )
    assert f"cluster.port is {port}, which is in use" in capsys.readouterr().err


def test_words_that_are_no_override_are_refused(config, capsys):
    for words in (
        ["methods", "a=1"],
        ["train", config, "--dry-run", "stray"],
        ["train", config, "--dryrun"],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2
    assert "--dryrun" in capsys.readouterr().err


@pytest.mark.whole_run
def test_the_readmes_own_reward_and_method_train(config, in_tmp, capsys):
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    blocks = re.findall(r"```python\n(# (\w+\.py).*?)```", readme, re.DOTALL)
    for text, name in blocks:
        (in_tmp / name).write_text(text)
    assert [name for _, name in blocks] == ["my_reward.py", "my_method.py"]
    assert (
        cli.main(
            [
                "train",
                config,
                'method={name: "my_method.py:Mixed", weight: 0.3}',
                "reward.functions=[my_reward.py:score]",
            ]
        )
        == 0
    )
    metrics = json.loads((in_tmp / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["loss/sft"] > 0 and "loss/policy" in metrics


@pytest.mark.whole_run
def test_failure_leaves_a_traceback_in_the_run_folder(config, in_tmp, capsys):
    (in_tmp / "broken.py").write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.sft.sft import "
        "SFT\n\n@dataclass\nclass Broken(SFT):\n"
        "    def rows(self, batch):\n        raise RuntimeError('rows went wrong')\n"
    )
    assert cli.main(["train", config, "method.name=broken.py:Broken"]) == 1
    err = capsys.readouterr().err
    assert "rows went wrong" in err and "Traceback" not in err
    log = in_tmp / "runs" / "run" / "error.log"
    assert str(log.relative_to(in_tmp)) in err and "raise RuntimeError" in log.read_text()


def write_weights(folder, shapes):
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder


def test_memory_estimate_follows_zero_and_precision(in_tmp, config):
    folder = write_weights(in_tmp / "m", {"a": (1000, 500), "b": (500_000,), "c": (0, 7)})
    parameters = 1_000_000
    assert machine.parameter_count(folder) == parameters

    def state(*words):
        return (
            machine.memory_need(
                load(config, ["mode=cluster", "cluster.learner_ranks=2", *words]), folder
            ).rank
            - machine.LEARNER_RUNTIME
        )

    # float32: 4 weights, 4 gradients, 8 moments
    assert state("learner.zero_stage=0") == 16 * parameters
    assert state("learner.zero_stage=1") == (4 + 4 + 8 / 2) * parameters
    assert state("learner.zero_stage=2") == (4 + 4 / 2 + 8 / 2) * parameters
    assert state("learner.zero_stage=3") == 16 / 2 * parameters
    # 2, 2, 4 master weights, 8
    assert state("learner.zero_stage=0", "model.dtype=bfloat16") == 16 * parameters
    engine = machine.memory_need(
        load(config, ["mode=cluster", "rollout.kv_cache_gib=3"]), folder
    ).engine
    assert engine == machine.ENGINE_RUNTIME + 4 * parameters + 3 * machine.GIB


def test_too_little_memory_is_refused(in_tmp, config):
    folder = write_weights(in_tmp / "m", {"a": (10,)})
    roomy = ["mode=cluster", "cluster.engine_cpus=0.1", "cluster.learner_cpus=0.1"]
    with pytest.raises(
        ConfigError, match=r"not enough memory: .* 10000\d\.\d GiB .* GiB are available here"
    ):
        reservation.preflight(load(config, [*roomy, "rollout.kv_cache_gib=100000"]), folder)
