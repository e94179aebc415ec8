"""The policy: a Hugging Face causal LM run on packed bins, with the chunked head in place of its own.

One call signature keeps packed sequences apart: `input_ids` and `position_ids`, no attention mask, `use_cache=False`. With a mask or a cache transformers
attends across them without a word. `Policy.forward` owns that call, and `load_policy` checks on real numbers that the model keeps sequences apart
and that the chunked head gives the model's own log-probs, so that a model it does not fit is an error at load time.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tandem.engine.attention import use_fast_attention
from tandem.engine.config import ConfigError, ModelConfig
from tandem.engine.export import Origin, find_origin
from tandem.engine.heads import Head, ValueHead, logit_map
from tandem.engine.hub import use_cache_if_unreachable
from tandem.engine.rope import separate_rows
from tandem.engine.self_check import can_share, refuse_unpackable, self_check

TINY = "tandem:tiny"


def resolve_model(model: ModelConfig) -> str:
    """Where to load from: a local folder or a hub name. `tandem:tiny` is made on first use. Raises ConfigError if there is no such model."""
    if model.path == TINY:
        from tandem.engine.tiny import tiny_folder
        return str(tiny_folder())
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path is {model.path!r}: the folder has no config.json, expected a Hugging Face model folder")
        return str(folder.resolve())
    if folder.is_absolute() or model.path.startswith((".", "~")):
        raise ConfigError(f"model.path is {model.path!r}: there is no such folder")
    offline = use_cache_if_unreachable()
    try:
        read_config(model, model.path)
    except ConfigError as error:
        raise ConfigError(f"{error}{offline}") from None
    return model.path


def read_config(model: ModelConfig, path: str):
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:      # a damaged config.json raises errors of many types
        where = "its config.json could not be read" if Path(path).is_dir() else "neither a local folder nor a model that could be loaded"
        raise ConfigError(f"model.path is {model.path!r}: {where}: {first_line(error)}{remote_code_hint(error)}") from None


def remote_code_hint(error: Exception) -> str:
    if "trust_remote_code" not in str(error):
        return ""
    return "; set model.trust_remote_code=true if you trust the Python files of the model"


def load_tokenizer(model: ModelConfig):
    """The tokenizer of `model.tokenizer`, or the model's own. Raises ConfigError if it is not found, has no EOS or pad, or does not fit the model."""
    from transformers import AutoTokenizer
    path = resolve_model(model)
    config = read_config(model, path)
    source = model.tokenizer or path
    key = "model.tokenizer" if model.tokenizer else "model.path"
    offline = "" if Path(source).exists() else use_cache_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:      # the tokenizers library raises bare Exceptions for a damaged tokenizer.json
        raise ConfigError(f"{key} is {source!r}: no tokenizer could be loaded from there: {first_line(error)}{remote_code_hint(error)}{offline}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {key} {source!r} has no EOS token: responses could never end; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer of {key} {source!r} has no pad token, which batched generation needs; "
                          f"set pad_token in its tokenizer_config.json, e.g. to a reserved token or to {tokenizer.eos_token!r}")
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values())
    if size is not None and largest >= size:
        raise ConfigError(f"the tokenizer of {key} {source!r} has token ids up to {largest}, but the model {model.path!r} has a vocabulary of {size}; "
                          "use the model's own tokenizer or resize the embeddings")
    return tokenizer


