"""`tandem export`: the model of a run or of one checkpoint as a plain Hugging Face folder (safetensors, config, tokenizer).

A checkpoint holds the learner's sharded state, so the learner is started as it was in the run, loads it and writes the whole model.
"""
from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tandem.engine.checkpoint import Checkpoints
from tandem.engine.config import ConfigError, load


def export(source: str | Path, out: str | Path) -> Path:
    """Write `out`. `source`: a run folder (its saved model, else its newest complete checkpoint) or a checkpoint folder. Raises ConfigError."""
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; name a new folder")
    if (source / "config.yaml").is_file():
        if (source / "model" / "config.json").is_file():
            shutil.copytree(source / "model", out, dirs_exist_ok=True)
            return out
        found = Checkpoints(source / "checkpoints", keep=1).latest()
        if found is None:
            raise ConfigError(f"run folder {source} holds neither a saved model nor a complete checkpoint")
        run_folder, checkpoint = source, found[1]
    elif (source / "learner").is_dir():
        run_folder, checkpoint = source.resolve().parent.parent, source
        if not (run_folder / "config.yaml").is_file():
            raise ConfigError(f"checkpoint {source} is not in a run folder: {run_folder} has no config.yaml, which says what the learner was")
    else:
        raise ConfigError(f"{source} is neither a run folder (config.yaml) nor a checkpoint (learner/)")
    config = load(run_folder / "config.yaml")
    out.mkdir(parents=True, exist_ok=True)
    export_checkpoint(config, checkpoint, out, run_folder)
    return out


def export_checkpoint(config, checkpoint: Path, out: Path, run_folder: Path) -> None:
    from tandem.engine.model import load_tokenizer, resolve_model
    model_path = resolve_model(config.model)
    if config.mode == "inline":
        from tandem.engine.learner import InlineLearner
        learner = InlineLearner.start(config, model_path)
        with closing(learner):
            learner.load(checkpoint / "learner")
            learner.export(out)
    else:
        from tandem.engine.learner import RayLearner
        from tandem.launch import placement
        config = replace(config, rollout=replace(config.rollout, backend="replay"))     # no engines
        placement.preflight(config, model_path)
        with closing(placement.start(config, run_folder)) as places, closing(RayLearner.start(config, model_path, places, run_folder)) as learner:
            learner.load(checkpoint / "learner")
            learner.export(out)
    load_tokenizer(config.model).save_pretrained(out)
