"""TRL's GRPOTrainer on a workload of workloads.py; runs in a Python of its own that has TRL and not
Tandem. Prints one JSON line; step.py starts it.

    python benchmarks/peer_trl.py --workload w4 --model FOLDER --data FOLDER --steps 4 --dtype
    float32

Settings are TRL's fastest of those tried on a CPU: Hugging Face generate, no gradient
checkpointing, the whole batch in one micro-batch, OpenMP as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("workload", "model", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "autocast"),
        default="float32",
        help="autocast: float32 weights, bfloat16 matmuls",
    )
    parser.add_argument("--micro-batch", type=int, help="sequences per forward (default: all)")
    a = parser.parse_args()

    import torch
    import transformers
    import trl
    from datasets import load_dataset
    from transformers import TrainerCallback
    from turns import Turns
    from workloads import WORKLOADS, even_letters

    w = WORKLOADS[a.workload]
    size = w.prompts * w.samples
    micro = a.micro_batch or size
    turns, times = Turns(), {"generate": []}
    tokens: list[dict] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.arrive()

    class Trainer(trl.GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            began = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            times["generate"].append(time.perf_counter() - began)
            return result

        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            tokens.append(
                {
                    "prompt": int(out["prompt_mask"].sum()),
                    "completion": int(out["completion_mask"].sum()),
                }
            )
            return out

    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=a.dtype == "autocast",
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            num_generations=w.samples,
            max_completion_length=w.tokens,
            generation_kwargs={"min_new_tokens": w.tokens},
            learning_rate=w.learning_rate,
            lr_scheduler_type="constant",
            beta=0.0,
            max_steps=a.steps,
            temperature=1.0,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            shuffle_dataset=False,
            seed=0,
            model_init_kwargs={"dtype": "bfloat16" if a.dtype == "bfloat16" else "float32"},
        )
        data = load_dataset(
            "json", data_files=f"{a.data}/prompts.jsonl", split="train", cache_dir=scratch
        )
        trainer = Trainer(
            model=a.model,
            reward_funcs=even_letters,
            args=config,
            train_dataset=data,
            callbacks=[Clock()],
        )
        with contextlib.suppress(SystemExit):  # told to stop
            trainer.train()
    print(
        json.dumps(
            {
                **times,
                "tokens": tokens,
                "threads": torch.get_num_threads(),
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
            }
        )
    )


if __name__ == "__main__":
    main()
