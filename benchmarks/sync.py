"""Seconds to move the learner's weights into a vLLM engine and prove them, next to a plain memory
copy of the same bytes, with where the time goes.

    python benchmarks/sync.py [--model models/smollm2] [--dtype float32] [--repeats 6] [--threads 2]

Real stack: DeepSpeed learner and vLLM engine in Ray actors on this machine. Before every sync the
learner takes an optimizer step, so that all weights differ; after the last one, log-probs of
freshly sampled tokens are compared between engine and learner. The engine is the same process
throughout: nothing is restarted.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from report import emit, seconds, spread

LINE = re.compile(r"weights (sent|received): (.*)")


def phases(log: Path) -> list[dict[str, float]]:
    """The lines that Stopwatch left in a log, one dict per sync."""
    found = [
        match[2]
        for line in log.read_text(errors="replace").splitlines()
        if (match := LINE.search(line))
    ]
    return [
        {part.rpartition(" ")[0]: float(part.rpartition(" ")[2]) for part in line.split(", ")}
        for line in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()

    from tandem.algorithms.base import Term
    from tandem.algorithms.parts.objectives.nll import NLL
    from tandem.engine.config.schema import (
        ClusterConfig,
        Config,
        DataConfig,
        LearnerConfig,
        ModelConfig,
        RolloutConfig,
        SyncConfig,
    )
    from tandem.engine.core.types import GenRequest, Prompt, Row, Sampling, Source, StepPlan
    from tandem.engine.learner.packing import pack
    from tandem.engine.learner.protocol import PolicySpec
    from tandem.engine.learner.ray import RayLearner
    from tandem.engine.learner.terms import denominators
    from tandem.engine.weights import verify as weights
    from tandem.launch import placement
    from tandem.rollout.pool import EnginePool

    torch.set_num_threads(args.threads)
    path = str(Path(args.model).resolve())
    config = Config(
        model=ModelConfig(path=path, dtype=args.dtype),
        data=DataConfig(max_prompt_tokens=256),
        learner=LearnerConfig(grad_clip=1.0),
        rollout=RolloutConfig(max_tokens=32, kv_cache_gib=0.25, max_sequences=8),
        sync=SyncConfig(transport=args.transport),
        cluster=ClusterConfig(threads=args.threads),
    )
    term, tokens = Term("sft", NLL()), np.arange(100, 132, dtype=np.int32)
    row = Row(
        tokens,
        np.full(32, Source.EXPERT, np.int8),
        {"sft": np.r_[0.0, np.ones(31)].astype(np.float32)},
    )

    def step():
        return StepPlan((term,), denominators((term,), [row]), pack([row], (term,), 1, 64, 0), 1e-5)

    prompt = Prompt("p", np.random.default_rng(0).integers(100, 200, 200).astype(np.int32), "")

    with tempfile.TemporaryDirectory() as folder:
        places = placement.start(config, folder)
        try:
            pool = EnginePool.start(config, path, places, folder)
            learner = RayLearner.start(config, path, PolicySpec(), places, folder)
            learner.connect(pool)
            reports = []
            for version in range(args.repeats + 1):
                # leaves the prompt in the prefix cache
                sampled = pool.submit(
                    GenRequest(version, prompt, 4, Sampling(16, seed=version))
                ).result(timeout=300)
                learner.step(step())
                reports.append(weights.sync(learner, version + 1))
            hits = pool.stats()["prefix_cache_hit_rate"]
            sampled = pool.submit(GenRequest(99, prompt, 4, Sampling(16, seed=99))).result(
                timeout=300
            )
            rows = [
                Row(t.tokens, t.source, {"x": (t.source == Source.POLICY).astype(np.float32)})
                for t in sampled
            ]
            gap = max(
                float(np.nanmax(np.abs(logp - t.behaviour_logp)))
                for logp, t in zip(learner.logprobs(rows, 1.0), sampled, strict=True)
            )
            sent, received = (
                phases(Path(folder) / "logs/learner_0.log"),
                phases(Path(folder) / "logs/engine_0.log"),
            )
            learner.close()
            pool.close()
        finally:
            places.close()
    size = reports[-1].bytes
    source, target = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    copy = median(seconds(lambda: target.copy_(source)) for _ in range(9))
    times = [report.seconds for report in reports[1:]]  # the first one allocates

    def middle(found):
        return {phase: median(one[phase] for one in found[1:]) for phase in found[-1]}

    whole = median(times)
    sent, received = middle(sent), middle(received)
    sent["compare, versions, held digests"] = whole - sum(sent.values())

    def show(found):
        return ", ".join(f"{phase} {value:.2f}" for phase, value in found.items())

    emit(
        "sync",
        {
            "bytes": size,
            "dtype": args.dtype,
            "seconds": times,
            "copy_seconds": copy,
            "ratio": whole / copy,
            "learner": sent,
            "engine": received,
            "max_gap_after": gap,
            "prefix_cache_hit_rate": hits,
        },
        f"{size / 1e6:.0f} MB: {spread(times)} s, a copy {copy:.3f} s, ratio "
        f"{whole / copy:.1f} (goal 10); learner: {show(sent)}; engine, meanwhile: "
        f"{show(received)}; "
        f"largest log-prob gap after the last sync {gap:.1e}",
        args.out,
    )


if __name__ == "__main__":
    main()
