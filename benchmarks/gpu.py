"""The learner on one NVIDIA GPU: MFU of a 0.5 B and a 1.5 B model with random weights, and memory
and time of the head against a naive one and Liger's.

    bash benchmarks/gpu.sh            or: python benchmarks/gpu.py [--models 0.5b 1.5b] [--tokens
                                      8192] [--sequence 1024] [--steps 6]

Needs torch, transformers and DeepSpeed; no vLLM, no Ray, no downloads. MFU counts the FLOPs that a
forward and a backward must have (6 per parameter and token, embedding look-up left out, plus causal
attention over each sequence's own length), whatever is computed again on the way, over the whole
optimizer step. The peak is the data sheet's dense bfloat16 rate of the device that is found; beside
it stands the rate of one large matmul on this very device.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from report import emit, spread

# hidden, layers, heads, key-value heads, intermediate, vocabulary, tied: those of Qwen2.5
SHAPES = {
    "tiny": (256, 2, 4, 2, 512, 1024, True),
    "0.5b": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151_936, True),
}
# dense bf16 FLOP/s
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def make_model(name: str, folder: Path) -> Path:
    """Random weights, written once: the learner loads them as it loads any model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, kv, intermediate, vocabulary, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def flops(policy, rows: int, length: int) -> float:
    """Of one forward and backward: matmuls of all weights but the look-up, and causal attention."""
    config = policy.model.config
    embedding = (
        0 if config.tie_word_embeddings else policy.model.get_input_embeddings().weight.numel()
    )
    weights = sum(p.numel() for p in policy.parameters()) - embedding
    attention = (
        config.num_hidden_layers
        * config.num_attention_heads
        * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        * length
    )
    return rows * length * 6 * (weights + attention)


def peak(device: torch.device) -> tuple[str, float | None]:
    if device.type != "cuda":
        return "cpu", None
    name = torch.cuda.get_device_name()
    return name, next(
        (value for key, value in PEAKS.items() if all(word in name for word in key.split())), None
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / median(times[2:])


def learner(args, name: str) -> None:
    from tandem.algorithms.base import Term
    from tandem.algorithms.parts.objectives.nll import NLL
    from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
    from tandem.engine.core.types import Row, Source, StepPlan
    from tandem.engine.learner.local_engine import join
    from tandem.engine.learner.packing import pack
    from tandem.engine.learner.protocol import PolicySpec
    from tandem.engine.learner.rank import LearnerRank, build_policy
    from tandem.engine.learner.terms import denominators
    from tandem.engine.learner.zero_engine import ZeroEngine

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        path = str(make_model(name, Path(folder) / "model"))
        config = Config(
            model=ModelConfig(path=path, dtype="bfloat16", attention=args.attention),
            learner=LearnerConfig(
                zero_stage=1,
                micro_batch_tokens=args.tokens,
                gradient_checkpointing=args.checkpointing,
                entropy=False,
            ),
        )
        if not torch.distributed.is_initialized():
            join(0, 1, "127.0.0.1", args.port, 120.0, gpu=gpu)
        spec = PolicySpec()
        engine = ZeroEngine(build_policy(config, path, spec), config.learner)
        rank = LearnerRank(config, path, spec, engine)
    policy, device, terms = rank.engine.module, rank.engine.device, (Term("sft", NLL()),)
    count, rng = args.tokens // args.sequence * args.micro_batches, np.random.default_rng(0)
    rows = [
        Row(
            rng.integers(0, SHAPES[name][5], args.sequence).astype(np.int32),
            np.full(args.sequence, Source.EXPERT, np.int8),
            {"sft": np.r_[0.0, np.ones(args.sequence - 1)].astype(np.float32)},
        )
        for _ in range(count)
    ]
    work, times = flops(policy, count, args.sequence), []
    for _ in range(args.steps + 2):
        plan = StepPlan(
            terms, denominators(terms, rows), pack(rows, terms, 1, args.tokens, 0), 1e-6
        )
        wait(device)
        began = time.perf_counter()
        rank.step(plan)
        wait(device)
        times.append(time.perf_counter() - began)
    times = times[2:]
    found, limit = peak(device)
    rate, gemm = work / median(times), matmul_rate(device)
    mfu = rate / limit if limit else None
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    emit(
        "gpu learner",
        {
            "model": name,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "device": found,
            "tokens_per_step": count * args.sequence,
            "micro_batch_tokens": args.tokens,
            "sequence": args.sequence,
            "attention": args.attention,
            "checkpointing": args.checkpointing,
            "seconds": times,
            "flops_per_second": rate,
            "peak": limit,
            "mfu": mfu,
            "matmul": gemm,
            "share_of_matmul": rate / gemm,
            "memory_gib": memory,
        },
        (
            f"{name} on {found}: step {spread(times)} s, "
            f"{count * args.sequence / median(times):.0f} tokens/s, {rate / 1e12:.3g} TFLOP/s"
        )
        + (
            f", MFU {mfu:.3f} of {limit / 1e12:.0f} (goal 0.45 at 1.5b)"
            if mfu
            else ", no known peak"
        )
        + f", {rate / gemm:.2f} of one large matmul"
        + (f", {memory:.1f} GiB" if memory else ""),
        args.out,
    )
    rank.engine.engine.destroy()


def heads(args) -> None:
    """Forward and backward of the head alone, hidden 1536."""
    from tandem.engine.model.chunked_head import token_logprobs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary, hidden, tokens = (
        (151_936, 1536, args.tokens) if device.type == "cuda" else (8192, 256, 512)
    )
    h = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(vocabulary, hidden, device=device) * 0.02).bfloat16().requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device)
    kinds = {
        "chunked": lambda: token_logprobs(h, w, None, target)[0].mean(),
        "naive": lambda: (h @ w.T).float().log_softmax(-1).gather(-1, target[:, None]).mean(),
    }
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        kinds["liger"] = lambda: LigerFusedLinearCrossEntropyLoss()(w, h, target)
    except ImportError:
        pass  # compared only where it is installed
    found = {}
    for name, forward in kinds.items():
        times = []
        for _ in range(args.steps + 2):
            h.grad = w.grad = None
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            wait(device)
            began = time.perf_counter()
            forward().backward()
            wait(device)
            times.append(time.perf_counter() - began)
        found[name] = {
            "seconds": times[2:],
            "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20
            if device.type == "cuda"
            else None,
        }
    emit(
        "gpu head",
        {
            "device": peak(device)[0],
            "tokens": tokens,
            "vocabulary": vocabulary,
            "hidden": hidden,
            "heads": found,
        },
        f"{tokens} tokens, vocabulary {vocabulary}: "
        + "; ".join(
            f"{name} {1000 * median(one['seconds']):.1f} ms"
            + (f", {one['peak_mib']:.0f} MiB" if one["peak_mib"] else "")
            for name, one in found.items()
        ),
        args.out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["0.5b", "1.5b"], choices=list(SHAPES))
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true")
    for name, value in (
        ("tokens", 8192),
        ("sequence", 1024),
        ("micro-batches", 2),
        ("steps", 6),
        ("port", 29533),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out")
    args = parser.parse_args()
    heads(args)
    for name in args.models:
        learner(args, name)


if __name__ == "__main__":
    main()
