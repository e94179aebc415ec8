"""What a run leaves behind in its folder, always and in plain files; Weights & Biases and
TensorBoard on request.

    run.json            the run's id (launch/run/folder.py)
    config.yaml         the config as it was resolved, of the latest start
    configs/            that of every start: start_1.yaml, start_2.yaml, ...
    environment.json    a list with one entry per start of the run: versions, git commit, machine,
                        command line
    metrics.jsonl       one line per optimizer step, and one per evaluation
    rollouts.jsonl      one line per trajectory that was trained on
    events.jsonl        restarts, skipped steps, checkpoints, syncs: a history, with the wall-clock
                        time of each

Every line is a JSON object whose numbers are finite; NaN and infinities are null. Half surrogate
pairs, which UTF-8 cannot hold, are spelled out. A line is flushed when it is written, so a killed
run has all of them; a last line torn by a crash is left out by `read_jsonl`, and a resume moves
damaged lines to FILE.damaged. When a run resumes from step k, lines of later steps were written by
the part that was lost and are cut off, so that metrics and rollouts read as one run. Events are
never cut: an engine that died did die.

metrics.jsonl   `step`, `seconds` (since the first start, pauses between crash and resume left out)
                and flat numeric keys
    A step's line has the 0-based number of the step. An evaluation's line has the number of steps
    done before it and keys that begin with `eval/`. The names used by the display and plots:
    reward/mean, entropy, eval/accuracy, rollout/tokens_per_second, learner/tokens_per_second,
    rollout/idle (where there are engines) and learner/idle (share of the step's time that a side
    waited, 0 to 1),
    rollout/aborted (groups, where rollout.over_sample is set), and a method's own metrics such as
    mu.

rollouts.jsonl  complete enough to train on without a model (`rollout.backend: replay`);
`read_rollouts` turns a line back into carriers.
    step, group, sample                 optimizer step it was trained in; ordinal of the prompt in
                                        the run; number within the group
    prompt_id, prompt, columns, demonstration       the prompt: text or messages, dataset row,
                                                    response ids of its demonstration or null
    cut                                 only where a column was longer than 65,536 characters: the
                                        names of such columns, of which the beginning is kept
    text                                the response as the reward saw it, null if it was not
                                        decoded
    tokens, source                      [T] ids and tandem.engine.core.types.Source values, prompt
                                        and response in one
    behaviour_logp, version             [T] or null; null log-prob and version -1 where no rollout
                                        engine sampled the token
    learner_version, finish             weight version of the learner when it trained on it; stop or
                                        length
    reward, parts, error                weighted sum and its parts; null or {kind, message,
                                        function} of a reward that failed
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tandem.engine.config.parse import to_dict
from tandem.engine.config.schema import Config
from tandem.engine.config.secrets import redact
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import cut_jsonl, end_last_line, read_jsonl, write_atomic
from tandem.engine.core.foreign import message, text_of
from tandem.engine.core.types import ScoredGroup
from tandem.engine.report.environment import record_environment
from tandem.engine.report.lines import append_to, plain_columns, write_line
from tandem.engine.report.rollouts import rollout_record
from tandem.engine.report.trackers import start_tensorboard, start_wandb


class Telemetry:
    """Writes the files above. Light to make: do so before anything heavy starts.

    resume_step: steps that the checkpoint has done; None for a new run. `evaluations` maps steps
    done to the numbers of the evaluation made there, those before the resume included. `report` is
    told of what a crash has damaged. Raises ConfigError if the folder holds another run, or if a
    logger that was asked for is not installed.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        resume_step: int | None = None,
        report: Callable[[str], None] = print,
        run_id: str | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics = self.run_dir / "metrics.jsonl"
        rollouts = self.run_dir / "rollouts.jsonl"
        events = self.run_dir / "events.jsonl"
        if resume_step is None and metrics.exists() and metrics.stat().st_size:
            raise ConfigError(
                f"run folder {self.run_dir} already holds a run; set run.resume=true to "
                "continue it, choose another run.name, or delete it"
            )
        steps_done = resume_step or 0
        cut(metrics, steps_done, report)
        cut(rollouts, steps_done, report)
        end_last_line(events)
        kept = list(read_jsonl(metrics))
        self.evaluations: dict[int, dict[str, float]] = {}
        steps = set()
        for line in kept:
            step = line["step"]
            if is_evaluation(line):
                self.evaluations[step] = evaluation_of(line)
            else:
                steps.add(step)
        lost = steps_done - len(steps)
        if lost:
            report(
                f"{metrics} lacks the numbers of {lost} of the {resume_step} steps before "
                "the checkpoint; they are not made again"
            )
        self._began = time.monotonic()
        if kept:
            self._began -= seconds_of(kept[-1])
        resolved = yaml.safe_dump(to_dict(config), sort_keys=False)
        written = f"# run {run_id}\n{resolved}"
        copy = free_copy(self.run_dir / "configs")
        write_atomic(copy, written)
        write_atomic(self.run_dir / "config.yaml", written)
        facts = {
            "run": run_id,
            "resumed_from": resume_step,
            "config": f"configs/{copy.name}",
        }
        record_environment(self.run_dir / "environment.json", report, **facts)
        self._metrics = append_to(metrics)
        self._rollouts = append_to(rollouts)
        self._events = append_to(events)
        self.event("start", pid=os.getpid(), host=platform.node(), **facts)
        self._wandb = None
        self._board = None
        if config.run.wandb:
            self._wandb = start_wandb(config, self.run_dir)
        if config.run.tensorboard:
            self._board = start_tensorboard(self.run_dir, resume_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one optimizer step (0-based)."""
        self._record(step, metrics)

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        """Numbers of an evaluation after `step` optimizer steps; `accuracy` is the one that is
        shown. Keys are written as `eval/KEY`.
        """
        self.evaluations[step] = dict(result)
        numbers = {f"eval/{key}": value for key, value in result.items()}
        self._record(step, numbers)

    def rollouts(self, step: int, groups: Sequence[ScoredGroup], version: int) -> None:
        """The groups that step `step` trains on, and the waves that they took the place of;
        `version` is the learner's weight version.
        """
        for group in groups:
            columns = plain_columns(group.prompt.columns)
            waves = (*group.earlier, group)
            for wave in waves:
                for sample in range(len(wave.trajectories)):
                    record = {"step": step, "learner_version": version}
                    record |= rollout_record(wave, sample, columns)
                    if wave is not group:
                        record["replaced"] = True
                    write_line(self._rollouts, record)
        self._rollouts.flush()

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened once: engine_restart, skipped_step, checkpoint, sync, ..."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record: dict[str, Any] = {"kind": kind, "time": now}
        for name, fact in facts.items():
            if isinstance(fact, (str, Exception)):
                text = message(text_of(fact))
                fact = redact(text)
            record[name] = fact
        write_line(self._events, record)
        self._events.flush()

    def close(self) -> None:
        for file in (self._metrics, self._rollouts, self._events):
            file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _record(self, step: int, numbers: Mapping[str, float]) -> None:
        seconds = time.monotonic() - self._began
        line = {"step": step, "seconds": round(seconds, 3), **numbers}
        write_line(self._metrics, line)
        self._metrics.flush()
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})


def is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in line)


def evaluation_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation's line, without the prefix of their keys."""
    found = {}
    for key, value in line.items():
        if key.startswith("eval/"):
            name = key.removeprefix("eval/")
            found[name] = value
    return found


def cut(path: Path, step: int, report: Callable[[str], None]) -> None:
    """Cut off everything after what the first `step` steps wrote: an evaluation made after `step`
    steps stays, a torn last line goes.
    """

    def beyond(line: Mapping[str, Any]) -> bool:
        number = line["step"]
        if number == step:
            return not is_evaluation(line)
        return number > step

    cut_jsonl(path, has_step, beyond, report)


def has_step(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("step"), int)


def free_copy(folder: Path) -> Path:
    """The file for the config of one more start: start_1.yaml, start_2.yaml, ..."""
    folder.mkdir(exist_ok=True)
    number = 1
    while (path := folder / f"start_{number}.yaml").exists():
        number += 1
    return path


def seconds_of(line: Mapping[str, Any]) -> float:
    seconds = line.get("seconds")
    return seconds if isinstance(seconds, (int, float)) else 0.0
