"""Checkpoints of a run: what every component has to keep, written together and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tandem.algorithms.base import Method
from tandem.algorithms.checks.method import check_state
from tandem.engine.config.schema import RunConfig
from tandem.engine.core.folder_lock import FolderLock
from tandem.engine.learner.protocol import Learner
from tandem.engine.loop.checkpoint import Checkpoints
from tandem.engine.loop.producer import Producer
from tandem.engine.loop.state import RunState, read_state, rng_state, set_rng_state, write_state
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry


class Cursor(Protocol):
    """A data source, as far as a checkpoint goes: which row comes next."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(eq=False, kw_only=True)
class Saver:
    run_config: RunConfig
    checkpoints: Checkpoints
    lock: FolderLock
    learner: Learner
    method: Method
    producer: Producer
    cursors: Mapping[str, Cursor]
    telemetry: Telemetry
    display: Display
    # removes the final model that an earlier end of this run left, before run.steps was raised;
    # whether there was one
    forget_model: Callable[[], bool]

    saved_at: int | None = field(default=None, init=False)  # steps done in the newest checkpoint

    def due(self, state: RunState) -> bool:
        every = self.run_config.checkpoint_every
        return state.done(self.run_config) or bool(every and state.step % every == 0)

    def save(self, state: RunState) -> None:
        """Write a checkpoint. Raises DiskError, and FolderTaken if the folder has another owner."""
        self.lock.check()
        saved = {
            **state.capture(),
            "cursors": {name: source.state_dict() for name, source in self.cursors.items()},
            "producer": self.producer.state_dict(),
            "method": check_state(self.method),
            "rng": rng_state(),
        }
        with self.checkpoints.write(state.step) as folder:
            # to go on exactly: optimizer, master weights, random states
            self.learner.save(folder / "learner")
            # to use: a Hugging Face folder in safetensors
            self.learner.export(folder / "model")
            write_state(folder, saved)
        if self.forget_model() and not self.run_config.save_model:
            self.display.message(
                "removed the model of the run's earlier end, which is older than this checkpoint; "
                "run.save_model is false, so that none takes its place: tandem export writes one"
            )
        self.saved_at = state.step
        self.telemetry.event("checkpoint", step=state.step)
        self.display.message(f"checkpoint of step {state.step} written")

    def restore(self, state: RunState, folder: Path) -> None:
        """Bring `state` and every component to where they were. Raises CheckpointError."""
        saved = read_state(folder)
        state.restore(saved)
        self.method.load_state_dict(saved["method"])
        self.producer.load_state_dict(saved["producer"])
        for name, source in self.cursors.items():
            # one that run.resume_changes let in starts with its first row
            if name in saved["cursors"]:
                source.load_state_dict(saved["cursors"][name])
        set_rng_state(saved["rng"])
        self.learner.load(folder / "learner")
        self.saved_at = state.step
        self.display.message(f"resumed from {folder}: step {state.step} of {self.run_config.steps}")
