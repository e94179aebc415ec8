"""What a run leaves behind in its folder, always and in plain files; Weights & Biases and TensorBoard on request.

    run.json            the run's id (engine/run_folder.py)
    config.yaml         the config as it was resolved, of the latest start
    configs/            that of every start: start_1.yaml, start_2.yaml, ...
    environment.json    a list with one entry per start of the run: versions, git commit, machine, command line
    metrics.jsonl       one line per optimizer step, and one per evaluation
    rollouts.jsonl      one line per trajectory that was trained on
    events.jsonl        restarts, skipped steps, checkpoints, syncs: a history, with the wall-clock time of each

Every line is a JSON object whose numbers are finite; NaN and infinities are null. Half surrogate pairs, which UTF-8 cannot hold,
are spelled out. A line is flushed when it is written, so a killed run has all of them; a last line torn by a crash is left out by
`read_jsonl`, and a resume moves damaged lines to FILE.damaged. When a run resumes from step k, lines of later steps were written
by the part that was lost and are cut off, so that metrics and rollouts read as one run. Events are never cut: an engine that died did die.

metrics.jsonl   `step`, `seconds` (since the first start, pauses between crash and resume left out) and flat numeric keys. A step's line has the 0-based
    number of the step. An evaluation's line has the number of steps done before it and keys that begin with `eval/`. The names used by the display and plots:
    reward/mean, entropy, eval/accuracy, rollout/tokens_per_second, learner/tokens_per_second, rollout/idle and learner/idle (share of the
    step's time that a side waited, 0 to 1), rollout/aborted (groups, where rollout.over_sample is set), and a method's own metrics such as mu.

rollouts.jsonl  complete enough to train on without a model (`rollout.backend: replay`); `read_rollouts` turns a line back into carriers.
    step, group, sample                 optimizer step it was trained in; ordinal of the prompt in the run; number within the group
    prompt_id, prompt, columns, demonstration       the prompt: text or messages, dataset row, response ids of its demonstration or null
    cut                                 only where a column was longer than 65,536 characters: the names of such columns, of which the beginning is kept
    text                                the response as the reward saw it, null if it was not decoded
    tokens, source                      [T] ids and tandem.engine.types.Source values, prompt and response in one
    behaviour_logp, version             [T] or null; null log-prob and version -1 where no rollout engine sampled the token
    learner_version, finish             weight version of the learner when it trained on it; stop or length
    reward, parts, error                weighted sum and its parts; null or {kind, message, function} of a reward that failed
"""
from __future__ import annotations

import netrc
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml

from tandem.engine.config import Config, ConfigError, to_dict
from tandem.engine.environment import record_environment
from tandem.engine.files import cut_jsonl, end_last_line, read_jsonl, write_atomic
from tandem.engine.foreign import message, text_of
from tandem.engine.lines import plain_columns, write_line
from tandem.engine.secrets import redact
from tandem.engine.types import Finish, Prompt, RewardError, ScoredGroup, Trajectory


