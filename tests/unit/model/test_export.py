"""An export is the model that was loaded, with the trained weights: names, layout, buffers and
files.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import WeightRenaming

from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.protocol import PolicySpec
from tandem.engine.learner.rank import LearnerRank
from tandem.engine.model.export import find_origin, write_weights
from tandem.engine.model.load import load_policy
from tandem.engine.model.policy import hf_parameters
from tandem.engine.model.resolve import load_tokenizer
from tandem.engine.model.tiny import make_tiny
from tandem.engine.model.weight_files import tensor_shapes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = transformers.GPT2Config(
    vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=0
)
FAMILIES = {
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "deepseek_v3": transformers.DeepseekV3Config(**SIZES, **DEEPSEEK),
    "gpt2": GPT2,
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=0,
    ),
    "phi3": transformers.Phi3Config(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=16),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": transformers.CohereConfig(**SIZES),
}


def make_folder(config, folder, **options):
    """A model with random weights and buffers that are not zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, buffer.numel()))
    model.save_pretrained(folder, **options)
    return folder


def settings(folder):
    attention = (
        "eager"
        if json.loads((folder / "config.json").read_text())["model_type"] == "gemma2"
        else "sdpa"
    )
    return ModelConfig(path=str(folder), attention=attention)


def trained(model):
    """A LearnerRank of this model whose parameters have all moved."""
    policy = load_policy(model)
    with torch.no_grad():
        for _, parameter in hf_parameters(policy):
            parameter.add_(0.01)
    full = [(name, parameter.detach()) for name, parameter in hf_parameters(policy)]
    engine = SimpleNamespace(module=policy, full_parameters=lambda _only_adapters=False: iter(full))
    return LearnerRank(Config(model=model), model.path, PolicySpec(), engine)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 30)[None], use_cache=False).logits


def check_reload(rank, out, model):
    """transformers alone reads the export as the very model that was trained."""
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        output_loading_info=True,
        attn_implementation=model.attention,
        trust_remote_code=model.trust_remote_code,
    )
    assert not info["missing_keys"]
    own = rank.engine.module.model
    torch.testing.assert_close(logits(loaded), logits(own), rtol=0, atol=0)
    for name, buffer in own.named_buffers():
        assert torch.equal(buffer, loaded.get_buffer(name)), name
    return info


@pytest.mark.whole_run
@pytest.mark.parametrize("name", FAMILIES)
def test_the_export_is_the_model_that_was_loaded(tmp_path, name):
    source = make_folder(FAMILIES[name], tmp_path / "source")
    model = settings(source)
    rank = trained(model)
    rank.export(tmp_path / "out")
    assert tensor_shapes(tmp_path / "out") == tensor_shapes(source)
    check_reload(rank, tmp_path / "out", model)
    load_policy(settings(tmp_path / "out"))  # and it can be trained again


def test_fused_experts_stay_fused(tmp_path):
    source = make_folder(FAMILIES["qwen3_moe"], tmp_path / "source", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensor_shapes(source))
    rank = trained(settings(source))
    rank.export(tmp_path / "out")
    assert tensor_shapes(tmp_path / "out") == tensor_shapes(source)
    check_reload(rank, tmp_path / "out", settings(source))


