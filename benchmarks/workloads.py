"""The workloads that Tandem and its peers are timed on: model, prompt texts, expert answers, the
reward and the forced response length.

    w1  SmolLM2-135M-Instruct, sums as chat prompts, 8 prompts x 4 samples x 64 new tokens
    w4  a 3.3 M Llama with a 512-token BPE that is made here, 32 prompts x 8 samples x 32 new tokens
    prefix  the same model, 8 prompts of about 300 tokens (worked examples first) x 8 samples x 32
            new tokens

Prompts are plain text, so that both sides tokenise the same string to the same ids. Every response
is forced to its full length: both sides then do equally much work. Nothing heavy is imported: the
reward runs in reward processes, and the peer's Python, which has no tandem, imports this file too.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workload:
    prompts: int  # per step
    samples: int  # per prompt
    tokens: int  # per response, exactly
    experts: int  # demonstrations of a CHORD step
    learning_rate: float


WORKLOADS = {
    "w1": Workload(8, 4, 64, 8, 1e-6),
    "w4": Workload(32, 8, 32, 32, 1e-4),
    "prefix": Workload(8, 8, 32, 8, 1e-4),
    "smoke": Workload(4, 2, 8, 4, 1e-4),
}
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def question(terms: list[int]) -> str:
    """In the words of reasoning-gym's chain_sum."""
    return (
        "State the final answer to the following arithmetic problem: "
        f"{' + '.join(map(str, terms))} ="
    )


def examples(rng: random.Random, count: int = 16) -> str:
    """Worked examples in front of a question, other ones for every prompt: nothing but the samples
    of one group can share them.
    """
    drawn = [[rng.randrange(10, 100) for _ in range(2)] for _ in range(count)]
    return "".join(f"{question(terms)} {sum(terms)}\n" for terms in drawn)


def even_letters(completions, prompts, **columns) -> list[float]:
    """Share of characters with an even code: costs nothing, differs between samples, and has a
    gradient.
    """
    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]


def write_data(name: str, folder: Path, rows: int = 512) -> None:
    """prompts.jsonl and experts.jsonl."""
    rng = random.Random(0)
    with (
        open(folder / "prompts.jsonl", "w") as prompts,
        open(folder / "experts.jsonl", "w") as experts,
    ):
        for i in range(2 * rows):
            terms = [rng.randrange(10, 100) for _ in range(rng.choice((2, 3)))]
            row = {
                "prompt": CHAT.format(question(terms))
                if name == "w1"
                else examples(rng) + question(terms)
                if name == "prefix"
                else question(terms)
            }
            if i < rows:
                prompts.write(json.dumps(row) + "\n")
            else:
                words = " + ".join(map(str, terms))
                row["response"] = (
                    f"I add the numbers one after the other: {words} = {sum(terms)}. The "
                    f"answer is {sum(terms)}."
                )
                experts.write(json.dumps(row) + "\n")


def make_model(folder: Path) -> Path:
    """The 3.3 M Llama of w4 with a byte-level BPE of 512 tokens, as a Hugging Face folder.

    Same bytes on every call.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    rng = random.Random(1)
    texts = [
        question([rng.randrange(10, 100) for _ in range(rng.choice((2, 3)))]) for _ in range(2000)
    ]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=1024,
    )
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(
        dict(model.named_parameters()), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder
