"""Half-made model folders: one line that names the file, exit code 2, before anything starts;
doctor says it too.
"""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.engine.model.tiny import make_tiny
from tandem.launch import cli, doctor
from tandem.launch.check_config import load

CONFIG = """
mode: inline
model: {path: broken}
data:
  prompts: {path: "task:sort", options: {digits: 3}}
  max_prompt_tokens: 32
method: {name: grpo}
rollout: {prompts_per_step: 2, samples_per_prompt: 2, max_tokens: 6}
reward: {functions: [exact]}
run: {name: r, steps: 1, save_model: false}
"""
INDEX = "model.safetensors.index.json"


class Payload:
    """Unpickling it would make a file."""

    def __reduce__(self):
        import os

        return os.mkdir, ("run_from_the_pickle",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("models") / "whole", hidden=32, layers=1)


@pytest.fixture
def broken(in_tmp, whole):
    (in_tmp / "c.yaml").write_text(CONFIG)
    shutil.copytree(whole, in_tmp / "broken")
    return in_tmp / "broken"


def header(text, rest=b""):
    return struct.pack("<Q", len(text)) + text.encode() + rest


def one_shard_lost(folder):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    save_file({name: state[name] for name in names[1:]}, folder / "model-2.safetensors")
    places = {name: "model-2.safetensors" for name in names[1:]} | {names[0]: "model-1.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(text)

    return change


def write(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def pickled(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return change


def remote_code(folder):
    tree = json.loads((folder / "config.json").read_text())
    tree |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "mine.py").write_text("import os\nos.mkdir('run_from_the_pickle')\n")


def wrong_shapes(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "intermediate_size": 48}))


KINDS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors (0 bytes) is damaged"),
    "text as weights": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        "is damaged: its first bytes",
    ),
    "a header that is a list": (write("model.safetensors", header("[1, 2]")), "is damaged"),
    "a header without offsets": (
        write("model.safetensors", header('{"a": {"shape": [1]}}')),
        "is damaged",
    ),
    "one shard lost": (
        one_shard_lost,
        "1 of them are not beside it, among them model-1.safetensors",
    ),
    "an empty index": (index(""), f"{INDEX} cannot be read"),
    "an index of nothing": (index('{"weight_map": {}}'), "names 0 weight files"),
    "an index that is a list": (index("[]"), f"{INDEX} cannot be read"),
    "code in a pickle": (pickled({"x": Payload()}), "code in it is never run"),
    "an empty pickle": (pickled(b""), "pytorch_model.bin (0 bytes) is damaged"),
    "a pickle without tensors": (pickled({"step": 3}), "holds no weights"),
    "config.json empty": (write("config.json", ""), "its config.json could not be read"),
    "config.json cut off": (
        write("config.json", '{"model_type": "lla'),
        "its config.json could not be read",
    ),
    "config.json a list": (write("config.json", "[]"), "its config.json could not be read"),
    "config.json of no model": (write("config.json", "{}"), "its config.json could not be read"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (
        lambda folder: [
            (folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
        ],
        "no tokenizer could be loaded",
    ),
    "tokenizer cut off": (
        write("tokenizer.json", '{"version": "1.0", "mod'),
        "no tokenizer could be loaded",
    ),
    "tokenizer_config cut off": (
        write("tokenizer_config.json", "{"),
        "no tokenizer could be loaded",
    ),
    "remote code": (remote_code, "model.trust_remote_code=true"),
    "weights of another shape": (wrong_shapes, "could not be loaded"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_half_made_models(broken, capsys, kind):
    change, said = KINDS[kind]
    change(broken)
    assert cli.main(["train", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error, error
    assert not (broken.parent / "run_from_the_pickle").exists()


@pytest.mark.parametrize(
    "kind", ["no weights", "one shard lost", "code in a pickle", "tokenizer cut off"]
)
def test_doctor_sees_them(broken, kind):
    change, said = KINDS[kind]
    change(broken)
    checks = list(doctor.of_config(load("c.yaml")))
    assert any(
        level == doctor.BAD and name == "model" and said in text for level, name, text in checks
    )


def test_whole_pickles_are_read(broken):
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    assert cli.main(["train", "c.yaml"]) == 0
