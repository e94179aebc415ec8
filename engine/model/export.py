"""The policy as the Hugging Face folder that was loaded, with the trained weights in it.

Tensors have the names and the layout of the checkpoint (transformers 5 holds the experts of a layer
in one tensor; most checkpoints do not). Buffers that belong to the checkpoint are written as they
are, and so are its tensors that this model does not use. Config, tokenizer, generation config and
remote code are the files of the source, byte for byte but for the dtype in config.json.

Not through `save_pretrained`: it writes the library's own config and tokenizer formats, refuses
some generation configs, wants the whole model in memory and imports DeepSpeed where it is
installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.adapters import plain_name
from tandem.engine.model.resolve import load_tokenizer
from tandem.engine.model.weight_files import SAFE, SAFE_INDEX, read_tensors, tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Named = Iterable[tuple[str, Tensor]]

# a model that is larger is written in several files; also what rank 0 holds at most
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.bpe",
    "additional_chat_templates/*.jinja",
)
MODEL_FILES = ("config.json", "generation_config.json", "*.py")


@dataclass(frozen=True)
class Origin:
    """The checkpoint a model was loaded from, as far as its weights go."""

    folder: Path
    names: frozenset[str]  # of all its tensors
    unused: tuple[str, ...]  # of those that the model lacks (speculative heads, vision parts)


def find_origin(model: PreTrainedModel, path: str) -> Origin:
    """Compare the checkpoint at `path` with what an export of `model` would write: names and
    shapes, no data.

    Raises ConfigError if a tensor that the model holds would not be written back as it was.
    """
    folder = local_folder(path)
    shapes = tensor_shapes(folder)
    empty = {}
    for name, tensor in model.state_dict().items():
        empty[name] = torch.empty_like(tensor, device="meta")
    written = checkpoint_layout(model, empty, shapes)
    used = used_names(model, shapes)
    for name in sorted(used):
        found = None
        words = "nothing of that name"
        if name in written:
            found = tuple(written[name].shape)
            words = f"shape {list(found)}"
        if found != shapes[name]:
            raise ConfigError(
                f"model {path!r} could not be exported after training: its tensor {name!r} of "
                f"shape {list(shapes[name])} would be written as {words}; save the model once "
                "with transformers' save_pretrained and train that"
            )
    unused = sorted(shapes.keys() - used)
    return Origin(folder, frozenset(shapes), tuple(unused))


def local_folder(path: str) -> Path:
    """A model folder, or where the hub's files of a model were put when it was loaded."""
    if Path(path).is_dir():
        return Path(path).absolute()
    from transformers.utils.hub import cached_file

    found = cached_file(path, "config.json")
    assert found is not None  # it raises an error where there is none
    config = Path(found).absolute()
    return config.parent


