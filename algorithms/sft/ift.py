"""IFT, intuitive fine-tuning: SFT on contexts that are partly the model's own guesses, each token
paying for the errors that follow it. Experimental.

    xhat    greedy next tokens of a first pass over the demonstration, without gradient
    inputs  (1 - lam) E(y*_t) + lam E(xhat_t) for response tokens, prompt tokens as they are
    ell_t   -log p(y*_t | mixed inputs)
    code    w_t = sum_{i>=t} gamma^(i-t) ell_i, scaled so that sum_t w_t = T
            L = mean_seq mean_t w_t ell_t,    the gradient also goes through w
    paper   L = mean_seq sum_n sum_{i>=n} ell_i = mean_seq sum_i i ell_i

Source: arXiv 2405.11870 and the authors' code, which differ as shown (`as: paper | code`). Defaults
of both: lam 0.2; gamma 0.95 (code); RMSprop at 5e-7 there. gamma 0 means w = 1 in the code, not w_t
= ell_t; with lam 0 too it is plain SFT, averaged per sequence. E is the present embedding table
without gradient, as in the code; with lam 0 there is one ordinary forward. No rollouts, no rewards.
Not from the code: options for other propagations, warm-up and noise of lam. Uses the custom-forward
hook (see `Method.forward`), since its log-probs are not those of the tokens' own context. No
`demos`: the weights w are made for ell_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.objectives.propagated import PropagatedNLL
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.variants import check_variant, variant_option
from tandem.algorithms.rows import expert_row
from tandem.engine.model.policy import Policy
from tandem.engine.model.view import View


@dataclass(frozen=True)
class MixedForward:
    """Two passes: greedy guesses, then log-probs with the guesses mixed into the inputs.

    Beside what Policy.forward returns: `gold_logp`, log-probs of the first pass, and `guessed`,
    where the guess was right.
    """

    lam: float

    def __call__(self, policy: Policy, view: View):
        tokens = view.tokens
        with torch.no_grad():
            hidden = policy.trunk(tokens, view.positions)[view.index]
            gold, _ = policy.head(hidden, view.target, view.temperature, view.chunk)
            greedy = policy.head(hidden, None, view.temperature, view.chunk)
            guesses = self.guesses(tokens, view.index, greedy, view.segment)
            table = policy.model.get_input_embeddings()
            mixed = (1.0 - self.lam) * table(tokens) + self.lam * table(guesses)
        # the table's gradient is zero, not absent
        mixed = mixed + 0.0 * table(tokens)
        hidden = policy.trunk(tokens, view.positions, mixed)[view.index]
        guessed = greedy == view.target
        return policy.read(hidden, view) | {"gold_logp": gold, "guessed": guessed.float()}

    def guesses(self, tokens, index, greedy, segment):
        """int64 [B, L]: the tokens, with each trained one replaced by its guess, int64 [n]."""
        # a row's last guess is context of nothing
        last = torch.ones_like(index, dtype=torch.bool)
        last[:-1] = segment[1:] != segment[:-1]
        spare = tokens.numel()  # one more place, for what is not kept
        place = torch.where(last, spare, index + 1)
        with_spare = torch.cat([tokens.reshape(-1), tokens.new_zeros(1)])
        with_spare.index_copy_(0, place, greedy)
        return with_spare[:-1].reshape(tokens.shape)


@dataclass
class IFT(Method):
    title: ClassVar[str] = (
        "SFT on partly self-made contexts, tokens pay for later errors (experimental)"
    )
    paper: ClassVar[str] = "2405.11870"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    variant: str = variant_option("code")  # paper | code
    lam: float = 0.2
    gamma: float = 0.95  # as: code
    detach: bool = False  # stop the gradient through w; changes results

    def __post_init__(self):
        check_variant(self.variant)
        for name in ("lam", "gamma"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}, must be in [0, 1]")

    @property
    def forward(self):
        if self.lam == 0.0:
            return None
        return MixedForward(self.lam)

    def rows(self, batch: Batch):
        return [expert_row(t, "ift") for t in batch.experts]

    def terms(self, batch: Batch):
        if self.variant == "paper":
            objective = PropagatedNLL(None)
            reduction = Reduction("seq_mean_token_sum")
        else:
            objective = PropagatedNLL(self.gamma, self.detach)
            reduction = Reduction("seq_mean_token_mean")
        return [Term("ift", objective, reduction)]
