"""Trained tokens per second on ragged rows through packer and LearnerRank, next to a bare forward
and backward on one full sequence of the same model.

    python benchmarks/learner.py [--model FOLDER] [--rows 64] [--lengths 512 1024 2048] [--dtype
    float32] [--threads 2] [--repeats 5]
    python benchmarks/learner.py --head [--tokens 2048]

Rows have lognormal lengths from 20 to 400 tokens, all of them trained but the first of each row.
The bare side is what a user would write: `model(ids, labels=ids)` on one sequence without any
padding, at the length of `--lengths` that is fastest for it, and no optimizer; ours packs,
evaluates the terms, collects metrics and steps AdamW. `--head` measures the memory of the chunked
head and of a naive one for vocabularies of 49k and 150k, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from report import alternate, emit, seconds, spread


def ragged(count: int, vocabulary: int) -> list:
    from tandem.engine.core.types import Row, Source

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(110), 0.75, count), 20, 400).astype(int)

    def weight(n):
        return np.r_[0.0, np.ones(n - 1)].astype(np.float32)

    return [
        Row(
            rng.integers(0, vocabulary, n).astype(np.int32),
            np.full(n, Source.EXPERT, np.int8),
            {"sft": weight(n)},
        )
        for n in lengths
    ]


def throughput(args, path: str) -> None:
    from tandem.algorithms.base import Term
    from tandem.algorithms.parts.objectives.nll import NLL
    from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
    from tandem.engine.core.types import StepPlan
    from tandem.engine.learner.local_engine import LocalEngine
    from tandem.engine.learner.packing import pack
    from tandem.engine.learner.protocol import PolicySpec
    from tandem.engine.learner.rank import LearnerRank, build_policy
    from tandem.engine.learner.terms import denominators

    config = Config(
        mode="inline",
        model=ModelConfig(path=path, dtype=args.dtype),
        learner=LearnerConfig(micro_batch_tokens=args.micro_batch_tokens),
    )
    spec = PolicySpec()
    engine = LocalEngine(build_policy(config, path, spec), config.learner)
    rank = LearnerRank(config, path, spec, engine)
    model, terms = rank.engine.module.model, (Term("sft", NLL()),)
    vocabulary = len(rank.engine.module.head.weight)
    rows = ragged(args.rows, vocabulary)
    tokens, last = sum(len(row.tokens) for row in rows), {}

    def ours() -> float:
        def step():
            plan = StepPlan(
                0,
                terms,
                denominators(terms, rows),
                pack(rows, terms, 1, args.micro_batch_tokens, 0),
                0.0,
            )
            last.update(rank.step(plan).metrics)

        return tokens / seconds(step)

    def bare(length: int) -> float:
        ids = torch.randint(vocabulary, (1, length))
        passes = max(1, round(tokens / length))

        def run():
            for _ in range(passes):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        rate = passes * length / seconds(run)
        model.zero_grad(set_to_none=True)
        return rate

    sides = {"learner": ours} | {f"bare {n}": lambda n=n: bare(n) for n in args.lengths}
    alternate(sides, 1)  # warm up
    found = alternate(sides, args.repeats)
    limit = max((name for name in found if name != "learner"), key=lambda name: median(found[name]))
    ratio = median(a / b for a, b in zip(found["learner"], found[limit], strict=True))
    # the last token of a row predicts nothing and is not run
    useful = (last["tokens/real"] - args.rows) / last["tokens/padded"]
    parameters = sum(p.numel() for p in model.parameters())
    emit(
        "learner",
        {
            "parameters": parameters,
            "dtype": args.dtype,
            "threads": args.threads,
            "rows": args.rows,
            "tokens": tokens,
            "tokens_per_second": found,
            "limit": limit,
            "ratio": ratio,
            "useful_share": useful,
            "optimizer_seconds": last["seconds/optimizer"],
        },
        f"{parameters / 1e6:.1f} M {args.dtype}: {spread(found['learner'])} tokens/s on "
        f"{tokens} tokens in {args.rows} ragged rows; {limit} {spread(found[limit])}; "
        f"ratio {ratio:.2f} (goal 0.85), useful tokens {useful:.3f} (goal 0.95)",
        args.out,
    )


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation gave, in forward and backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def one_head(kind: str, vocabulary: int, tokens: int, hidden: int = 576) -> dict:
    """Bytes that forward and backward of one head take at most, seconds, and the largest tensor;
    run in a fresh process.
    """
    from tandem.engine.model.chunked_head import token_logprobs

    h, w = (
        torch.randn(tokens, hidden, requires_grad=True),
        torch.randn(vocabulary, hidden).mul_(0.02).requires_grad_(),
    )
    target = torch.randint(vocabulary, (tokens,))

    def run():
        logp = (
            token_logprobs(h, w, None, target)[0]
            if kind == "chunked"
            else (h @ w.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        )
        logp.mean().backward()

    def status(key):
        return (
            next(
                int(line.split()[1])
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(key)
            )
            * 1024
        )

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    taken = seconds(run)
    peak = status("VmHWM") - before
    h.grad = w.grad = None
    with Largest() as largest:
        run()
    return {
        "peak_bytes": peak,
        "seconds": taken,
        "largest_tensor": largest.elements,
        "tokens_times_vocabulary": tokens * vocabulary,
    }


def heads(args) -> None:
    for vocabulary in (49152, 150_000):
        found = {}
        for kind in ("chunked", "naive"):
            command = [
                sys.executable,
                __file__,
                "--one-head",
                kind,
                str(vocabulary),
                "--tokens",
                str(args.tokens),
                "--threads",
                str(args.threads),
            ]
            found[kind] = [
                json.loads(
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout
                )
                for _ in range(args.repeats)
            ]
        peak = {kind: median(f["peak_bytes"] for f in runs) / 2**20 for kind, runs in found.items()}
        largest = found["chunked"][0]["largest_tensor"] / (args.tokens * vocabulary)
        emit(
            "learner head",
            {
                "vocabulary": vocabulary,
                "tokens": args.tokens,
                "hidden": 576,
                "dtype": "float32",
                "peak_mib": peak,
                "runs": found,
            },
            f"vocabulary {vocabulary}, {args.tokens} tokens, hidden 576: peak "
            f"{peak['chunked']:.0f} MiB chunked, {peak['naive']:.0f} MiB naive, "
            f"{median(f['seconds'] for f in found['chunked']):.1f} s and "
            f"{median(f['seconds'] for f in found['naive']):.1f} s; "
            f"largest tensor of the chunked head {largest:.2f} of [tokens, vocabulary]",
            args.out,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the 3.3 M model of w4")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, value in (
        ("rows", 64),
        ("repeats", 5),
        ("threads", 2),
        ("micro-batch-tokens", 4096),
        ("tokens", 2048),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[512, 1024, 2048],
        help="of the bare side's sequence",
    )
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--one-head", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_head:
        print(json.dumps(one_head(args.one_head[0], int(args.one_head[1]), args.tokens)))
    elif args.head:
        heads(args)
    elif args.model:
        throughput(args, args.model)
    else:
        from workloads import make_model

        with tempfile.TemporaryDirectory() as scratch:
            throughput(args, str(make_model(Path(scratch) / "model")))


if __name__ == "__main__":
    main()
