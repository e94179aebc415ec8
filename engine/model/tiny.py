"""A small Llama made from scratch as an ordinary Hugging Face folder: the model of the demo, of the
tests and of `model.path: tandem:tiny`.

Real in all but size: tied embeddings, a character-level tokenizer with BOS, EOS, padding and a chat
template, safetensors, a generation config. Transformers and vLLM load it unchanged. The same
arguments give the same bytes (with the same library versions).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.engine.core.errors import ConfigError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_folder() -> Path:
    """Where `tandem:tiny` is, made on first use: ./models/tiny, else in the user's cache, else
    beside temporary files, whichever is there or can be written first. Raises ConfigError.
    """
    failures = []
    for folder in (Path("models/tiny").absolute(), *caches()):
        try:
            if not (folder / "config.json").is_file():
                make_tiny(folder)
            return folder.resolve()
        except OSError as error:
            if (folder / "config.json").is_file():  # another run has just made it
                return folder.resolve()
            if folder.exists():
                raise ConfigError(
                    f"model.path is tandem:tiny, but {folder} holds something else "
                    "than a model (no config.json); remove it"
                ) from None
            failures.append(f"{folder}: {error.strerror}")
    raise ConfigError(
        f"model.path is tandem:tiny, which can be written nowhere here ({'; '.join(failures)}); "
        "start in a folder that can be written"
    )


def caches() -> Iterator[Path]:
    """Folders of this user, in which nobody else can put a model."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):
        yield Path(cache, "tandem", "tiny")
    try:
        own = Path(tempfile.gettempdir(), f"tandem-{os.getuid()}")
        own.mkdir(mode=0o700, exist_ok=True)
        if own.stat().st_uid == os.getuid():
            yield own / "tiny"
    except OSError:
        return


def make_tiny(
    folder: str | Path, hidden: int = 128, layers: int = 4, heads: int = 2, seed: int = 0
) -> Path:
    """Write the model (0.67 M parameters by default, float32) and its tokenizer to `folder`,
    complete or not at all; returns the folder.

    Raises FileExistsError if `folder` already holds something. Two processes may race for one
    folder: both return, one wrote.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=SPECIALS.index("<eos>"),
        pad_token_id=SPECIALS.index("<pad>"),
        attention_bias=False,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    with complete_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        # not the model's own save_pretrained, which imports DeepSpeed where it is installed
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        save_file(
            dict(model.named_parameters()),
            Path(temporary) / "model.safetensors",
            metadata={"format": "pt"},
        )
    return Path(folder)


def make_tokenizer():
    """One token per printable ASCII character; anything else is <unk>.

    Plain text gets <bos> in front, as Llama tokenizers do it.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@contextmanager
def complete_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block succeeds and is
    removed when it fails: `folder` is complete or absent.

    Raises FileExistsError if `folder` holds something at the start. If another process puts it
    there meanwhile, that one stays.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; remove it to make it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # not the race: a real failure
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
