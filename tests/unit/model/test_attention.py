"""Attention of bfloat16 models on a CPU: short bins in float32, long ones and passes without a
gradient as they were.
"""

import pytest
import torch

from tandem.engine.config.schema import ModelConfig
from tandem.engine.model.attention import NAME, SHORT, attend
from tandem.engine.model.load import load_policy


def inputs(length, dtype, grad=True):
    generator = torch.Generator().manual_seed(length)
    qkv = [
        torch.randn(2, 4, length, 16, generator=generator)
        .to(torch.bfloat16)
        .to(dtype)
        .requires_grad_(grad)
        for _ in range(3)
    ]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    return qkv, mask


class Module(torch.nn.Module):
    is_causal, num_key_value_groups = True, 1


def plain(qkv, mask):
    return torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask).transpose(1, 2)


def test_short_bins_are_as_exact_as_float32():
    qkv, mask = inputs(24, torch.bfloat16)
    exact, _ = inputs(24, torch.float32)
    out, reference = attend(Module(), *qkv, mask)[0], plain(exact, mask)
    assert out.dtype == torch.bfloat16 and torch.equal(out, reference.to(torch.bfloat16))
    out.float().square().sum().backward()
    reference.to(torch.bfloat16).float().square().sum().backward()
    for mine, theirs in zip(qkv, exact, strict=True):
        assert torch.equal(mine.grad, theirs.grad.to(torch.bfloat16))


@pytest.mark.parametrize("length, grad", [(SHORT + 1, True), (24, False)])
def test_everything_else_is_left_alone(length, grad):
    qkv, mask = inputs(length, torch.bfloat16, grad)
    assert torch.equal(attend(Module(), *qkv, mask)[0], plain(qkv, mask))


def test_a_bfloat16_model_uses_it_and_a_float32_model_does_not(tmp_path):
    from tandem.engine.model.tiny import make_tiny

    path = str(make_tiny(tmp_path / "tiny", hidden=32, layers=2))
    assert (
        load_policy(ModelConfig(path=path, dtype="bfloat16")).model.config._attn_implementation
        == NAME
    )
    assert load_policy(ModelConfig(path=path)).model.config._attn_implementation == "sdpa"
    assert (
        load_policy(
            ModelConfig(path=path, dtype="bfloat16", attention="eager")
        ).model.config._attn_implementation
        == "eager"
    )
