"""Trained tokens per second on ragged rows through packer and LearnerRank, next to a bare forward
and backward on one full sequence of the same model.

    python benchmarks/learner.py [--model FOLDER] [--rows 64] [--lengths 512 1024 2048] [--dtype
    float32] [--threads 2] [--repeats 5]
    python benchmarks/learner.py --head [--tokens 2048]

Rows have lognormal lengths from 20 to 400 tokens, all of them trained but the first of each row.
The bare side is what a user would write: `model(ids, labels=ids)` on one sequence without any
padding, at the length of `--lengths` that is fastest for it, and no optimizer; ours packs,
evaluates the terms, collects metrics and steps AdamW. `--head` measures the memory and the
time of the chunked head, of a naive one and of every quantity of the full distribution for
vocabularies of 49k and 150k, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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


def head_sides(h, w, target) -> dict[str, Callable]:
    """{side: forward to a list of [n] or [n, k]} of the plain heads and of each quantity, beside a
    teacher of the same size where it has one.
    """
    from tandem.engine.model.chunked_head import token_logprobs
    from tandem.engine.model.measured_head import HeadInputs, measure, top_tokens
    from tandem.engine.model.quantities import Divergence, Entropy, LogProbs, TopKDivergence

    teacher = HeadInputs(torch.randn_like(h), torch.randn_like(w).mul_(0.02))

    def measured(*quantities):
        def run():
            ids = torch.randint(len(w), (len(h), 20))
            top, top_logp = top_tokens(teacher.hidden, teacher.weight, None, 20)
            data = {"target": target, "ids": ids, "top": top, "top_logp": top_logp}
            others = {"teacher": teacher}
            return lambda: measure(h, w, None, quantities, data, others)

        return run

    def plain(entropy):
        return lambda: lambda: token_logprobs(h, w, None, target, entropy=entropy)[: 1 + entropy]

    def naive():
        return lambda: [(h @ w.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)]

    divergences = {
        "forward KL": Divergence("teacher", 0.0),
        "reverse KL": Divergence("teacher", 1.0),
        "JSD 0.5": Divergence("teacher", 0.5),
        "top-20 with tail": TopKDivergence("top", "top_logp", 0.0),
        "log-probs at 20 ids": LogProbs("ids"),
        "entropy": Entropy(),
    }
    sides = {"chunked": plain(False), "naive": naive, "chunked with entropy": plain(True)}
    target_logp = LogProbs("target")
    sides |= {name: measured(target_logp, one) for name, one in divergences.items()}
    return sides | {"all of these": measured(target_logp, *divergences.values())}


def one_head(side: str, vocabulary: int, tokens: int, hidden: int = 576) -> dict:
    """Bytes that forward and backward of one head take at most, seconds, and the largest tensor;
    run in a fresh process.
    """
    h = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(vocabulary, hidden).mul_(0.02).requires_grad_()
    forward = head_sides(h, w, torch.randint(vocabulary, (tokens,)))[side]()

    def run():
        sum(values.mean() for values in forward()).backward()

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, cpu = status("VmRSS"), time.process_time()
    taken = seconds(run)
    cpu = time.process_time() - cpu
    peak = status("VmHWM") - before
    h.grad = w.grad = None
    with Largest() as largest:
        run()
    return {
        "peak_bytes": peak,
        "seconds": taken,
        "cpu_seconds": cpu,
        "largest_tensor": largest.elements,
        "tokens_times_vocabulary": tokens * vocabulary,
    }


def heads(args) -> None:
    names = list(head_sides(torch.zeros(1, 1), torch.zeros(20, 1), torch.zeros(1).long()))
    for vocabulary in (49152, 150_000):

        def measure(side, vocabulary=vocabulary):
            command = [sys.executable, __file__, "--one-head", side, str(vocabulary)]
            command += ["--tokens", str(args.tokens), "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return json.loads(done.stdout)

        found = alternate({name: partial(measure, name) for name in names}, args.repeats)
        lines = [f"vocabulary {vocabulary}, {args.tokens} tokens, hidden 576, float32:"]
        for name, runs in found.items():
            peak = median(one["peak_bytes"] for one in runs) / 2**20
            taken = median(one["seconds"] for one in runs)
            cpu = median(one["cpu_seconds"] for one in runs)
            largest = runs[0]["largest_tensor"] / (args.tokens * vocabulary)
            lines.append(
                f"    {name:<22} peak {peak:5.0f} MiB, {taken:5.2f} s, {cpu:5.2f} s of CPU, "
                f"largest tensor {largest:.2f} of [tokens, vocabulary]"
            )
        fields = {"vocabulary": vocabulary, "tokens": args.tokens, "hidden": 576}
        fields |= {"dtype": "float32", "runs": found}
        emit("learner head", fields, "\n".join(lines), args.out)


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
