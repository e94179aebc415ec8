"""Sampled tokens per second of the in-process backend, next to transformers' own `generate`, on the same model, prompts and lengths.

    python benchmarks/rollout.py [--model FOLDER] [--prompts 32] [--samples 8] [--prompt-tokens 32] [--tokens 32] [--threads 1]

Every response has exactly `--tokens` tokens. Both sides give tokens and the log-prob of each. Best of three, wall and CPU seconds.
"""
from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tandem.engine.config import Config, ModelConfig, RolloutConfig
from tandem.engine.tiny import make_tiny
from tandem.engine.types import GenRequest, Prompt, Sampling
from tandem.rollout.hf_backend import HFBackend


def best(function, tokens: int) -> str:
    runs = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        runs.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = min(runs)
    return f"{tokens / wall:8.0f} tokens/s   {tokens / cpu:8.0f} per CPU second"


def transformers_generate(model, requests: list[GenRequest], rows: int) -> None:
    """generate() in batches of `rows`, log-probs from its scores."""
    ids = torch.from_numpy(np.repeat(np.stack([r.prompt.tokens for r in requests]), requests[0].samples, 0)).long()
    n = requests[0].sampling.max_tokens
    for part in ids.split(rows):
        out = model.generate(part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0, max_new_tokens=n, min_new_tokens=n,
                             return_dict_in_generate=True, output_scores=True)
        model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for name, value in (("prompts", 32), ("samples", 8), ("prompt-tokens", 32), ("tokens", 32), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as scratch:
        path = a.model or str(make_tiny(Path(scratch) / "tiny"))
        rng = np.random.default_rng(0)
        requests = [GenRequest(i, Prompt(str(i), rng.integers(7, 100, a.prompt_tokens).astype(np.int32), ""), a.samples, Sampling(a.tokens, min_tokens=a.tokens, seed=0))
                    for i in range(a.prompts)]
        print(f"{a.prompts} prompts of {a.prompt_tokens} tokens, {a.samples} samples of {a.tokens} tokens each, {a.threads} thread(s)")
        for rows in (16, 64, 256):
            backend = HFBackend(path, Config(mode="inline", model=ModelConfig(path=path), rollout=RolloutConfig(max_sequences=rows)), 0)
            total = a.prompts * a.samples * a.tokens
            print(f"max_sequences {rows:3}   tandem hf {best(lambda: backend.generate_all(requests), total)}")
            print(f"{'':17}   generate  {best(lambda: transformers_generate(backend.model, requests, rows), total)}", flush=True)


if __name__ == "__main__":
    main()