def checkpoint_layout(
    model: PreTrainedModel, state: dict[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """`state`, which has the model's own names, with the names and layout of the checkpoint it was
    loaded from, which has `names`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    known = frozenset(names)
    prefix = f"{model.base_model_prefix}."
    reverted = revert_weight_conversion(model, state)
    found = {}
    for name, tensor in reverted.items():
        name = with_prefix_of(name, prefix, known)
        found[name] = tensor
    return found


def with_prefix_of(name: str, prefix: str, known: frozenset[str]) -> str:
    """Checkpoints of the bare decoder lack the prefix that its model with a head has (GPT-2's
    `transformer.`), or the other way round.
    """
    candidates = (name, name.removeprefix(prefix), prefix + name)
    for candidate in candidates:
        if candidate in known:
            return candidate
    return name


def used_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of a checkpoint's names that are loaded into the model, by transformers' own rules."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    prefix = model.base_model_prefix
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    used = set()
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
        plain, _ = rename_source_key(name, [], [], prefix, state)
        if renamed in state or plain in state:
            used.add(name)
    return used


def persistent_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """What belongs to a checkpoint beside the parameters, e.g. the router's bias of DeepSeek-V3."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            found[name] = tensor
    return found


def write_weights(
    folder: Path,
    model: PreTrainedModel,
    origin: Origin,
    parameters: Named,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the parameters (name, full tensor, valid until the next is asked for), the buffers and
    the unused tensors of the checkpoint.

    At most `shard_bytes` and one layer are held in memory.
    """
    aliased = with_aliases(model, origin, parameters)
    buffers = persistent_buffers(model)
    own = chain(aliased, buffers.items())
    unused = read_tensors(origin.folder, origin.unused)
    stream = chain(pieces(own, converted=True), pieces(unused, converted=False))
    shards = []
    for part in by_layers(stream, shard_bytes):
        own_part = {}
        others = {}
        for piece in part:
            side = own_part if piece.converted else others
            side[piece.name] = piece.tensor
        state = checkpoint_layout(model, own_part, origin.names) | others
        path = folder / f"shard-{len(shards)}.safetensors"
        whole = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(whole, path, metadata={"format": "pt"})
        sizes = {name: tensor.nbytes for name, tensor in state.items()}
        shards.append((path, sizes))
    name_shards(folder, shards)


class Piece(NamedTuple):
    """A tensor to be written."""

    name: str
    tensor: Tensor
    converted: bool  # it is the model's, and gets the checkpoint's name and layout


def pieces(named: Named, converted: bool) -> Iterator[Piece]:
    for name, tensor in named:
        yield Piece(name, tensor, converted)


def with_aliases(
    model: PreTrainedModel, origin: Origin, parameters: Named
) -> Iterator[tuple[str, Tensor]]:
    """Tied weights a second time where the checkpoint has them under both names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        of_parameter = names.setdefault(id(parameter), [])
        of_parameter.append(plain_name(name))
    aliases = {first: others for first, *others in names.values()}
    for name, tensor in parameters:
        yield name, tensor
        for alias in aliases[name]:
            if alias in origin.names:
                yield alias, tensor


def by_layers(stream: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Copies on the CPU, in lists of whole layers: a list ends with the layer that makes it larger
    than `limit` bytes.

    Whole, because one tensor of the checkpoint may come from several of the layer's, or the other
    way round.
    """
    part: list[Piece] = []
    size = 0
    layer = None
    for piece in stream:
        own_layer = layer_of(piece.name)
        if size >= limit and own_layer != layer:
            yield part
            part = []
            size = 0
        tensor = piece.tensor.detach()
        copy = tensor.to("cpu", copy=True)
        part.append(piece._replace(tensor=copy))
        size += copy.nbytes
        layer = own_layer
    yield part


def layer_of(name: str) -> str:
    """The name up to its first number: `model.layers.3.mlp.up_proj.weight` -> `model.layers.3.`"""
    match = re.match(r".*?\.\d+\.", name)
    return name if match is None else match[0]


def name_shards(folder: Path, shards: list[tuple[Path, dict[str, int]]]) -> None:
    """Give the files the names that loaders look for: one file, or several and their index."""
    if len(shards) == 1:
        path, _ = shards[0]
        path.rename(folder / SAFE)
        return
    places = {}
    total = 0
    for number, (path, sizes) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        places |= dict.fromkeys(sizes, final)
        total += sum(sizes.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(places.items())),
    }
    text = json.dumps(index, indent=2)
    (folder / SAFE_INDEX).write_text(f"{text}\n")


def read_files(model: ModelConfig) -> dict[str, bytes]:
    """{name: content} of the files beside the weights, of the model and of its tokenizer; read at
    the start, so that a later change of the source does not matter.
    """
    source = model.tokenizer or model.path
    if not Path(source).is_dir():
        load_tokenizer(model)  # brings the hub's files here
    found = matching_files(tokenizer_folder(source), (*TOKENIZER_FILES, "*.py"))
    return found | matching_files(local_folder(model.path), MODEL_FILES)


def tokenizer_folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file

    for name in ("tokenizer_config.json", "tokenizer.json"):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found:
            return Path(found).parent
    return local_folder(source)


def matching_files(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                found[name] = path.read_bytes()
    return found


def write_files(folder: Path, files: dict[str, bytes], dtype: str) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            content = with_dtype(content, dtype)
        path.write_bytes(content)


def with_dtype(content: bytes, dtype: str) -> bytes:
    """config.json with the dtype that the weights have now."""
    tree = json.loads(content)
    set_dtype(tree, dtype)
    if "dtype" not in tree and "torch_dtype" not in tree:
        tree["dtype"] = dtype
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    return f"{text}\n".encode()


def set_dtype(tree: dict, dtype: str) -> None:
    for key, value in tree.items():
        if key in ("dtype", "torch_dtype"):
            tree[key] = dtype
        elif isinstance(value, dict):
            set_dtype(value, dtype)
