"""Recorded rollouts instead of an engine: for runs that only train, e.g. to compare methods on the
very same samples.

`rollout.record` is the rollouts.jsonl of another run. A request is answered with the recorded group
of the same ordinal if that is of the same prompt, else with the prompt's first group that was not
served yet (groups that the recorded run filtered out leave gaps in its ordinals). Tokens, sources,
log-probs and versions are served as recorded, whatever the request's sampling and prefixes; the
ordinal becomes the request's. A group may have fewer samples than were asked for: samples whose
reward failed are not in the file. A wave of which that is so of all is answered with none.

Weight updates are taken and digested, so that the sync's checks pass, and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Prompt, Source, Trajectory
from tandem.engine.report.rollouts import read_rollouts
from tandem.engine.weights.digest import combine, digest
from tandem.rollout.backend import Backend


class Record:
    """A rollouts.jsonl in memory: {(group ordinal, wave): its trajectories}, {group ordinal: its
    prompt, that of the first wave}, in the order of the file; {group ordinal: how often it was
    asked again}, which may be more than there are waves: one without a usable reward has no lines.
    """

    def __init__(self, path: str | Path):
        check_record(path)
        self.path = str(path)
        self.groups: dict[tuple[int, int], list[Trajectory]] = {}
        self.prompts: dict[int, Prompt] = {}
        self.waves: dict[int, int] = {}
        for line, prompt, trajectory in read_rollouts(path):
            key = (trajectory.group, trajectory.wave)
            group = self.groups.setdefault(key, [])
            group.append(trajectory)
            self.prompts.setdefault(trajectory.group, prompt)
            waves = max(trajectory.wave, line.get("waves", 0))
            self.waves[trajectory.group] = max(waves, self.waves.get(trajectory.group, 0))


def check_record(path: str | Path) -> None:
    """Read the first rollout. Raises ConfigError if there is none."""
    if not Path(path).is_file():
        raise ConfigError(
            f"rollout.record is {str(path)!r}: there is no such file; give the "
            "rollouts.jsonl of a run"
        )
    try:
        first = next(read_rollouts(path), None)
    except ConfigError as error:
        raise ConfigError(f"rollout.record: no rollout: {error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"rollout.record is {str(path)!r}: its first line is no rollout ({error!r}); "
            "give the rollouts.jsonl of a run"
        ) from None
    if first is None:
        raise ConfigError(f"rollout.record is {str(path)!r}: the file holds no rollouts")


def refuse_cut_columns(path: str | Path) -> None:
    """Raise ConfigError if a column is not whole in the record: a reward would judge by a part of
    it.
    """
    for line, prompt, _ in read_rollouts(path):
        if line.get("cut"):
            raise ConfigError(
                f"rollout.record is {str(path)!r}: of prompt {prompt.id!r} the columns "
                f"{', '.join(line['cut'])} were too long to be recorded whole; "
                "set data.prompts to the recorded run's, from which the rewards then have them"
            )


class RecordedPrompts:
    """The recorded prompts in the recorded order, as a prompt source: for a train-only run that
    does not name data.prompts.
    """

    def __init__(self, path: str | Path):
        refuse_cut_columns(path)
        record = Record(path)
        self.prompts = list(record.prompts.values())
        self.position = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts.

        Raises ConfigError when there are no more: a record is not started over.
        """
        end = self.position + n
        if end > len(self.prompts):
            raise ConfigError(
                f"rollout.record holds {len(self.prompts)} groups, and all of them were "
                "used; lower run.steps or record more rollouts"
            )
        taken = self.prompts[self.position : end]
        self.position = end
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class ReplayBackend(Backend):
    """`samples` of a request is an upper bound here, see above."""

    recorded = True

    def __init__(self, model_path: str, config: Config, seed: int):
        """Read `rollout.record`; no model is loaded.

        Raises ConfigError if the file is missing or empty.
        """
        self.record = Record(config.rollout.record or "")
        self.unserved: dict[str, list[int]] = {}  # recorded ordinals of each prompt
        for group, prompt in self.record.prompts.items():
            self.unserved.setdefault(prompt.id, []).append(group)
        # request's ordinal: recorded ordinal; a request may come again
        self.served: dict[int, int] = {}
        self.version = 0
        self.received: dict[str, str] = {}

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        """Raises ConfigError for a request with no record, or with a record that does not fit."""
        return self.serve(request)

    def serve(self, request: GenRequest) -> tuple[Trajectory, ...]:
        prompt = request.prompt
        if request.group not in self.served:
            choice = self.unserved.get(prompt.id, [])
            if not choice:
                found = "no rollouts left" if prompt.id in self.unserved else "no rollouts"
                raise ConfigError(
                    f"rollout.record {self.record.path} has {found} for prompt {prompt.id!r} "
                    f"(group {request.group}); it holds {len(self.record.prompts)} groups of "
                    f"{len(self.unserved)} prompts. Use the recorded run's "
                    "data.prompts, run.seed and rollout.prompts_per_step, no "
                    "data.evaluation, and no more steps than were recorded"
                )
            recorded = request.group if request.group in choice else choice[0]
            choice.remove(recorded)
            self.served[request.group] = recorded
        recorded = self.served[request.group]
        trajectories = self.record.groups.get((recorded, request.wave))
        if trajectories is None:
            self.check_asked(recorded, request)
            return ()
        if len(trajectories) > request.samples:
            raise ConfigError(
                f"rollout.record {self.record.path} has {len(trajectories)} samples in group "
                f"{recorded}, but {request.samples} were asked for; "
                "set rollout.samples_per_prompt to that of the recorded run"
            )
        first = trajectories[0]
        is_prompt = first.source == Source.PROMPT
        if not np.array_equal(first.tokens[is_prompt], prompt.tokens):
            raise ConfigError(
                f"rollout.record {self.record.path}: prompt {prompt.id!r} has other token "
                "ids there than in data.prompts; "
                "the rollouts were recorded with another tokenizer, chat template, system "
                "prompt or dataset"
            )
        return tuple(replace(trajectory, group=request.group) for trajectory in trajectories)

    def check_asked(self, recorded: int, request: GenRequest) -> None:
        """Raise ConfigError unless the recorded run asked for this wave too, in vain."""
        asked = self.record.waves[recorded]
        if 0 < request.wave <= asked:
            return
        raise ConfigError(
            f"rollout.record {self.record.path}: wave {request.wave} of group {recorded} is asked "
            f"for, but in the recorded run the group was asked for {asked} times after the first; "
            "use the recorded run's method and reward"
        )

    async def start_weight_update(self) -> None:
        self.received = {}

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        for name, tensor in update_info["named"]:
            self.received[name] = digest(tensor)

    async def finish_weight_update(self, version: int) -> Installed:
        self.version = version
        return Installed(dict(self.received), version, await self.active_digest())

    async def weight_version(self) -> int:
        """The version of the last update; served tokens keep their recorded versions."""
        return self.version

    async def active_digest(self) -> str:
        """Over what was last received: there are no weights to compute with."""
        return combine(self.received)
