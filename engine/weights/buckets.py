"""How parameters are packed into buffers: both ends of a CPU channel compute the same plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 16  # bytes; a view of a packed buffer must start where its dtype may start


@dataclass(frozen=True)
class Piece:
    """One parameter in a buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the buffer
    size: int  # bytes

    @property
    def end(self) -> int:
        return self.start + self.size

    def view(self, buffer: Tensor) -> Tensor:
        """The parameter as it lies in the buffer (uint8)."""
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


Shape = tuple[str, torch.dtype, tuple[int, ...]]  # of one parameter: name, dtype, full shape


def buckets(parameters: Iterable[Shape], limit: int) -> Iterator[list[Piece]]:
    """Consecutive parameters packed into buffers of at most `limit` bytes; one larger parameter has
    a buffer to itself.
    """
    bucket: list[Piece] = []
    end = 0
    for name, dtype, shape in parameters:
        size = torch.Size(shape).numel() * dtype.itemsize
        if bucket and end + size > limit:
            yield bucket
            bucket, end = [], 0
        bucket.append(Piece(name, dtype, tuple(shape), end, size))
        end += -(-size // ALIGN) * ALIGN
    if bucket:
        yield bucket


def size_of(bucket: list[Piece]) -> int:
    return max(1, bucket[-1].end)


def largest(parameters: Iterable[Shape], limit: int) -> int:
    """Bytes of the largest buffer."""
    return max(map(size_of, buckets(parameters, limit)))