class Telemetry:
    """Writes the files above. Light to make: do so before anything heavy starts.

    resume_step: steps that the checkpoint has done; None for a new run. `evaluations` maps steps done to the numbers of the evaluation made there, those
    before the resume included. `report` is told of what a crash has damaged. Raises ConfigError if the folder holds another run, or if a logger that was asked for is not installed.
    """

    def __init__(self, config: Config, run_dir: str | Path, resume_step: int | None = None, report: Callable[[str], None] = print,
                 run_id: str | None = None):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics, rollouts, events = (self.run_dir / name for name in ("metrics.jsonl", "rollouts.jsonl", "events.jsonl"))
        if resume_step is None and metrics.exists() and metrics.stat().st_size:
            raise ConfigError(f"run folder {self.run_dir} already holds a run; set run.resume=true to continue it, choose another run.name, or delete it")
        cut(metrics, resume_step or 0, report)
        cut(rollouts, resume_step or 0, report)
        end_last_line(events)
        kept = list(read_jsonl(metrics))
        steps = {line["step"] for line in kept if not is_evaluation(line)}
        if lost := (resume_step or 0) - len(steps):
            report(f"{metrics} lacks the numbers of {lost} of the {resume_step} steps before the checkpoint; they are not made again")
        self.evaluations: dict[int, dict[str, float]] = {
            line["step"]: {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")} for line in kept if is_evaluation(line)}
        self._began = time.monotonic() - (seconds_of(kept[-1]) if kept else 0.0)
        written = f"# run {run_id}\n{yaml.safe_dump(to_dict(config), sort_keys=False)}"
        copy = free_copy(self.run_dir / "configs")
        write_atomic(copy, written)
        write_atomic(self.run_dir / "config.yaml", written)
        facts = {"run": run_id, "resumed_from": resume_step, "config": f"configs/{copy.name}"}
        record_environment(self.run_dir / "environment.json", report, **facts)
        self._metrics, self._rollouts, self._events = (open(path, "a", encoding="utf-8") for path in (metrics, rollouts, events))
        self.event("start", pid=os.getpid(), host=platform.node(), **facts)
        self._wandb = start_wandb(config, self.run_dir) if config.run.wandb else None
        self._board = start_tensorboard(self.run_dir, resume_step) if config.run.tensorboard else None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one optimizer step (0-based)."""
        self._record(step, metrics)

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        """Numbers of an evaluation after `step` optimizer steps; `accuracy` is the one that is shown. Keys are written as `eval/KEY`."""
        self.evaluations[step] = dict(result)
        self._record(step, {f"eval/{key}": value for key, value in result.items()})

    def rollouts(self, step: int, groups: Sequence[ScoredGroup], version: int) -> None:
        """The groups that step `step` trains on; `version` is the learner's weight version."""
        for group in groups:
            columns = plain_columns(group.prompt.columns)
            for sample in range(len(group.trajectories)):
                write_line(self._rollouts, {"step": step, "learner_version": version, **rollout_record(group, sample, columns)})
        self._rollouts.flush()

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened once: engine_restart, skipped_step, checkpoint, sync, ..."""
        record = {"kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        for name, fact in facts.items():
            record[name] = redact(message(text_of(fact))) if isinstance(fact, (str, Exception)) else fact
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
        write_line(self._metrics, {"step": step, "seconds": round(time.monotonic() - self._began, 3), **numbers})
        self._metrics.flush()
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})


def rollout_record(group: ScoredGroup, sample: int, columns: tuple[dict, list[str]] | None = None) -> dict[str, Any]:
    """One trajectory of a scored group as rollouts.jsonl has it, without the step and the learner's version.

    columns: `plain_columns` of the group's row, made once for all its samples.
    """
    trajectory, prompt = group.trajectories[sample], group.prompt
    row, shortened = columns or plain_columns(prompt.columns)
    marks = {"cut": shortened} if shortened else {}
    outcome = group.outcomes[sample] if group.outcomes else None
    return {"group": group.group, "sample": sample, "prompt_id": prompt.id, "prompt": prompt.content, "columns": row, **marks,
            "demonstration": prompt.demonstration, "text": group.texts[sample] if group.texts else None,
            "tokens": trajectory.tokens, "source": trajectory.source, "behaviour_logp": trajectory.behaviour_logp, "version": trajectory.version,
            "finish": trajectory.finish.value, "reward": group.rewards[sample], "parts": outcome.parts if outcome else {},
            "error": reward_error(outcome.error) if outcome and outcome.error else None}


def reward_error(error: RewardError) -> dict[str, str]:
    """What went wrong in a reward, without secrets: a service likes to repeat the key it refuses."""
    return {**vars(error), "message": redact(error.message)}


def read_rollouts(path: str | Path) -> Iterator[tuple[dict[str, Any], Prompt, Trajectory]]:
    """(the line itself, prompt, trajectory) of every line of a rollouts.jsonl, in order. Token ids, sources, versions and log-probs are exactly those
    that were written."""
    def array(value, dtype):
        return None if value is None else np.array(value, dtype)     # null -> NaN in a float array
    for line in read_jsonl(path):
        tokens, source = array(line["tokens"], np.int32), array(line["source"], np.int8)
        prompt = Prompt(id=line["prompt_id"], tokens=tokens[source == 0], content=line["prompt"], columns=line["columns"],
                        demonstration=array(line["demonstration"], np.int32))
        yield line, prompt, Trajectory(prompt_id=prompt.id, tokens=tokens, source=source, finish=Finish(line["finish"]), group=line["group"],
                                       behaviour_logp=array(line["behaviour_logp"], np.float32), version=array(line["version"], np.int32))


def is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in line)


def cut(path: Path, step: int, report: Callable[[str], None]) -> None:
    """Cut off everything after what the first `step` steps wrote: an evaluation made after `step` steps stays, a torn last line goes."""
    def beyond(line: Mapping[str, Any]) -> bool:
        return line["step"] > step or (line["step"] == step and not is_evaluation(line))
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
    return line["seconds"] if isinstance(line.get("seconds"), (int, float)) else 0.0


def start_wandb(config: Config, run_dir: Path):
    """A W&B run: offline unless the user is logged in or WANDB_MODE says otherwise; it never asks on the terminal. A resumed run keeps its id."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"run.wandb is {config.run.wandb!r}, but wandb is not installed: pip install 'tandem-rl[track]', or remove run.wandb") from None
    id_file = run_dir / "wandb_id"
    if not id_file.exists() or not id_file.read_bytes().strip(b"\0 \n"):      # a power cut leaves it empty
        write_atomic(id_file, secrets.token_hex(4))
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_login() else "offline")
    run = wandb.init(project=config.run.wandb, name=config.run.name, id=id_file.read_text(), resume="allow", dir=str(run_dir), config=to_dict(config),
                     mode=mode, settings=wandb.Settings(silent=True, console="off"))
    run.define_metric("*", step_metric="step")      # our own step axis: steps that are done again after a resume are accepted
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
        raise ConfigError("run.tensorboard is true, but tensorboard is not installed: pip install 'tandem-rl[track]', or remove run.tensorboard") from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step)


class redirect_output:
    """From here on whatever this process and its children write to stdout or stderr, from C++ too, goes to the end of the file `path`.

    As a statement it lasts as long as the process (actors); as a context manager it ends with the block, before a traceback is printed. `terminal` is
    the real stdout, for the display. Not for runs in which the user may enter a debugger.
    """

    def __init__(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        flush_streams()
        self._saved = (os.dup(1), os.dup(2))
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self.terminal: TextIO = os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace", buffering=1)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)

    def __enter__(self) -> redirect_output:
        return self

    def __exit__(self, *exception) -> None:
        flush_streams()
        self.terminal.close()
        for fd, saved in zip((1, 2), self._saved):
            os.dup2(saved, fd)
            os.close(saved)


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
