"""Tokens per second of the whole rollout side next to the bare engine, on the same prompts and
settings, alternating.

    python benchmarks/rollout.py [--workload w1] [--model models/smollm2] [--dtype float32]
    [--threads 2] [--repeats 5]
    python benchmarks/rollout.py --inline                  the in-process backend next to
                                                           transformers' generate

Ours: requests through the pool, Ray, log-prob and version of every token, carriers, text decoded,
rewards scored in their process. Bare: vLLM's own `LLM.generate` with the same SamplingParams in a
process of its own, its answers thrown away. Both engines are up all the time and take turns.
Prefix-cache hits are ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from report import alternate, emit, seconds, spread
from workloads import WORKLOADS, make_model, write_data

HERE = Path(__file__).resolve().parent


def bare(args, path: str) -> None:
    """The child: bare vLLM.

    Reads one line of JSON prompts a round from stdin, answers with the seconds it took.
    """
    from tandem.engine.config.schema import ClusterConfig, Config
    from tandem.rollout.vllm.backend import engine_arguments, set_environment

    config = settings(args, path)
    set_environment(Config(cluster=ClusterConfig(threads=args.threads)))
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(path, config, 0)
    for ours in ("weight_transfer_config", "worker_extension_cls", "distributed_executor_backend"):
        arguments.pop(ours)
    llm = LLM(**arguments)
    w = WORKLOADS[args.workload]
    params = SamplingParams(
        n=args.samples or w.samples,
        temperature=1.0,
        max_tokens=w.tokens,
        min_tokens=w.tokens,
        logprobs=0,
        detokenize=False,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        generate = partial(llm.generate, prompts, params, use_tqdm=False)
        print(seconds(generate), flush=True)


def settings(args, path: str):
    from tandem.engine.config.schema import (
        ClusterConfig,
        Config,
        DataConfig,
        ModelConfig,
        RewardConfig,
        RolloutConfig,
    )

    w = WORKLOADS[args.workload]
    return Config(
        model=ModelConfig(path=path, dtype=args.dtype),
        data=DataConfig(max_prompt_tokens=512),
        rollout=RolloutConfig(
            max_tokens=w.tokens, max_sequences=w.prompts * w.samples, kv_cache_gib=0.5
        ),
        reward=RewardConfig(functions=(f"{HERE / 'workloads.py'}:even_letters",)),
        cluster=ClusterConfig(threads=args.threads),
    )


def against_vllm(args, path: str, prompts: list[np.ndarray], tokenizer) -> None:
    from tandem.engine.core.types import GenRequest, Prompt, Sampling
    from tandem.launch import placement
    from tandem.rollout.pool import EnginePool
    from tandem.rollout.rewards.runner import RewardRunner

    w, config = WORKLOADS[args.workload], settings(args, path)
    samples = args.samples or w.samples
    total = w.prompts * samples * w.tokens
    # every round has prompts of its own: the prefix cache may help within a group only, on both
    # sides
    turn = iter(range(10**6))

    def share(number):
        return [prompts[(number * w.prompts + i) % len(prompts)] for i in range(w.prompts)]

    child = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--bare", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # read when torch is imported
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
    )
    with tempfile.TemporaryDirectory() as folder:
        places = placement.start(config, folder)
        try:
            pool = EnginePool.start(config, path, places, folder)
            rewards = RewardRunner(config.reward, 0, inline=False, log=Path(folder) / "rewards.log")
            while (line := child.stdout.readline()).strip() != "ready":
                if not line:
                    raise RuntimeError("bare vLLM did not start; see its messages above")

            def ours() -> float:
                number = next(turn)

                def run():
                    futures = [
                        (
                            p,
                            pool.submit(
                                GenRequest(
                                    number * w.prompts + i,
                                    p,
                                    samples,
                                    Sampling(w.tokens, min_tokens=w.tokens),
                                )
                            ),
                        )
                        for i, ids in enumerate(share(number))
                        for p in [Prompt(str(i), ids, "", {})]
                    ]
                    scored = []
                    for prompt, future in futures:
                        responses = [t.response for t in future.result(timeout=600)]
                        scored.append(
                            rewards.submit(
                                prompt, [tokenizer.decode(r) for r in responses], responses
                            )
                        )
                    for score in scored:
                        score.result(timeout=60)

                return total / seconds(run)

            def theirs() -> float:
                child.stdin.write(json.dumps([ids.tolist() for ids in share(next(turn))]) + "\n")
                child.stdin.flush()
                return total / float(child.stdout.readline())

            sides = {"pool": ours, "bare vLLM": theirs}
            alternate(sides, 1)
            found = alternate(sides, args.repeats)
            hits = pool.stats()["prefix_cache_hit_rate"]
            rewards.close()
            pool.close()
        finally:
            places.close()
            child.stdin.close()
            child.wait(timeout=60)
    ratio = median(a / b for a, b in zip(found["pool"], found["bare vLLM"], strict=True))
    shape = (
        f"{w.prompts} prompts x {samples} samples x {w.tokens} tokens, {args.dtype}, "
        f"{args.threads} thread(s)"
    )
    emit(
        "rollout",
        {
            "workload": args.workload,
            "shape": shape,
            "tokens_per_second": found,
            "ratio": ratio,
            "prefix_cache_hit_rate": hits,
        },
        f"{args.workload} ({shape}): pool {spread(found['pool'])} tokens/s, bare vLLM "
        f"{spread(found['bare vLLM'])}, ratio {ratio:.2f} (goal 0.95); "
        f"prefix-cache hits {hits:.2f} of prompt tokens",
        args.out,
    )


def against_generate(args, path: str, prompts: list[np.ndarray]) -> None:
    """The in-process backend; both sides give every token's log-prob."""
    import torch

    from tandem.engine.core.types import GenRequest, Prompt, Sampling
    from tandem.rollout.backends.hf import HFBackend

    torch.set_num_threads(args.threads)
    w = WORKLOADS[args.workload]
    samples = args.samples or w.samples
    total, backend = w.prompts * samples * w.tokens, HFBackend(path, settings(args, path), 0)
    pad = max(map(len, prompts))
    ids = torch.tensor(
        np.stack([np.pad(p, (pad - len(p), 0)) for p in prompts[: w.prompts]]).repeat(samples, 0)
    ).long()
    mask = torch.tensor(
        np.stack([np.pad(np.ones(len(p)), (pad - len(p), 0)) for p in prompts[: w.prompts]]).repeat(
            samples, 0
        )
    ).long()
    requests = [
        GenRequest(i, Prompt(str(i), p, ""), samples, Sampling(w.tokens, min_tokens=w.tokens))
        for i, p in enumerate(prompts[: w.prompts])
    ]

    def generate():
        out = backend.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=w.tokens,
            min_new_tokens=w.tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
        backend.model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)

    sides = {
        "backend": lambda: total / seconds(lambda: backend.generate_all(requests)),
        "generate": lambda: total / seconds(generate),
    }
    alternate(sides, 1)
    found = alternate(sides, args.repeats)
    ratio = median(a / b for a, b in zip(found["backend"], found["generate"], strict=True))
    emit(
        "rollout inline",
        {
            "workload": args.workload,
            "dtype": args.dtype,
            "threads": args.threads,
            "tokens_per_second": found,
            "ratio": ratio,
        },
        (
            f"{args.workload} {args.dtype}: in-process backend {spread(found['backend'])} "
            f"tokens/s, transformers' generate {spread(found['generate'])}, ratio {ratio:.2f}"
        ),
        args.out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="w4")
    parser.add_argument("--model", default="models/smollm2", help="of w1 (tandem fetch smollm2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, help="per prompt (default: the workload's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.bare:
        return bare(args, args.bare)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(args.workload, folder)
        path = str(
            Path(args.model).resolve() if args.workload == "w1" else make_model(folder / "model")
        )
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        prompts = [
            np.array(tokenizer(json.loads(line)["prompt"]).input_ids, np.int32)
            for line in (folder / "prompts.jsonl").read_text().splitlines()
        ]
        if args.inline:
            against_generate(args, path, prompts)
        else:
            against_vllm(args, path, prompts, tokenizer)


if __name__ == "__main__":
    main()