def test_a_tied_weight_that_is_there_twice(tmp_path):
    source = make_folder(FAMILIES["llama, tied"], tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    rank = trained(settings(source))
    rank.export(tmp_path / "out")
    assert tensor_shapes(tmp_path / "out") == tensor_shapes(source)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    check_reload(rank, tmp_path / "out", settings(source))


def test_names_without_prefix_and_tensors_that_are_not_used(tmp_path):
    """GPT-2's own checkpoint: the names of the bare decoder, and buffers of an older library."""
    source = make_folder(GPT2, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    bare["speculative.head.weight"] = torch.randn(3, 4, dtype=torch.bfloat16)
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    rank = trained(settings(source))
    rank.export(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == bare.keys()
    for name in ("h.0.attn.bias", "speculative.head.weight"):
        assert torch.equal(found[name], bare[name])
    assert not torch.equal(found["wte.weight"], bare["wte.weight"])
    check_reload(rank, tmp_path / "out", settings(source))
    shutil.rmtree(source)
    with pytest.raises(ConfigError, match=r"no tensor 'h.0.attn.bias' any more"):
        rank.export(tmp_path / "later")


@pytest.mark.parametrize("name", ["llama, tied", "deepseek_v3", "mixtral"])
def test_a_large_model_is_written_in_several_files(tmp_path, name):
    source = make_folder(FAMILIES[name], tmp_path / "source", max_shard_size="30KB")
    rank = trained(settings(source))
    rank.export(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    policy = rank.engine.module
    write_weights(
        tmp_path / "out", policy.model, policy.origin, rank.engine.full_parameters(), 20_000
    )
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            keys = tensors.keys()
            assert all(index["weight_map"][key] == file for key in keys)
    assert tensor_shapes(tmp_path / "out") == tensor_shapes(source)
    check_reload(rank, tmp_path / "out", settings(source))


def test_weights_in_pickles_are_exported_as_safetensors(tmp_path):
    source = make_folder(FAMILIES["llama, untied"], tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    rank = trained(settings(source))
    rank.export(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    check_reload(rank, tmp_path / "out", settings(source))


def test_a_checkpoint_that_could_not_be_written_back_is_refused(tmp_path):
    source = make_folder(FAMILIES["llama, untied"], tmp_path / "source")
    policy = load_policy(settings(source))
    policy.model._weight_conversions = [WeightRenaming("key", "k_proj")]
    with pytest.raises(ConfigError, match=r"could not be exported.*k_proj.*nothing of that name"):
        find_origin(policy.model, str(source))


def test_quantized_models_are_refused(tmp_path):
    source = make_folder(FAMILIES["llama, untied"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized .fp8"):
        load_policy(settings(source))


REMOTE = """from transformers import LlamaForCausalLM
from .scale import SCALE

class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * SCALE
        return out
"""


def test_files_beside_the_weights_are_those_of_the_source(tmp_path, monkeypatch):
    """Config, generation config (also one the library refuses to write), tokenizer, template and
    remote code.
    """
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    source = make_tiny(tmp_path / "source", hidden=32, layers=1)
    (source / "remote.py").write_text(REMOTE)
    (source / "scale.py").write_text("SCALE = 1.0\n")
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "remote.Scaled"}, "my_own_key": [1, {"a": 2}]}
    (source / "config.json").write_text(json.dumps(config))
    sampling = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(sampling))
    (source / "notes.parquet").write_bytes(b"not part of a model")
    model = ModelConfig(path=str(source), trust_remote_code=True)
    rank = trained(model)
    rank.export(tmp_path / "out")
    kept = {path.name for path in source.iterdir()} - {"notes.parquet", "model.safetensors"}
    assert kept == {path.name for path in (tmp_path / "out").iterdir()} - {"model.safetensors"}
    for name in kept - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    check_reload(rank, tmp_path / "out", model)
    chat = [{"role": "user", "content": "1+1="}]
    templates = [
        load_tokenizer(ModelConfig(path=str(folder))).apply_chat_template(chat, tokenize=False)
        for folder in (source, tmp_path / "out")
    ]
    assert templates[0] == templates[1]


def test_a_tokenizer_of_its_own_goes_with_the_model(tmp_path):
    source = make_folder(
        transformers.LlamaConfig(**{**SIZES, "vocab_size": 120}), tmp_path / "source"
    )
    tokenizer = make_tiny(tmp_path / "tokenizer", hidden=32, layers=1)
    model = ModelConfig(path=str(source), tokenizer=str(tokenizer))
    trained(model).export(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tokenizer / "tokenizer.json"
    ).read_bytes()
    assert load_tokenizer(ModelConfig(path=str(tmp_path / "out"))).chat_template
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 120


def test_the_export_says_its_dtype_and_outlives_the_source(tmp_path):
    source = make_tiny(tmp_path / "source", hidden=32, layers=1)
    rank = trained(ModelConfig(path=str(source), dtype="bfloat16"))
    shutil.rmtree(source)
    rank.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        keys = tensors.keys()
        assert {tensors.get_tensor(key).dtype for key in keys} == {torch.bfloat16}
