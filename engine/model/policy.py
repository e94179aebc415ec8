"""The policy: a Hugging Face causal LM run on packed bins, with the chunked head in place of its
own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import first_line
from tandem.engine.model.export import Origin
from tandem.engine.model.heads import Head, ValueHead, logit_map
from tandem.engine.model.measured_head import HeadInputs, measure
from tandem.engine.model.quantities import Entropy, LogProbs, Quantity
from tandem.engine.model.view import View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tandem.engine.model.halves import Halves


class Policy(nn.Module):
    """`model` is the whole Hugging Face model, `head` the chunked head over the very same
    parameters, `critic` a value head or None.

    The critic is no part of `model`: engines are not sent it and an exported model does not have
    it. Dropout stays off, also in training: the policy that is trained must be the policy that
    sampled.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: PreTrainedModel = model.eval()
        self.head = Head(model.get_output_embeddings(), *logit_map(model.config.get_text_config()))
        self.critic: ValueHead | None = None
        # With flash attention transformers keeps packed sequences apart in a batch of one only;
        # rows start at position 0, so bins can stand in one line.
        self.one_line = "flash" in (model.config._attn_implementation or "")
        self.shares_prompts = False  # see `can_share`
        self.origin: Origin | None = None  # the checkpoint that an export reproduces
        # of engine/model/scope.py: {layer: its adapter}, and the half that trains
        self.adapters: dict[str, Any] = {}
        self.halves: Halves | None = None

    def forward(
        self,
        view: View,
        custom: Callable[[Policy, View], Mapping[str, Tensor]] | None = None,
    ) -> Mapping[str, Tensor]:
        """What is asked of the n trained tokens, by name, float32 [n]: `logp` of the target given
        the hidden state at its index, `entropy` and the quantities that the view asks for, and
        `value`, the critic's of that state, if there is a critic.

        `view.prompt_blocks` is for a policy that `shares_prompts`. `custom` is Method.forward,
        which then does all this itself.
        """
        if custom is not None:
            return custom(self, view)
        hidden = self.trunk(view.tokens, view.positions, prompt_blocks=view.prompt_blocks)
        return self.read(hidden[view.index], view)

    def read(self, hidden: Tensor, view: View) -> dict[str, Tensor]:
        """What `forward` returns, from hidden states [n, H] at the view's index."""
        if view.quantities:
            found = self.measure(hidden, view)
        else:
            logp, entropy = self.head(
                hidden, view.target, view.temperature, view.chunk, view.entropy
            )
            found = {"logp": logp}
            if entropy is not None:
                found["entropy"] = entropy
        if self.critic is not None:
            found["value"] = self.critic(hidden)
        return found

    def measure(self, hidden: Tensor, view: View) -> dict[str, Tensor]:
        """Log-probs, entropies and quantities in one pass over the vocabulary."""
        asked: dict[str, Quantity] = {"logp": LogProbs("target")}
        if view.entropy:
            asked["entropy"] = Entropy()
        asked.update(view.quantities)
        data = {**view.data, "target": view.target}
        in_one_pass = partial(
            measure, quantities=list(asked.values()), data=data, others=view.others
        )
        found = self.head(hidden, None, view.temperature, view.chunk, ask=in_one_pass)
        return dict(zip(asked, found, strict=True))

    @torch.no_grad()
    def beside(self, view: View) -> HeadInputs:
        """This policy at the tokens of the view, as a frozen model beside the one that trains."""
        hidden = self.trunk(view.tokens, view.positions, prompt_blocks=view.prompt_blocks)
        head = self.head
        return HeadInputs(
            hidden[view.index], head.weight, head.bias, view.temperature, head.scale, head.cap
        )

    def trunk(
        self,
        tokens: Tensor,
        positions: Tensor,
        embeddings: Tensor | None = None,
        prompt_blocks: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B * L, H] of the bins; with `embeddings` [B, L, H] in the place of those
        of the tokens, and `prompt_blocks` where rows share prompts.
        """
        if self.one_line:
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        if embeddings is None:
            inputs = {"input_ids": tokens}
        else:
            inputs = {"inputs_embeds": embeddings.reshape(*tokens.shape, -1)}
        if prompt_blocks is not None:
            # transformers takes a mask of four dimensions as it is
            inputs["attention_mask"] = block_mask(prompt_blocks)
        hidden = self.model.get_decoder()(**inputs, position_ids=positions, use_cache=False)[0]
        return hidden.reshape(-1, hidden.shape[-1])

    def add_critic(self, embedding: int = 0) -> None:
        self.critic = ValueHead(self.head.weight, embedding)

    def train(self, mode: bool = True):
        """Leaves the modules below alone, so that dropout stays off."""
        self.training = mode
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations of each layer again in backward.

        Raises ConfigError if the model cannot.
        """
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"learner.gradient_checkpointing is true, but {type(self.model).__name__} "
                "does not support it; set it to false"
            )
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                # this flag alone switches it on; the dropout modules below stay off
                module.training = True

    def use_liger(self) -> None:
        """Put Liger's kernels into the decoder.

        Raises ConfigError if Liger is not installed or does not know the model. Not run: it needs a
        GPU.
        """
        try:
            from liger_kernel.transformers.monkey_patch import (
                MODEL_TYPE_TO_APPLY_LIGER_FN,
                _apply_liger_kernel_to_instance,
            )
        except ImportError as error:
            raise ConfigError(
                f"learner.liger is true, but Liger cannot be imported ({first_line(error)}): "
                "pip install liger-kernel, or set learner.liger=false"
            ) from None
        if self.model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ConfigError(
                "learner.liger is true, but Liger has no kernels for "
                f"{self.model.config.model_type!r} models; set learner.liger=false"
            )
        _apply_liger_kernel_to_instance(
            self.model,
            cross_entropy=False,  # the head is ours
            fused_linear_cross_entropy=False,
        )

    def compile_layers(self, gpu: bool) -> None:
        """torch.compile of every decoder layer, once for all shapes.

        Raises ConfigError where there is nothing to compile it with.
        """
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not gpu and not compiler:
            raise ConfigError(
                "learner.compile is true, which on a CPU needs a C++ compiler, and there is "
                "neither g++ nor clang++ on this machine's PATH (nor is CXX set); install one or "
                "set learner.compile=false"
            )
        layers: Any = self.model.get_decoder().layers
        for layer in layers:
            layer.compile(dynamic=True)


def block_mask(prompt_blocks: Tensor) -> Tensor:
    """bool [B, 1, L, L]: a token sees the tokens before it, and itself, of its own block and of its
    prompt's.
    """
    block, prompt = prompt_blocks[0], prompt_blocks[1]
    seen = block[:, None, :]
    related = (seen == block[:, :, None]) | (seen == prompt[:, :, None])
    return related.tril()[:, None]


def hf_parameters(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the Hugging Face checkpoint, parameter) of a policy without adapters, tied weights
    once.
    """
    return policy.model.named_parameters()