class Policy(nn.Module):
    """`model` is the whole Hugging Face model, `head` the chunked head over the very same parameters, `critic` a value head or None.

    The critic is no part of `model`: engines are not sent it and an exported model does not have it.
    Dropout stays off, also in training: the policy that is trained must be the policy that sampled.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()
        self.head = Head(model.get_output_embeddings(), *logit_map(model.config.get_text_config()))
        self.critic: ValueHead | None = None
        # With flash attention transformers keeps packed sequences apart in a batch of one only; rows start at position 0, so bins can stand in one line.
        self.one_line = "flash" in model.config._attn_implementation
        self.shares_prompts = False     # see `can_share`
        self.origin: Origin | None = None       # the checkpoint it was loaded from, which an export reproduces

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, index: torch.Tensor, target: torch.Tensor, temperature: float = 1.0,
                chunk: int = 1024, entropy: bool = False, custom=None, tags=None, tree: torch.Tensor | None = None) -> tuple:
        """Log-prob of `target[i]` given the hidden state at flat position `index[i]` of the bins, as in `MicroBatch`, and the critic's value of that state.

        tokens, positions int64 [B, L]; index, target int64 [n] -> (logp [n], entropy [n] or None, value [n] or None), float32.
        `tree` int64 [2, B, L] as in `MicroBatch`, for a policy that `shares_prompts`. `custom` is Method.forward, which then does all this itself, with `tags`.
        """
        if custom is not None:
            return custom(self, tokens, positions, index, target, temperature, chunk, entropy, tags)
        hidden = self.trunk(tokens, positions, tree=tree)[index]
        return *self.head(hidden, target, temperature, chunk, entropy), None if self.critic is None else self.critic(hidden)

    def trunk(self, tokens: torch.Tensor, positions: torch.Tensor, embeddings: torch.Tensor | None = None,
              tree: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [B * L, H] of the bins; with `embeddings` [B, L, H] in the place of those of the tokens, and `tree` where rows share prompts."""
        if self.one_line:
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        if embeddings is None:
            inputs = {"input_ids": tokens}
        else:
            inputs = {"inputs_embeds": embeddings.reshape(*tokens.shape, -1)}
        if tree is not None:
            inputs["attention_mask"] = tree_mask(tree)      # transformers takes a mask of four dimensions as it is
        hidden = self.model.get_decoder()(**inputs, position_ids=positions, use_cache=False)[0]
        return hidden.reshape(-1, hidden.shape[-1])

    def add_critic(self, embedding: int = 0) -> None:
        self.critic = ValueHead(self.head.weight, embedding)

    def train(self, mode: bool = True):
        """Leaves the modules below alone, so that dropout stays off."""
        self.training = mode
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations of each layer again in backward. Raises ConfigError if the model cannot."""
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(f"learner.gradient_checkpointing is true, but {type(self.model).__name__} does not support it; set it to false")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True      # this flag alone switches it on; the dropout modules below stay off

    def use_liger(self) -> None:
        """Put Liger's kernels into the decoder. Raises ConfigError if Liger is not installed or does not know the model. Not run: it needs a GPU."""
        try:
            from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
        except ImportError as error:
            raise ConfigError(f"learner.liger is true, but Liger cannot be imported ({first_line(error)}): pip install liger-kernel, or set learner.liger=false") from None
        if self.model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ConfigError(f"learner.liger is true, but Liger has no kernels for {self.model.config.model_type!r} models; set learner.liger=false")
        _apply_liger_kernel_to_instance(self.model, cross_entropy=False, fused_linear_cross_entropy=False)      # the head is ours

    def compile_layers(self, gpu: bool) -> None:
        """torch.compile of every decoder layer, once for all shapes. Raises ConfigError where there is nothing to compile it with."""
        if not gpu and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            raise ConfigError("learner.compile is true, which on a CPU needs a C++ compiler, and there is neither g++ nor clang++ on this machine's PATH "
                              "(nor is CXX set); install one or set learner.compile=false")
        for layer in self.model.get_decoder().layers:
            layer.compile(dynamic=True)


def load_policy(model: ModelConfig) -> Policy:
    """Load the model of the config on the CPU and check that packing and the chunked head reproduce its own log-probs. Raises ConfigError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    path = resolve_model(model)
    refuse_quantized(model, path)
    try:
        causal, loading = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, model.dtype), attn_implementation=model.attention,
                                                               trust_remote_code=model.trust_remote_code, output_loading_info=True)
    except Exception as error:      # transformers, safetensors, torch.load and remote code raise many types for files that are no model
        raise ConfigError(f"model {model.path!r} could not be loaded with attention={model.attention!r}, dtype={model.dtype!r}: "
                          f"{type(error).__name__}: {first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"model {model.path!r}: its weight files lack {len(missing)} parameters, among them {', '.join(missing[:3])}; "
                          "they would stay random: export or download it again")
    refuse_unpackable(causal, model)
    if model.attention == "sdpa" and model.dtype == "bfloat16":
        use_fast_attention(causal)
    separate_rows(causal)
    policy = Policy(causal)
    self_check(policy, model)
    policy.shares_prompts = can_share(policy)
    policy.origin = find_origin(causal, path)
    return policy


def tree_mask(tree: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L]: a token sees the tokens before it, and itself, of its own block and of its prompt's."""
    block, prompt = tree[0], tree[1]
    related = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == prompt[:, :, None])
    return related.tril()[:, None]


def refuse_quantized(model: ModelConfig, path: str) -> None:
    """Transformers would give such weights back in another dtype and layout, or in one that cannot be trained."""
    settings = getattr(read_config(model, path), "quantization_config", None)
    if settings:
        kind = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise ConfigError(f"model {model.path!r} is quantized ({getattr(kind, 'value', kind)}: quantization_config in its config.json), so that it could "
                          "neither be trained nor exported as it is; save it once in bfloat16, without quantization_config, and set model.path to that")


def hf_parameters(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the Hugging Face checkpoint, parameter), tied weights once."""
    return policy.model.named_parameters()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
