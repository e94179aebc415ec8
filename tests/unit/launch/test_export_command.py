"""`tandem export`: the model of a run or of any checkpoint, copied and compared with the manifest;
nothing is started.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tandem.engine.loop.checkpoint import MANIFEST, seal
from tandem.launch import cli

pytestmark = pytest.mark.whole_run

CONFIG = """
mode: inline
model: {path: "tandem:tiny"}
data:
  experts: {path: "task:sort", options: {digits: 3, size: 8}}
  max_prompt_tokens: 32
  max_expert_tokens: 16
  experts_per_step: 2
method: {name: sft}
learner: {learning_rate: 1.0e-3}
run: {name: r, steps: 2, checkpoint_every: 1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with two checkpoints and a saved model."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "c.yaml").write_text(CONFIG)
        assert cli.main(["train", "c.yaml"]) == 0
    return folder / "runs" / "r"


@pytest.fixture
def run(trained, in_tmp):
    """A copy to break."""
    return shutil.copytree(trained, in_tmp / "r")


def export(source, capsys):
    capsys.readouterr()
    code = cli.main(["export", str(source), "out"])
    return code, capsys.readouterr().err


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_and_its_last_checkpoint_hold_the_same_model(run, in_tmp, capsys):
    assert export(run, capsys)[0] == 0
    assert content(in_tmp / "out") == content(run / "model")
    shutil.rmtree(in_tmp / "out")
    assert export(run / "checkpoints" / "step_2", capsys)[0] == 0
    assert content(in_tmp / "out") == content(run / "model"), "the tokenizer, too"


def test_an_earlier_checkpoint_holds_an_earlier_model(run, in_tmp, capsys):
    assert export(run / "checkpoints" / "step_1", capsys)[0] == 0
    early, late = (
        load_file(folder / "model.safetensors") for folder in (in_tmp / "out", run / "model")
    )
    assert early.keys() == late.keys()
    assert any(not torch.equal(early[name], late[name]) for name in early)
    from tandem.engine.config.schema import ModelConfig
    from tandem.engine.model.load import load_policy
    from tandem.engine.model.resolve import load_tokenizer

    load_policy(ModelConfig(path=str(in_tmp / "out")))
    assert load_tokenizer(ModelConfig(path=str(in_tmp / "out"))).chat_template


def test_a_run_without_a_saved_model_gives_its_newest_checkpoint(run, in_tmp, capsys):
    shutil.rmtree(run / "model")
    assert export(run, capsys)[0] == 0
    assert content(in_tmp / "out") == content(run / "checkpoints" / "step_2" / "model")


def damaged(run):
    path = run / "checkpoints" / "step_2" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x01\x02\x03\x04")


def cut_off(run):
    path = run / "checkpoints" / "step_2" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_manifest(run):
    (run / "checkpoints" / "step_2" / MANIFEST).unlink()


def of_an_older_version(run):
    folder = run / "checkpoints" / "step_2"
    shutil.rmtree(folder / "model")
    (folder / MANIFEST).unlink()
    seal(folder, 2)


KINDS = [
    (damaged, "its content was changed"),
    (cut_off, "has 1000 bytes, its manifest says"),
    (without_manifest, "was not written to the end"),
    (of_an_older_version, "has no model/ folder"),
]


@pytest.mark.parametrize("change, said", KINDS)
def test_a_checkpoint_that_cannot_be_exported(run, in_tmp, capsys, change, said):
    change(run)
    code, error = export(run / "checkpoints" / "step_2", capsys)
    assert code == 2 and said in error and "Traceback" not in error
    assert not (in_tmp / "out").exists(), "complete or not there at all"


def test_a_saved_model_that_is_cut_off(run, in_tmp, capsys):
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    code, error = export(run, capsys)
    assert code == 2 and "is damaged" in error and not (in_tmp / "out").exists()


def test_a_run_that_went_on_gives_its_newest_model(run, in_tmp, capsys, monkeypatch):
    """The model of the first end is not that of a run that was continued and stopped."""
    monkeypatch.chdir(run.parent)
    (run.parent / "c.yaml").write_text(CONFIG)
    first = content(run / "model")
    words = ["run.dir=.", "run.resume=true", "run.steps=3", "run.save_model=false"]
    assert cli.main(["train", "c.yaml", *words]) == 0
    assert export(run, capsys)[0] == 0
    assert content(in_tmp / "out") == content(run / "checkpoints" / "step_3" / "model") != first
