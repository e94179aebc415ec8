"""The state of a run: what the loop knows, and how it is kept in a checkpoint, with the states of
the components, beside the learner's weights.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import RunConfig
from tandem.engine.core.errors import CheckpointError

FILE = "run_state.pkl"
OWN = ("step", "signals", "gated", "tokens", "optimizer_steps", "stopped")
# cursors: {"prompts": state_dict, ...} of the data sources; the producer's groups that are not
# trained on yet, and its requests; the method's state; states of the random generators
COMPONENTS = ("cursors", "producer", "method", "rng")
# where classes were when version 0.1.0 pickled them, and where they are now
MOVED = {
    ("tandem.engine.producer", "Books"): ("tandem.engine.loop.tickets", "RolloutCounts"),
}
MOVED_MODULES = {"tandem.engine.types": "tandem.engine.core.types"}


@dataclass
class RunState:
    """What changes from step to step. Components keep the rest of it themselves (see saver.py)."""

    step: int = 0  # training steps done = the next step = the learner's weight version
    # each metric as last measured, those of evaluations too
    signals: dict[str, float] = field(default_factory=dict)
    gated: int = 0  # steps whose log-probs were compared before training
    tokens: int = 0  # generated + trained so far
    # steps taken with each set of optimizer moments
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    stopped: str = ""  # why the method ended the run
    # weight version that all engines have; None: unknown
    version: int | None = None

    def done(self, run: RunConfig) -> bool:
        """Whether the run has reached its end."""
        if self.stopped or self.step >= run.steps:
            return True
        return run.token_budget is not None and self.tokens >= run.token_budget

    def metrics(self) -> dict[str, float]:
        """For the report of a step."""
        return {"version": float(self.version or 0), "tokens/total": float(self.tokens)}

    def capture(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {name: copy(getattr(self, name)) for name in OWN}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Whatever the engines have, it is not its weights."""
        for name in OWN:
            setattr(self, name, copy(saved[name]))
        self.version = None


def write_state(folder: Path, saved: Mapping[str, Any]) -> None:
    """Write OWN and COMPONENTS into a checkpoint folder.

    Pickle: columns of a dataset row may hold anything, and the manifest guards against damage. As
    with any pickle, resume only from checkpoints whose origin you trust.
    """
    with open(folder / FILE, "wb") as file:
        pickle.dump(dict(saved), file)


def read_state(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError if the entries are not those of this version of Tandem: a guessed
    default would not be the same run.
    """
    path = folder / FILE
    try:
        with open(path, "rb") as file:
            saved = Reader(file).load()
    except (ModuleNotFoundError, AttributeError) as error:
        raise CheckpointError(
            f"{path} was written by another version of Tandem, or with code that is not here now: "
            f"{error}; resume with the version that wrote it (environment.json names it)"
        ) from None
    saved.setdefault("stopped", "")  # before version 0.3 no method could end a run
    known = {*OWN, *COMPONENTS}
    if set(saved) != known:
        raise CheckpointError(
            f"{path} was written by another version of Tandem: it lacks "
            f"{sorted(known - set(saved))} and has unknown {sorted(set(saved) - known)}; "
            "resume with the version that wrote it (environment.json names it)"
        )
    return saved


class Reader(pickle.Unpickler):
    """Finds classes where they are now."""

    def find_class(self, module: str, name: str) -> Any:
        module = MOVED_MODULES.get(module, module)
        return super().find_class(*MOVED.get((module, name), (module, name)))


def rng_state() -> dict[str, Any]:
    """State of the global random generators of this process: python, numpy, torch."""
    import torch

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state().numpy(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
