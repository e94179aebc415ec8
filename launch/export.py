"""`tandem export`: the model of a run or of one checkpoint as a plain Hugging Face folder
(safetensors, config, tokenizer); of a run with scope.export=adapter its adapters in peft's format.

Every checkpoint holds that folder already, so nothing is started: it is compared with the
checkpoint's manifest and copied.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tandem.engine.core.errors import CheckpointError, ConfigError
from tandem.engine.core.folder_lock import owned_from_beside
from tandem.engine.loop.checkpoint import Checkpoints, verify
from tandem.engine.model.tiny import complete_folder
from tandem.engine.model.weight_files import tensor_shapes


def export(source: str | Path, out: str | Path) -> Path:
    """Write `out`, complete or not at all.

    `source`: a run folder (its saved model, else its newest complete checkpoint) or a checkpoint
    folder.

    Raises ConfigError.
    """
    source = Path(source)
    out = Path(out)
    check_target(out)
    model = saved_model(source)
    if not tensor_shapes(model):
        raise ConfigError(f"{model} holds no weights; export another checkpoint of the run")
    with owned_from_beside(out.absolute()):
        check_target(out)
        with complete_folder(out) as folder:
            shutil.copytree(model, folder, dirs_exist_ok=True)
    return out


def check_target(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; name a new folder")


def holds_model(folder: Path) -> bool:
    """A whole model, or the adapters that a run with scope.export=adapter saves."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def saved_model(source: Path) -> Path:
    """The Hugging Face folder in a run or checkpoint folder, or its folder of adapters.

    Raises ConfigError if there is none, or it is damaged.
    """
    checkpoints = source / "checkpoints"
    if (source / "config.yaml").is_file() or checkpoints.is_dir():
        model = source / "model"
        if holds_model(model):
            return model
        found = Checkpoints(checkpoints, keep=1).latest()
        if found is None:
            raise ConfigError(
                f"run folder {source} holds neither a saved model nor a complete checkpoint"
            )
        checkpoint = found[1]
    elif (source / "learner").is_dir():
        checkpoint = source
        try:
            verify(checkpoint.resolve())
        except CheckpointError as error:
            raise ConfigError(f"{error}; export another checkpoint of the run") from None
    else:
        raise ConfigError(
            f"{source} is neither a run folder (config.yaml, checkpoints/) nor a checkpoint "
            "(learner/)"
        )
    model = checkpoint / "model"
    if not holds_model(model):
        raise ConfigError(
            f"checkpoint {checkpoint} has no model/ folder: an older version of Tandem wrote "
            "it. Resume the run from it "
            "(run.resume=true with run.steps one higher): the checkpoint at its end has one"
        )
    return model
