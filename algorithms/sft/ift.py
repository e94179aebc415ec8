"""IFT, intuitive fine-tuning: SFT on contexts that are partly the model's own guesses, each token
paying for the errors that follow it. Experimental.

    xhat    greedy next tokens of a first pass over the demonstration, without gradient
    inputs  (1 - lam) E(y*_t) + lam E(xhat_t) for response tokens, prompt tokens as they are;    ell_t = -log p(y*_t | mixed inputs)
    code    w_t = sum_{i>=t} gamma^(i-t) ell_i, scaled so that sum_t w_t = T;   L = mean_seq mean_t
            w_t ell_t        the gradient also goes through w
    paper   L = mean_seq sum_n sum_{i>=n} ell_i = mean_seq sum_i i ell_i

Source: arXiv 2405.11870 and the authors' code, which differ as shown (`as: paper | code`). Defaults
of both: lam 0.2; gamma 0.95 (code); RMSprop at 5e-7 there. gamma 0 means w = 1 in the code, not w_t
= ell_t; with lam 0 too it is plain SFT, averaged per sequence. E is the present embedding table
without gradient, as in the code; with lam 0 there is one ordinary forward. No rollouts, no rewards.
Not from the code: options for other propagations, warm-up and noise of lam. Uses the custom-forward
hook (see `Method.forward`), since its log-probs are not those of the tokens' own context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.parts.policy import variant
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.rows import expert_row


@dataclass(frozen=True)
class MixedForward:
    """Two passes: greedy guesses, then log-probs with the guesses mixed into the inputs.

    `extra`: log-probs of the first pass, and where the guess was right.
    """

    lam: float

    def __call__(self, policy, tokens, positions, index, target, temperature, chunk, entropy, tags):
        with torch.no_grad():
            hidden = policy.trunk(tokens, positions)[index]
            gold, _ = policy.head(hidden, target, temperature, chunk, False)
            greedy = policy.head(hidden, None, temperature, chunk, False)
            # a row's last guess is context of nothing
            last = torch.cat(
                [tags["segment"][1:] != tags["segment"][:-1], index.new_ones(1, dtype=torch.bool)]
            )
            place = torch.where(last, tokens.numel(), index + 1)
            guesses = (
                torch.cat([tokens.reshape(-1), tokens.new_zeros(1)])
                .index_copy(0, place, greedy)[:-1]
                .reshape(tokens.shape)
            )
            table = policy.model.get_input_embeddings()
            mixed = (1.0 - self.lam) * table(tokens) + self.lam * table(guesses)
        # the table's gradient is zero, not absent
        hidden = policy.trunk(tokens, positions, mixed + 0.0 * table(tokens))[index]
        value = None if policy.critic is None else policy.critic(hidden)
        return (
            *policy.head(hidden, target, temperature, chunk, entropy),
            value,
            {"gold_logp": gold, "guessed": (greedy == target).float()},
        )


@dataclass(frozen=True)
class PropagatedNLL:
    """w_t ell_t; the rows' tokens stand together. gamma None: the paper's double sum."""

    gamma: float | None = 0.95
    detach: bool = False

    def __call__(self, tokens: Tokens):
        ell, metrics = -tokens.logp, {name: value for name, value in tokens.extra.items()}
        if self.gamma == 0.0:
            return ell, metrics
        out, start = [], 0
        for n in torch.unique_consecutive(tokens.segment, return_counts=True)[1].tolist():
            row, place = ell[start : start + n], torch.arange(n, device=ell.device)
            start += n
            if self.gamma is None:
                out.append((place + 1.0) * row)
                continue
            ahead = place[None, :] - place[:, None]
            weight = torch.where(ahead >= 0, self.gamma ** ahead.clamp(min=0).float(), 0.0) @ row
            weight = weight * n / weight.sum().clamp(min=1e-12)
            out.append((weight.detach() if self.detach else weight) * row)
        return torch.cat(out), metrics


@dataclass
class IFT(Method):
    title: ClassVar[str] = (
        "SFT on partly self-made contexts, tokens pay for later errors (experimental)"
    )
    paper: ClassVar[str] = "2405.11870"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    as_: str = "code"  # paper | code
    lam: float = 0.2
    gamma: float = 0.95  # as: code
    detach: bool = False  # stop the gradient through w; changes results

    def __post_init__(self):
        variant(self.as_, None, None)
        for name in ("lam", "gamma"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be in [0, 1]")

    @property
    def forward(self):
        return MixedForward(self.lam) if self.lam else None

    def rows(self, batch: Batch):
        return [expert_row(t, "ift") for t in batch.experts]

    def terms(self, batch: Batch):
        gamma, reduction = variant(
            self.as_, (None, "seq_mean_token_sum"), (self.gamma, "seq_mean_token_mean")
        )
        return [Term("ift", PropagatedNLL(gamma, self.detach), Reduction(reduction))]
