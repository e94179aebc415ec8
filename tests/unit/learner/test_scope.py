"""Which parameters train: LoRA, layers, random halves (catalogue #66), in one process."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from learner_cases import SPEC, equal, hook_plan, make_plan, make_rows, weights
from safetensors.torch import load_file
from scope_cases import SCOPES, config_of, inline, scoped_policy

from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.config.scope import ScopeConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.rank import LearnerRank
from tandem.engine.model.adapters import add_adapters, hf_tensors
from tandem.engine.model.halves import ALWAYS, Halves
from tandem.engine.model.load import load_policy
from tandem.engine.model.policy import Policy, hf_parameters
from tandem.engine.model.resolve import resolve_model
from tandem.engine.model.scope import check_scope, skeleton, target_layers
from tandem.launch.export import export
from tandem.launch.machine import memory_need

FULL = ScopeConfig()
LORA = SCOPES["lora"]
ROWS = make_rows(5)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=3))


def train(rank, steps, budget=64):
    for step in steps:
        rank.step(make_plan(make_rows(step), budget=budget, step=step))
    return rank


def same(left, right):
    """Whether log-probs of rows are equal to the bit."""
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right, strict=True))


def near(left, right, tolerance):
    return all(
        np.allclose(a, b, atol=tolerance, equal_nan=True) for a, b in zip(left, right, strict=True)
    )


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- LoRA


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_change_nothing_at_the_start_and_the_base_never(model_path, dtype):
    """Nor does the reference: it is the base with the adapters off, and no model is loaded for
    it."""
    base = inline(model_path, FULL, dtype=dtype)
    right = base.logprobs(ROWS, 0.8)
    rank = inline(model_path, LORA, dtype=dtype)
    assert same(rank.logprobs(ROWS, 0.8), right)
    assert equal(weights(rank), weights(base))  # what engines get at first
    train(rank, range(3))
    frozen = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in rank.engine.module.model.named_parameters()
        if "lora_" not in name
    }
    assert all(torch.equal(frozen[name], p) for name, p in base.engine.full_parameters())
    assert same(rank.logprobs(ROWS, 0.8, model="reference"), right) and rank.models.loaded == {}
    assert not near(rank.logprobs(ROWS, 0.8), right, 1e-3)
    assert all(p.requires_grad for n, p in rank.engine.module.named_parameters() if "lora_" in n)


def test_a_reference_that_was_set_is_the_merged_model_and_part_of_a_checkpoint(
    model_path, tmp_path
):
    rank = train(inline(model_path, LORA), range(2))
    present = rank.logprobs(ROWS, 0.8)
    rank.set_reference()
    rank.save(tmp_path)
    train(rank, range(2, 4))
    assert near(rank.logprobs(ROWS, 0.8, model="reference"), present, 1e-5)
    assert not near(rank.logprobs(ROWS, 0.8), present, 1e-3)
    again = inline(model_path, LORA)
    again.load(tmp_path)
    assert same(
        again.logprobs(ROWS, 0.8, model="reference"), rank.logprobs(ROWS, 0.8, model="reference")
    )


def test_quantities_beside_the_reference_need_no_second_model(model_path):
    """With ZeRO-3 they do, and are the same."""
    found = []
    for splits_weights in (False, True):
        rank = train(inline(model_path, LORA), range(2))
        rank.engine.splits_weights = splits_weights
        metrics = rank.step(hook_plan("measured")).metrics
        found.append((metrics["loss/sft"], metrics["grad_norm"]))
        assert bool(rank.models.loaded) == splits_weights
    assert found[0] == found[1] and found[0][1] > 0


def test_an_average_follows_the_merged_weights(model_path):
    config = replace(
        config_of(model_path, LORA), models={"slow": OtherModelConfig("ema", rate=0.25)}
    )
    rank = LearnerRank(config, model_path, SPEC, LocalEngine(scoped_policy(config), config.learner))
    parameters = hf_parameters(rank.models.weights_of("slow"))
    expected = {name: tensor.clone() for name, tensor in parameters}
    for step in range(2):
        train(rank, [step])
        for name, tensor in rank.engine.full_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor
    for name, tensor in hf_parameters(rank.models.weights_of("slow")):
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_the_merged_export_computes_as_the_learner(model_path, tmp_path):
    rank = train(inline(model_path, LORA), range(2))
    rank.export(tmp_path / "model")
    merged = inline(str(tmp_path / "model"), FULL)
    assert near(merged.logprobs(ROWS, 0.8), rank.logprobs(ROWS, 0.8), 1e-5)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.keys() == load_file(f"{model_path}/model.safetensors").keys()


def test_peft_reads_the_exported_adapters(model_path, tmp_path):
    from peft import PeftModel

    scope = replace(LORA, export="adapter", targets=("q_proj", "mlp"), rslora=True)
    rank = train(inline(model_path, scope), range(2))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    rank.export(run / "model")
    out = export(run, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == LORA.rank
    model = load_policy(ModelConfig(path=model_path)).model
    merged = PeftModel.from_pretrained(model, str(out)).merge_and_unload()
    right = dict(rank.engine.full_parameters())
    for name, tensor in merged.named_parameters():
        assert torch.allclose(tensor, right[name], atol=1e-6), name
    with pytest.raises(ConfigError, match="holds LoRA adapters without their model"):
        resolve_model(ModelConfig(path=str(out)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_by_hand(family):
    """W + alpha / rank B A; GPT-2 holds its weights transposed."""
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
        target = "transformer.h.1.attn.c_attn"
    else:
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        target = "model.layers.1.mlp.up_proj"
    policy = Policy(transformers.AutoModelForCausalLM.from_config(config))
    before = dict(policy.model.state_dict())
    names = target_layers(policy.model, ())
    assert target in names and "lm_head" not in names
    policy.adapters = add_adapters(policy.model, names, replace(LORA, alpha=6.0), seed=1)
    layer = policy.adapters[target]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    found = {tensor.name: tensor.value() for tensor in hf_tensors(policy)}
    delta = 6.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if family == "gpt2":
        delta = delta.T
    x = torch.randn(3, 32)
    assert torch.allclose(found[f"{target}.weight"], before[f"{target}.weight"] + delta, atol=1e-5)
    plain = policy.model.get_submodule(target).base_layer
    with torch.no_grad():
        through_adapter = policy.model.get_submodule(target)(x)
        plain.weight.copy_(found[f"{target}.weight"])
        assert torch.allclose(plain(x), through_adapter, atol=1e-4)


def test_dropout_is_for_gradients_alone(model_path):
    rank = train(inline(model_path, LORA), range(1))
    dropped = inline(model_path, replace(LORA, dropout=0.5))
    train(dropped, range(1))  # B = 0: dropout reaches the gradient of B alone
    assert same(dropped.logprobs(ROWS, 0.8), dropped.logprobs(ROWS, 0.8))
    assert not equal(weights(rank), weights(dropped))


# -- halves


def test_the_other_half_stays_to_the_bit_with_its_moments(model_path):
    """Under momentum and weight decay; what another draw frees moves again (#66)."""
    rank = inline(model_path, ScopeConfig("random_half", every=2))
    halves, optimizer = rank.engine.module.halves, rank.engine.optimizer
    seen = [weights(rank)]
    draws = []
    for step in range(4):
        frozen = halves.draw(step // 2)
        kept = {
            group["unit"]: [dict(optimizer.state[p]) for p in group["params"]]
            for group in optimizer.param_groups
            if group["unit"] not in frozen
        }
        kept = {
            unit: [{k: v.clone() for k, v in one.items()} for one in states]
            for unit, states in kept.items()
        }
        train(rank, [step])
        seen.append(weights(rank))
        draws.append(moved(seen[-2], seen[-1]))
        for group in optimizer.param_groups:
            for state, before in zip(group["params"], kept.get(group["unit"], ()), strict=False):
                assert equal(dict(optimizer.state[state]), before)
    assert draws[0] == draws[1] and draws[2] == draws[3] and draws[1] != draws[2]
    assert "model.embed_tokens.weight" in draws[0] & draws[2]
    assert draws[2] - draws[0] and draws[0] - draws[2]


def test_a_draw_is_the_half_of_the_paper():
    """2 of q, k, v, o; of the MLP 2 of 3 in half of the layers, 1 of 3 in the others; norms."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=8,
        num_attention_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    halves = Halves(model, every=1, seed=0)
    for number in range(5):
        chosen = halves.draw(number)
        count = {
            block: [len(chosen & set(units)) for units in layers]
            for block, layers in halves.blocks.items()
        }
        assert count["self_attn"] == [2] * 8 and count["norms"] == [1] * 8
        assert sorted(count["mlp"]) == [1] * 4 + [2] * 4
        sizes = dict.fromkeys((False, True), 0)
        for parameter in model.model.layers.parameters():
            sizes[halves.unit_of[id(parameter)] in chosen] += parameter.numel()
        assert sizes[True] / sum(sizes.values()) == pytest.approx(0.5, abs=0.01)
        assert ALWAYS in chosen
    assert halves.draw(0) == Halves(model, every=1, seed=0).draw(0)
    assert halves.draw(0) != halves.draw(1) != Halves(model, every=1, seed=1).draw(1)


# -- every scope


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_exact_and_needs_only_what_trains(model_path, tmp_path, name, dtype):
    """Resumed in the middle of a round, into a learner that never saw its draw."""
    rank = train(inline(model_path, SCOPES[name], dtype=dtype), range(3))
    rank.save(tmp_path)
    train(rank, range(3, 6))
    again = inline(model_path, SCOPES[name], dtype=dtype)
    again.load(tmp_path)
    assert equal(weights(train(again, range(3, 6))), weights(rank))
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "weights.safetensors").values())
    critic = sum(p.numel() for p in rank.engine.module.critic.parameters())
    config = config_of(model_path, SCOPES[name])
    trained = check_scope(config, model_path)
    if trained is None:  # of a half, all may have trained
        trained = sum(p.numel() for p in rank.engine.module.model.parameters())
    assert saved == trained + critic


@pytest.mark.parametrize("name", SCOPES)
def test_micro_batches_do_not_matter(model_path, name):
    whole = weights(train(inline(model_path, SCOPES[name]), range(3), budget=10_000))
    parts = weights(train(inline(model_path, SCOPES[name]), range(3), budget=24))
    before = weights(inline(model_path, SCOPES[name]))
    assert moved(before, whole) == moved(before, parts)
    for key, tensor in whole.items():
        assert torch.allclose(parts[key], tensor, atol=2e-5), key


def test_chosen_layers_alone_move(model_path):
    rank = inline(model_path, ScopeConfig("layers", train=("1-2", "layers.0.mlp", "norm")))
    before = weights(rank)
    changed = moved(before, weights(train(rank, range(2))))
    left = before.keys() - changed
    assert left == {
        "model.embed_tokens.weight",
        *[name for name in before if "layers.0.self_attn" in name],
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


def test_the_full_scope_has_the_plain_optimizer_over_all(model_path):
    engine = inline(model_path, FULL).engine
    assert type(engine.optimizer) is torch.optim.AdamW and len(engine.optimizer.param_groups) == 1
    assert engine.module.halves is None and not engine.module.adapters
    assert not any(p._backward_hooks for p in engine.module.parameters())
    assert check_scope(Config(), "nowhere") is None  # no model is looked at


# -- before a run


@pytest.mark.parametrize(
    "scope, message",
    [
        (ScopeConfig("lora", targets=("q_porj",)), "scope.targets has 'q_porj'.*q_proj"),
        (ScopeConfig("lora", targets=("lm_head",)), "no linear layer of the decoder"),
        (ScopeConfig("layers", train=("2-3",)), "the model has layers 0-2"),
        (ScopeConfig("layers", train=("mlp.up_prj",)), "scope.train has 'mlp.up_prj'.*up_proj"),
    ],
)
def test_what_names_nothing_is_told_before_a_weight_is_loaded(model_path, scope, message):
    with pytest.raises(ConfigError, match=message):
        check_scope(config_of(model_path, scope), model_path)


def test_memory_counts_what_trains(model_path):
    config = config_of(model_path, LORA, zero_stage=0)
    config = replace(config, mode="cluster")
    full = memory_need(replace(config, scope=FULL), model_path).rank
    lora = memory_need(config, model_path).rank
    model = skeleton(config, model_path)
    size = sum(p.numel() for p in model.parameters())
    assert full - lora == (size - check_scope(config, model_path)) * 12
