"""Inputs of a head, and what its tests watch."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def inputs(n=13, hidden=6, vocabulary=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    return (
        make(n, hidden),
        make(vocabulary, hidden),
        make(vocabulary),
        torch.randint(vocabulary, (n,), generator=generator),
    )


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned, views
    included.
    """

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
