"""What the engines are sent has the names and shapes of the checkpoint, and its values."""

import pytest
import torch
from safetensors.torch import load_file

from tandem.engine.model.checkpoint_form import CheckpointForm

SMALL = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
)


def config(kind: str):
    import transformers

    experts = {"num_experts_per_tok": 2}
    if kind == "Mixtral":
        return transformers.MixtralConfig(**SMALL, **experts, num_local_experts=4)
    if kind == "Qwen3Moe":
        return transformers.Qwen3MoeConfig(
            **SMALL, **experts, num_experts=4, moe_intermediate_size=24
        )
    if kind == "Olmoe":
        return transformers.OlmoeConfig(**SMALL, **experts, num_experts=4)
    if kind == "GraniteMoe":
        return transformers.GraniteMoeConfig(**SMALL, **experts, num_local_experts=4)
    return transformers.LlamaConfig(**SMALL)


@pytest.mark.parametrize("kind", ["Llama", "Mixtral", "Qwen3Moe", "Olmoe", "GraniteMoe"])
def test_parameters_have_the_form_of_the_checkpoint(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(kind)).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    named = list(model.named_parameters())
    form = CheckpointForm(model, [(name, p.dtype, tuple(p.shape)) for name, p in named])
    sent = [(name, tensor.detach()) for name, tensor in form.apply(named)]
    assert [(name, t.dtype, tuple(t.shape)) for name, t in sent] == form.shapes
    assert {name for name, _ in sent} == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in sent)


def test_what_cannot_be_converted_alone_keeps_its_names(monkeypatch):
    """A checkpoint's tensor that is made of two parameters."""

    def joined(model, state):
        return (
            {"qkv": torch.cat(list(state.values()))}
            if len(state) == 2
            else {"qkv": next(iter(state.values()))}
        )

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", joined)
    model = torch.nn.Linear(1, 1)
    model._weight_conversions = ["joins"]
    shapes = [("q", torch.float32, (2, 2)), ("k", torch.float32, (2, 2))]
    form = CheckpointForm(model, shapes)
    assert form.shapes == shapes
    given = [("q", torch.zeros(2, 2)), ("k", torch.ones(2, 2))]
    assert [name for name, _ in form.apply(given)] == ["q", "k"]
