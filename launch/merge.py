"""`tandem merge`: one model out of several with one architecture; see engine/model/merge.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from tandem.engine.core.errors import ConfigError
from tandem.engine.model.resolve import refuse_adapter

HELP = {
    "average": "the mean of the models (a model soup)",
    "linear": "the mean with --weights",
    "task": "base plus scaled differences to it (task arithmetic)",
    "ties": "base plus trimmed differences where their signs agree",
    "dare": "base plus differences with random entries dropped and the rest scaled up",
    "slerp": "a point on the arc between two models",
    "restore": "one model with a share of its changes put back to the base",
}
OPTIONS = {
    "average": (),
    "linear": ("weights",),
    "task": ("weights", "scale"),
    "ties": ("weights", "scale", "density"),
    "dare": ("weights", "scale", "drop", "seed"),
    "slerp": ("t",),
    "restore": ("share",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, help in HELP.items():
        sub = kinds.add_parser(kind, help=help, description=help)
        sub.add_argument("out", help="folder to write")
        sub.add_argument("models", nargs="+", metavar="MODEL", help="model, run or checkpoint")
        sub.add_argument(
            "--base",
            help="the model that the others were trained from; its config, tokenizer and files are "
            "copied (those of the first model where there is none)",
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        for name in OPTIONS[kind]:
            add_option(sub, name)


def add_option(parser: argparse.ArgumentParser, name: str) -> None:
    described = {
        "weights": {"type": float, "nargs": "+", "help": "one per model (default: all 1)"},
        "scale": {"type": float, "default": 1.0, "help": "of the merged difference"},
        "density": {"type": float, "default": 0.2, "help": "share of each difference kept"},
        "drop": {"type": float, "default": 0.9, "help": "probability of dropping an entry"},
        "seed": {"type": int, "default": 0, "help": "of the dropped entries"},
        "t": {"type": float, "default": 0.5, "help": "0: the first model, 1: the second"},
        "share": {"type": float, "required": True, "help": "of the entries, most changed first"},
    }[name]
    if "default" in described:
        described["help"] += " (default: %(default)s)"
    parser.add_argument(f"--{name}", **described)


def merge(args: argparse.Namespace) -> str:
    """What was written, in words. Writes `args.out`, complete or not at all.

    Raises ConfigError.
    """
    from tandem.engine.core.folder_lock import owned_from_beside
    from tandem.engine.model import merge as kinds
    from tandem.engine.model.merge_folders import merge_folders
    from tandem.engine.model.tiny import complete_folder
    from tandem.launch.export import check_target

    classes = {
        "average": kinds.Linear,
        "linear": kinds.Linear,
        "task": kinds.TaskVector,
        "ties": kinds.Ties,
        "dare": kinds.Dare,
        "slerp": kinds.Slerp,
        "restore": kinds.Restore,
    }
    options = {name: getattr(args, name) for name in OPTIONS[args.kind]}
    if "weights" in options:
        options["weights"] = tuple(options["weights"] or ())
    operation = classes[args.kind](**options)
    models = [model_folder(model) for model in args.models]
    base = None if args.base is None else model_folder(args.base)
    out = Path(args.out)
    check_target(out)
    with owned_from_beside(out.absolute()):
        check_target(out)
        with complete_folder(out) as folder:
            count = merge_folders(operation, folder, models, base)
    return f"{args.kind} of {len(models)} models, {count} tensors, written to {out}"


def model_folder(source: str) -> Path:
    """A model folder, or the model in a run or checkpoint folder."""
    from tandem.launch.export import saved_model

    path = Path(source).expanduser()
    if not path.is_dir():
        raise ConfigError(f"there is no folder {source}; merging reads local model folders")
    folder = path if (path / "config.json").is_file() else saved_model(path)
    refuse_adapter(folder)
    return folder
