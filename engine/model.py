"""The policy: a Hugging Face causal LM run on packed bins, with the chunked head in place of its own.

One call signature keeps packed sequences apart: `input_ids` and `position_ids`, no attention mask, `use_cache=False`. With a mask or a cache transformers
attends across them without a word. `Policy.forward` owns that call, and `load_policy` checks on real numbers that the model keeps sequences apart
and that the chunked head gives the model's own log-probs, so that a model it does not fit is an error at load time.
"""
from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from tandem.engine.attention import NAME, use_fast_attention
from tandem.engine.config import ConfigError, ModelConfig
from tandem.engine.logprob import token_logprobs

TINY = "tandem:tiny"
TINY_FOLDER = Path("models/tiny")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}      # of `self_check`, on log-probs


def resolve_model(model: ModelConfig) -> str:
    """Where to load from: a local folder or a hub name. `tandem:tiny` is made on first use. Raises ConfigError if there is no such model."""
    if model.path == TINY:
        if not (TINY_FOLDER / "config.json").is_file():
            from tandem.engine.tiny import make_tiny
            try:
                make_tiny(TINY_FOLDER)
            except FileExistsError:
                if not (TINY_FOLDER / "config.json").is_file():     # else another run has just made it
                    raise
        return str(TINY_FOLDER.resolve())
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path is {model.path!r}: the folder has no config.json, expected a Hugging Face model folder")
        return str(folder.resolve())
    if folder.is_absolute() or model.path.startswith((".", "~")):
        raise ConfigError(f"model.path is {model.path!r}: there is no such folder")
    read_config(model, model.path)
    return model.path


def read_config(model: ModelConfig, path: str):
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path is {model.path!r}: neither a local folder nor a model that could be loaded: {first_line(error)}") from None


def load_tokenizer(model: ModelConfig):
    """The tokenizer of `model.tokenizer`, or the model's own. Raises ConfigError if it is not found, has no EOS or pad, or does not fit the model."""
    from transformers import AutoTokenizer
    path = resolve_model(model)
    source = model.tokenizer or path
    key = "model.tokenizer" if model.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} is {source!r}: no tokenizer could be loaded from there: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {key} {source!r} has no EOS token: responses could never end; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer of {key} {source!r} has no pad token, which batched generation needs; "
                          f"set pad_token in its tokenizer_config.json, e.g. to a reserved token or to {tokenizer.eos_token!r}")
    size = getattr(read_config(model, path).get_text_config(), "vocab_size", None)
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
        self.head = Head(model.get_output_embeddings())
        self.critic: ValueHead | None = None
        # With flash attention transformers keeps packed sequences apart in a batch of one only; rows start at position 0, so bins can stand in one line.
        self.one_line = "flash" in model.config._attn_implementation
        self.shares_prompts = False     # see `can_share`

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


class Head(nn.Module):
    """The chunked head as a module with the output embedding's own parameters (not copies): ZeRO-3 gathers parameters per module call."""

    def __init__(self, output: nn.Module):
        super().__init__()
        if type(output) is not nn.Linear:
            raise ConfigError(f"the model's output embedding is {type(output).__name__}, expected torch.nn.Linear; this model is not supported")
        self.weight, self.bias = output.weight, output.bias

    def forward(self, hidden, target, temperature: float, chunk: int, entropy: bool):
        """See token_logprobs; without a target the most likely tokens, int64 [n]."""
        if target is None:
            return torch.cat([nn.functional.linear(part, self.weight, self.bias).argmax(-1) for part in hidden.split(chunk)])
        return token_logprobs(hidden, self.weight, self.bias, target, temperature, chunk, entropy)


class ValueHead(nn.Module):
    """V = w . hidden + b in float32, on the policy's own trunk. Zero at the start, so that the first advantages are sums of rewards.

    With `embedding` dimensions V = w . relu(u) + b with u = W hidden (CARFT); W is the same on all ranks.
    """

    def __init__(self, output: torch.Tensor, embedding: int = 0):
        super().__init__()
        size = output.shape[1]
        draw = torch.randn(embedding, size, generator=torch.Generator().manual_seed(0)) / size ** 0.5
        self.embedding = nn.Parameter(draw.to(output)) if embedding else None
        self.weight, self.bias = nn.Parameter(output.new_zeros(embedding or size)), nn.Parameter(output.new_zeros(1))

    def forward(self, hidden, embed: bool = False):
        """value [n], and with `embed` u [n, embedding]; float32."""
        u = hidden.float() if self.embedding is None else hidden.float() @ self.embedding.float().T
        value = (u if self.embedding is None else u.relu()) @ self.weight.float() + self.bias.float()
        return (value, u) if embed else value


