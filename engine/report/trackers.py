"""Weights & Biases and TensorBoard: started on request."""

from __future__ import annotations

import netrc
import os
import secrets
from pathlib import Path
from typing import Literal

from tandem.engine.config.parse import to_dict
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import write_atomic


def start_wandb(config: Config, run_dir: Path):
    """A W&B run: offline unless the user is logged in or WANDB_MODE says otherwise; it never asks
    on the terminal. A resumed run keeps its id.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"run.wandb is {config.run.wandb!r}, but wandb is not installed: pip install "
            "'tandem-rl[track]', or remove run.wandb"
        ) from None
    id_file = run_dir / "wandb_id"
    known = id_file.read_bytes() if id_file.exists() else b""
    if not known.strip(b"\0 \n"):  # a power cut leaves it empty
        write_atomic(id_file, secrets.token_hex(4))
    mode: Literal["online", "offline"] | None = None  # wandb reads WANDB_MODE itself
    if not os.environ.get("WANDB_MODE"):
        mode = "online" if wandb_login() else "offline"
    run = wandb.init(
        project=config.run.wandb,
        name=config.run.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run_dir),
        config=to_dict(config),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
    )
    # our own step axis: steps that are done again after a resume are accepted
    run.define_metric("*", step_metric="step")
    return run


def wandb_login() -> bool:
    """Whether W&B finds a key without asking: WANDB_API_KEY or a netrc entry for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def start_tensorboard(run_dir: Path, resume_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "run.tensorboard is true, but tensorboard is not installed: pip install "
            "'tandem-rl[track]', or remove run.tensorboard"
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step)
