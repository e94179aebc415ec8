"""The weight files of a model folder: which there are, what they hold and whether they are whole.

Only headers are read, so that it costs little before a run and can name the file that is cut off.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.engine.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEADER_LIMIT = 1 << 30  # bytes; a longer header is no header


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads in a local folder, none where it holds no weights.

    Raises ConfigError for an index that cannot be read or that names files which are not there.
    """
    for single, index in ((SAFE, SAFE_INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return indexed_files(folder / index)
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{index} cannot be read as an index of weight files ({type(error).__name__}: "
            f"{error}), expected JSON with weight_map; copy or download the model again"
        ) from None
    absent = [path.name for path in files if not path.is_file()]
    if absent or not files:
        raise ConfigError(
            f"{index} names {len(files)} weight files, but {len(absent)} of them are not beside "
            f"it, among them {', '.join(absent[:3])}; copy or download the model again"
        )
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name in the files: shape} of all tensors of a local model folder.

    Raises ConfigError for damaged files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        read = safe_shapes if file.suffix == ".safetensors" else pickled_shapes
        shapes |= read(file)
    return shapes


def safe_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    found = file.stat().st_size
    try:
        with file.open("rb") as f:
            length = struct.unpack("<Q", f.read(8))[0]
            if length > min(HEADER_LIMIT, found):
                raise ValueError("no header")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        expected = 8 + length + max(ends)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ConfigError(
            f"{file} ({found} bytes) is damaged: its first bytes are not those of a safetensors "
            "file; copy or download the model again"
        ) from None
    if found != expected:
        raise ConfigError(
            f"{file} is damaged: it has {found} bytes, its header says {expected}; copy or "
            "download the model again"
        )
    return shapes


def pickled_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in read_pickled(file).items()}


def read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pytorch_model.bin: from the disk as they are used where the format allows
    it. Code in the file is never run.
    """
    import torch

    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    # torch raises many types for what is not a checkpoint, and advises to run code from it
    except Exception as error:
        raise ConfigError(
            f"{file} ({file.stat().st_size} bytes) is damaged, or holds more than tensors "
            f"({type(error).__name__}); code in it is never run. "
            "Copy or download the model again, in safetensors if there is such a version"
        ) from None
    tensors = isinstance(state, dict) and all(
        isinstance(value, torch.Tensor) for value in state.values()
    )
    if not tensors or not state:
        raise ConfigError(
            f"{file} holds no weights: expected a dict of tensors by name, found "
            f"{type(state).__name__}; copy or download the model again"
        )
    return state


def read_tensors(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of some tensors, as they are in the files.

    Raises ConfigError if they are no longer there.
    """
    left = set(names)
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            here = left & safe_shapes(file).keys()
            yield from read_safe(file, sorted(here))
        else:
            state = read_pickled(file)
            here = left & state.keys()
            yield from ((name, state[name]) for name in sorted(here))
        left -= here
    if left:
        raise ConfigError(
            f"{folder} has no tensor {min(left)!r} any more (and {len(left) - 1} others), which an "
            "export copies from there: the model's folder must stay as it is while the run goes on"
        )


def read_safe(file: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        for name in names:
            yield name, tensors.get_tensor(name)
