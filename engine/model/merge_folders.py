"""Merge model folders file by file and tensor by tensor.

The output has the files of the base, or of the first model where there is none: the same shards
with the same headers and index, and its config, tokenizer and code. Only the data of its tensors
are new, in its dtypes. In memory are one tensor at a time of every model, in float32, and a few
more of that size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tandem.engine.core.errors import ConfigError
from tandem.engine.model.export import MODEL_FILES, TOKENIZER_FILES, matching_files
from tandem.engine.model.merge import Merge
from tandem.engine.model.weight_files import SAFE, SAFE_INDEX, safe_shapes, weight_files

FLOATS = ("F64", "F32", "F16", "BF16")  # the dtypes that are merged, as safetensors calls them
# (input embedding, output embedding) of a model that ties them, by how their names end
TIED = (
    ("embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("word_embeddings.weight", "lm_head.weight"),
    ("embed_in.weight", "embed_out.weight"),
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, as its header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes among those of all tensors of the file

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class ModelFolder:
    path: Path

    @cached_property
    def config(self) -> dict:
        try:
            return json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} is no model folder: its config.json: {error}") from None

    @cached_property
    def files(self) -> list[Path]:
        files = weight_files(self.path)
        if not files or files[0].suffix != ".safetensors":
            raise ConfigError(
                f"{self.path} has no weights in safetensors, which merging reads; save the model "
                "once with transformers' save_pretrained"
            )
        return files

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        found = {}
        for file in self.files:
            safe_shapes(file)  # raises if it is damaged
            for name, entry in read_header(file).items():
                start = entry["data_offsets"][0]
                found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start)
        return found

    @cached_property
    def tied(self) -> dict[str, str]:
        """{output embedding: input embedding} where the files hold both and they are one tensor.

        Raises ConfigError if they differ although the config ties them.
        """
        if self.config_ties() is False:
            return {}
        found = {}
        for first, second in TIED:
            for embedding in self.names_ending(first):
                for output in self.names_ending(second):
                    if self.is_same(embedding, output):
                        found[output] = embedding
        return found

    def config_ties(self) -> bool | None:
        """None where the config does not say."""
        text = self.config.get("text_config")
        trees = [self.config, text if isinstance(text, dict) else {}]
        said = [tree["tie_word_embeddings"] for tree in trees if "tie_word_embeddings" in tree]
        return any(said) if said else None

    def names_ending(self, end: str) -> list[str]:
        return [name for name in self.tensors if name.endswith(end)]

    def is_same(self, embedding: str, output: str) -> bool:
        same = torch.equal(self.read(embedding), self.read(output))
        if not same and self.config_ties():
            raise ConfigError(
                f"{self.path}: its config ties {output!r} to {embedding!r}, but the files hold two "
                "different tensors; set tie_word_embeddings to what the model is"
            )
        return same

    def read(self, name: str) -> Tensor:
        with safe_open(self.tensors[name].file, "pt") as file:
            return file.get_tensor(name)


def merge_folders(merge: Merge, out: Path, models: Sequence[Path], base: Path | None) -> int:
    """Write the merged model into the empty folder `out`; returns the number of tensors.

    Raises ConfigError, which names the tensor, if the models are not of one make.
    """
    merge.check(len(models), base is not None)
    folders = [ModelFolder(path) for path in models]
    base_folder = None if base is None else ModelFolder(base)
    layout = base_folder or folders[0]
    for folder in folders:
        check_alike(layout, folder)
    for name, content in matching_files(layout.path, (*MODEL_FILES, *TOKENIZER_FILES)).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    for file in layout.files:
        names = [name for name, stored in layout.tensors.items() if stored.file == file]
        names.sort(key=lambda name: layout.tensors[name].start)
        with (out / file.name).open("wb") as target:
            target.write(header_bytes(file))
            for name in names:
                # tied copies are one tensor
                source = layout.tied.get(name, name)
                tensor = merged(merge, source, layout, folders, base_folder)
                target.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if (layout.path / SAFE_INDEX).is_file() and layout.files[0].name != SAFE:
        (out / SAFE_INDEX).write_bytes((layout.path / SAFE_INDEX).read_bytes())
    return len(layout.tensors)


def merged(
    merge: Merge,
    name: str,
    layout: ModelFolder,
    folders: Sequence[ModelFolder],
    base: ModelFolder | None,
) -> Tensor:
    """One tensor in the dtype of the files."""
    stored = layout.tensors[name]
    if stored.dtype not in FLOATS:
        return the_same(name, layout, folders)
    kind = torch.float64 if stored.dtype == "F64" else torch.float32
    models = [folder.read(name).to(kind) for folder in folders]
    start = None if base is None else base.read(name).to(kind)
    result = merge.tensor(name, start, models).to(layout.read(name).dtype)
    if not result.isfinite().all():
        raise ConfigError(
            f"tensor {name!r} would have values that are not finite after merging; is one of the "
            f"models damaged, or a scale too large for {stored.dtype}?"
        )
    return result


def the_same(name: str, layout: ModelFolder, folders: Sequence[ModelFolder]) -> Tensor:
    """A tensor of whole numbers, which cannot be merged."""
    tensor = layout.read(name)
    for folder in folders:
        if not torch.equal(folder.read(name), tensor):
            raise ConfigError(
                f"tensor {name!r} of dtype {layout.tensors[name].dtype} differs between "
                f"{layout.path} and {folder.path}; only {', '.join(FLOATS)} can be merged"
            )
    return tensor


def check_alike(layout: ModelFolder, other: ModelFolder) -> None:
    """Both have the same tensors: names, shapes, dtypes; a tied output embedding may be absent."""
    for folder in (layout, other):
        if "quantization_config" in folder.config:
            raise ConfigError(f"{folder.path} is quantized; merge the model that it was made from")
    expected, found = layout.tensors, other.tensors
    for name in sorted(expected.keys() - layout.tied.keys()):
        if name not in found:
            raise ConfigError(
                f"{other.path} has no tensor {name!r}, but {layout.path} has it ({expected[name]})"
            )
        if str(found[name]) != str(expected[name]):
            raise ConfigError(
                f"tensor {name!r} is {found[name]} in {other.path}, expected {expected[name]} as "
                f"in {layout.path}"
            )
    for name in sorted((layout.tied.keys() & found.keys()) - other.tied.keys()):
        raise ConfigError(
            f"{other.path} has an output embedding {name!r} of its own, but in {layout.path} it is "
            "tied to the input embedding"
        )
    for name in sorted(found.keys() - other.tied.keys() - expected.keys()):
        raise ConfigError(
            f"{layout.path} has no tensor {name!r}, but {other.path} has it ({found[name]})"
        )


def header_bytes(file: Path) -> bytes:
    """The first bytes of a safetensors file, up to the data of its tensors."""
    with file.open("rb") as source:
        length = source.read(8)
        return length + source.read(struct.unpack("<Q", length)[0])


def read_header(file: Path) -> dict[str, dict]:
    header = json.loads(header_bytes(file)[8:])
    header.pop("__metadata__", None)
    return header
