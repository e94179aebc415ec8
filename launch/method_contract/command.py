"""`tandem check-method`: the contract of every method, checked on one of the user's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tandem.engine.config.tree import Tree

HELP = "check a method, also one of your own, on what every method must do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help="my_method.py:Class, package.module:Class, or a known name")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="option=value",
        help="options of the method, as under `method:` in a config, e.g. policy.kl=0.1",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a dataset column that all hand-made rows have; may be given several times",
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME",
        help="a further source of demonstrations, as in data.sources; may be given several times",
    )


def check_method(args: argparse.Namespace) -> int:
    """0 if all checks hold, else 2. Raises ConfigError for a method that cannot be made."""
    from tandem.algorithms.registry import configured
    from tandem.engine.config.paths import process_kept
    from tandem.launch.check_config import make
    from tandem.launch.failure import BAD_INPUT
    from tandem.launch.method_contract.checks import CHECKS, Subject, run_check
    from tandem.launch.method_contract.driving import BUDGET

    block = {"name": args.method, **values_of(args.overrides)}
    columns = values_of(args.column)
    sources = {**BUDGET.sources, **dict.fromkeys(args.source, 30)}
    failed = 0
    with process_kept():
        make(block)
        subject = Subject(partial(configured, block), columns, replace(BUDGET, sources=sources))
        for name, check in CHECKS.items():
            finding = run_check(check, subject)
            if finding is None:
                print(f"ok      {name}", flush=True)
                continue
            failed += 1
            print(f"failed  {name}", flush=True)
            print(f"          found:    {finding.found}")
            print(f"          expected: {finding.expected}")
            print(f"          change:   {finding.change}")
    if failed:
        print(f"{args.method}: {failed} of {len(CHECKS)} checks failed")
        return BAD_INPUT
    print(f"{args.method}: all {len(CHECKS)} checks hold")
    return 0


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """{key: value} of `key.sub=value` texts, as a config reads them. Raises ConfigError."""
    tree = Tree(Path("the command line"))
    for word in words:
        tree.put(word)
    return tree.values
