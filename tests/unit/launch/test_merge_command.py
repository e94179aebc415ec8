"""`tandem merge`: folders in, a folder out that transformers loads; what is unlike is refused."""

import json
import shutil

import pytest
import torch
from head_cases import LargestTensor
from safetensors.torch import load_file, save_file

from tandem.engine.model.tiny import make_tiny
from tandem.launch import cli

KINDS = {
    "average": [],
    "linear": ["--weights", "0.75", "0.25"],
    "task": ["--scale", "0.5"],
    "ties": ["--density", "0.5"],
    "dare": ["--drop", "0.5", "--seed", "3"],
    "slerp": ["--t", "0.25"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        make_tiny(folder / name, hidden=32, layers=2, seed=seed)
    return folder


@pytest.fixture
def models(made, in_tmp):
    """Copies to break, in the current folder."""
    shutil.copytree(made, in_tmp, dirs_exist_ok=True)
    return in_tmp


def run(capsys, *words):
    capsys.readouterr()
    code = cli.main(["merge", *words])
    return code, "".join(capsys.readouterr())


def change(folder, edit):
    """Rewrite the tensors of a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def split(folder, names):
    """Into two shards and an index; the second has the tensors whose names contain one of these."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: int(any(part in name for part in names)) for name in tensors}
    for shard in (0, 1):
        part = {name: tensors[name] for name, place in places.items() if place == shard}
        save_file(part, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    index = {name: f"model-{place}.safetensors" for name, place in places.items()}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_loads_with_the_bases_tokenizer(models, kind, capsys):
    from transformers import AutoTokenizer

    code, told = run(capsys, kind, "out", "a", "b", "--base", "base", *KINDS[kind])
    assert code == 0 and f"{kind} of 2 models, " in told
    assert AutoTokenizer.from_pretrained("out").chat_template
    base, a, b, out = (weights(name) for name in ("base", "a", "b", "out"))
    for name in out:
        assert out[name].dtype == base[name].dtype
        one, two, start = a[name].double(), b[name].double(), base[name].double()
        expected = {
            "average": (one + two) / 2,
            "linear": 0.75 * one + 0.25 * two,
            "task": start + 0.5 * (one - start + two - start),
        }.get(kind)
        if expected is not None:
            torch.testing.assert_close(out[name].double(), expected, rtol=1e-5, atol=1e-6)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (models / "out" / file).read_bytes() == (models / "base" / file).read_bytes()


def test_restore_ends_in_the_model_and_in_the_base(models, capsys):
    for share, like in (("0", "a"), ("1", "base")):
        assert run(capsys, "restore", share, "a", "--base", "base", "--share", share)[0] == 0
        found, expected = weights(share), weights(like)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_in_any_split_give_the_same_tensors(models, kind, capsys):
    run(capsys, kind, "whole", "a", "b", "--base", "base", *KINDS[kind])
    split(models / "base", ["mlp"])
    split(models / "b", ["layers.1", "norm"])
    assert run(capsys, kind, "parts", "a", "b", "--base", "base", *KINDS[kind])[0] == 0
    assert (models / "parts" / "model.safetensors.index.json").is_file()
    assert not (models / "parts" / "model.safetensors").exists()
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_without_a_base_the_first_model_gives_the_rest(models, capsys):
    (models / "b" / "tokenizer.json").unlink()
    assert run(capsys, "average", "out", "a", "b")[0] == 0
    assert (models / "out" / "tokenizer.json").is_file()
    code, told = run(capsys, "ties", "other", "a", "b")
    assert code == 2 and "give it with --base" in told and not (models / "other").exists()


def test_a_tied_output_embedding_stays_tied(models, capsys):
    """Also where the random mask of dare depends on the tensor's name."""

    def write_twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(models / "base", write_twice)
    change(models / "b", write_twice)
    assert run(capsys, "dare", "out", "a", "b", "--base", "base", "--drop", "0.5")[0] == 0
    out = load_file(models / "out" / "model.safetensors")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert run(capsys, "average", "short", "a", "b")[0] == 0
    assert "lm_head.weight" not in load_file(models / "short" / "model.safetensors")
    change(models / "b", lambda tensors: tensors["lm_head.weight"].add_(1.0))
    code, told = run(capsys, "average", "wrong", "a", "b")
    assert code == 2 and "ties 'lm_head.weight' to 'model.embed_tokens.weight'" in told


def test_whole_numbers_must_agree_and_are_copied(models, capsys):
    for name in ("base", "a", "b"):
        change(models / name, lambda tensors: tensors.update(steps=torch.arange(3)))
    assert run(capsys, "ties", "out", "a", "b", "--base", "base")[0] == 0
    assert load_file(models / "out" / "model.safetensors")["steps"].tolist() == [0, 1, 2]
    change(models / "b", lambda tensors: tensors["steps"].add_(1))
    code, told = run(capsys, "ties", "other", "a", "b", "--base", "base")
    assert code == 2 and "tensor 'steps' of dtype I64 differs" in told


def test_bfloat16_is_merged_in_float32(models, capsys):
    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    for name in ("base", "a", "b"):
        change(models / name, halve)
    assert run(capsys, "average", "out", "a", "b")[0] == 0
    a, b, out = (load_file(models / name / "model.safetensors") for name in ("a", "b", "out"))
    for name in out:
        assert torch.equal(out[name], ((a[name].float() + b[name].float()) / 2).bfloat16())


def test_models_that_are_unlike_are_refused_by_the_name_of_the_tensor(models, capsys):
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(edit, *words):
        shutil.rmtree(models / "b")
        shutil.copytree(models / "a", models / "b")
        change(models / "b", edit)
        code, told = run(capsys, "average", "out", "a", "b")
        assert code == 2 and not (models / "out").exists()
        assert all(word in told for word in words), told

    refused(lambda t: t.pop(name), f"b has no tensor '{name}'", "F32 [64, 32]")
    refused(lambda t: t.update(extra=torch.zeros(2)), "a has no tensor 'extra'")
    refused(
        lambda t: t.update({name: t[name][:3].clone()}),
        f"tensor '{name}' is F32 [3, 32] in ",
        "expected F32 [64, 32]",
    )
    refused(lambda t: t.update({name: t[name].half()}), f"tensor '{name}' is F16 [64, 32]")
    refused(
        lambda t: t[name].fill_(float("inf")), f"tensor '{name}' would have values that are not"
    )


def test_what_is_no_model_is_told(models, capsys):
    for words, expected in (
        (["average", "out", "a", "nowhere"], "there is no folder nowhere"),
        (["average", "base", "a", "b"], "base exists and is not empty"),
        (["slerp", "out", "a", "b", "base"], "slerp takes two models, found 3"),
    ):
        code, told = run(capsys, *words)
        assert code == 2 and expected in told
    (models / "a" / "model.safetensors").unlink()
    code, told = run(capsys, "average", "out", "a", "b")
    assert code == 2 and "no weights in safetensors" in told
    with pytest.raises(SystemExit):
        cli.main(["merge", "average", "out", "a", "b", "--density", "0.5"])
    assert "unrecognized argument '--density'" in capsys.readouterr().err


def test_one_tensor_at_a_time(models, capsys):
    largest = max(t.numel() for t in load_file(models / "a" / "model.safetensors").values())
    for kind, options in KINDS.items():
        with LargestTensor() as watch:
            assert run(capsys, kind, f"{kind}", "a", "b", "--base", "base", *options)[0] == 0
        assert watch.elements <= largest * 4  # of which the bytes that are written have 4
