"""engine/weights/digest.py: equal bytes give equal text everywhere; the faults that a weight
transfer can have change it.
"""

import subprocess
import sys

import pytest
import torch

from tandem.engine.weights.digest import BLOCK, FEWEST, combine, digest

SIZE = 2 * FEWEST * BLOCK + 7  # rows for the matmul, whatever the dtype, and a rest


def sample(dtype=torch.float32, size=SIZE):
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_layout_and_alignment_do_not_matter(dtype):
    x = sample(dtype)
    assert digest(x) == digest(x.clone())
    # not aligned to a word for 1- and 2-byte types
    assert digest(x[1:]) == digest(x[1:].clone())
    square = x[:120].view(10, 12)
    assert digest(square.t()) == digest(square.t().contiguous()) != digest(square)
    digest(x[:0]), digest(x[0])  # empty and scalar


@pytest.mark.whole_run
def test_another_process_agrees():
    code = (
        "import torch; from tandem.engine.weights.digest import digest; "
        f"print(digest(torch.randn({SIZE}, "
        "generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)))"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip() == digest(sample(torch.bfloat16))


def test_faults_are_seen():
    x = sample()
    seen = {digest(x), digest(x.view(1, -1)), digest(x.view(torch.int32))}  # shape and dtype count
    for change in (
        lambda y: y[0].neg_(),
        lambda y: y[-1].neg_(),
        lambda y: y[:2].neg_(),
        lambda y: y.neg_(),
        lambda y: y.zero_(),
        lambda y: y.copy_(torch.cat([y[BLOCK : 2 * BLOCK], y[:BLOCK], y[2 * BLOCK :]])),
        lambda y: y[:2].copy_(y[:2].flip(0)),
        lambda y: y[-5:].zero_(),
    ):
        y = x.clone()
        change(y)
        seen.add(digest(y))
    assert len(seen) == 3 + 8


def test_combine_is_over_names_and_values():
    assert combine({"a": "1", "b": "2"}) == combine({"b": "2", "a": "1"})
    assert (
        len({combine({"a": "1", "b": "2"}), combine({"a": "2", "b": "1"}), combine({"a": "1"})})
        == 3
    )