def load_policy(model: ModelConfig) -> Policy:
    """Load the model of the config on the CPU and check that packing and the chunked head reproduce its own log-probs. Raises ConfigError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    path = resolve_model(model)
    try:
        causal, loading = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, model.dtype), attn_implementation=model.attention,
                                                               trust_remote_code=model.trust_remote_code, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {model.path!r} could not be loaded with attention={model.attention!r}, dtype={model.dtype!r}: "
                          f"{first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(f"model {model.path!r}: its weight files lack {len(missing)} parameters, among them {', '.join(missing[:3])}; "
                          "they would stay random: export or download it again")
    refuse_unknown_head(causal, model)
    if model.attention == "sdpa" and model.dtype == "bfloat16":
        use_fast_attention(causal)
    policy = Policy(causal)
    self_check(policy, model)
    policy.shares_prompts = can_share(policy)
    return policy


def refuse_unknown_head(causal: nn.Module, model: ModelConfig) -> None:
    """Logits must be a plain linear map of the last hidden state; `self_check` catches what has no known name."""
    config = causal.config.get_text_config()
    for name, plain in (("final_logit_softcapping", 0), ("logit_scale", 1), ("logits_scaling", 1), ("lm_head_multiplier", 1)):
        if (value := getattr(config, name, None)) not in (None, plain):
            raise ConfigError(f"model {model.path!r} has {name}={value} in its config.json: its logits are not a linear map of the hidden states, "
                              "which the chunked head assumes; this model is not supported")
    if "position_ids" not in inspect.signature(causal.get_decoder().forward).parameters:
        raise ConfigError(f"model {model.path!r} ({type(causal).__name__}) takes no position_ids, so that packed sequences cannot be told apart; "
                          "this model is not supported")


@torch.no_grad()
def self_check(policy: Policy, model: ModelConfig) -> None:
    """Compare packed log-probs with a plain forward of each sequence, and a sequence behind one neighbour with itself behind another.

    Raises ConfigError if they differ by more than rounding; the second difference is exactly 0 on the CPU. Flash attention needs a GPU: on the CPU its
    model is checked with SDPA.
    """
    causal, device, tolerance = policy.model, policy.head.weight.device, TOLERANCE[model.dtype]
    a, other, b = torch.randint(len(policy.head.weight), (3, 8), generator=torch.Generator().manual_seed(0)).to(device)
    b = b[:6]
    swapped = policy.one_line and device.type == "cpu"
    if swapped:
        causal.set_attn_implementation("sdpa")
    alone = lambda s: causal(input_ids=s[None], use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(-1, s[1:, None]).squeeze(-1)
    own = torch.cat([alone(a), alone(b)])
    bins = torch.stack([torch.cat([a, b]), torch.cat([other, b])])
    positions = torch.cat([torch.arange(len(a)), torch.arange(len(b))]).to(device).expand(2, -1)
    index = positions.reshape(-1).nonzero().squeeze(-1) - 1     # every token but the first of each sequence is predicted
    packed = policy(bins, positions, index, bins.reshape(-1)[index + 1])[0].reshape(2, -1)
    if swapped:
        causal.set_attn_implementation(model.attention)
    gap, leak = (packed[0] - own).abs().mean().item(), (packed[0] - packed[1])[len(a) - 1:].abs().max().item()
    if not (gap <= tolerance and leak <= tolerance / 10):
        raise ConfigError(f"model {model.path!r} ({type(causal).__name__}, attention {model.attention!r}, {model.dtype}): packed log-probs differ from the "
                          f"model's own by {gap:.1e} on average (expected at most {tolerance:.0e}), and by {leak:.1e} between two neighbours in the pack "
                          f"({tolerance / 10:.0e}): it mixes packed sequences, or its logits are not a linear map of the hidden states; "
                          "try model.attention=sdpa, else this model is not supported")


def tree_mask(tree: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L]: a token sees the tokens before it, and itself, of its own block and of its prompt's."""
    block, prompt = tree[0], tree[1]
    related = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == prompt[:, :, None])
    return related.tril()[:, None]


@torch.no_grad()
def can_share(policy: Policy) -> bool:
    """Whether rows may stand behind one copy of their prompt: SDPA with full attention in every layer, and the right log-probs on real numbers.

    Layers with a window would lose it to the mask; flash attention takes no mask; eager attention takes another kind; a recurrent layer would see the rows before.
    """
    config = policy.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "layer_types", None) is None
    if windowed or kinds != {"full_attention"} or policy.model.config._attn_implementation not in ("sdpa", NAME):
        return False
    device, dtype = policy.head.weight.device, str(policy.head.weight.dtype).removeprefix("torch.")
    prompt, a, b = torch.randint(len(policy.head.weight), (3, 4), generator=torch.Generator().manual_seed(1)).to(device)
    order, four = torch.arange(8, device=device), torch.ones(4, dtype=torch.long, device=device)
    alone = policy(torch.stack([torch.cat([prompt, a]), torch.cat([prompt, b])]), order.expand(2, -1), torch.cat([order[3:7], order[3:7] + 8]), torch.cat([a, b]))[0]
    index = torch.cat([order[3:7], order[3:4], order[5:8] + 3])     # b's first token is predicted from the end of the prompt
    tree = torch.stack([torch.cat([0 * four, 1 * four, 2 * four]), 0 * torch.cat([four] * 3)])[:, None]
    shared = policy(torch.cat([prompt, a, b])[None], torch.cat([order, order[4:]])[None], index, torch.cat([a, b]), tree=tree)[0]
    return (shared - alone).abs().mean().item() <= TOLERANCE[dtype]


def hf_parameters(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the Hugging Face checkpoint, parameter), tied weights once."""
    return policy.model.named_parameters()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
