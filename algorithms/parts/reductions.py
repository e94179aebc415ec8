"""Reductions: how the token losses of a term become one number. Named, never implied.

Each is `sum over tokens of weight * scale(row) * loss / Z`, with Z counted over the whole global
batch (all micro-batches, all ranks). `scale` depends on the row alone, so that any split of the
same rows gives the same gradient. n_i is the number of tokens that row i has in the term; only rows
with n_i > 0 count.

    token_mean               scale 1        Z = sum_i n_i            DAPO, CHORD
    seq_mean_token_mean      scale 1/n_i    Z = rows                 GRPO as published, GSPO
    seq_mean_token_sum       scale 1        Z = rows
    sum_over_constant(L)     scale 1        Z = rows * L             Dr.GRPO (arXiv 2503.20783)
    constant(L)              scale 1        Z = L                    the code of LUFFY, ReLIFT and
                             HPT: grows with the number of rows

A term whose unit is a row or a group (see Term.unit) counts these in the place of tokens, each
with one number, and has one of two:

    unit_mean                scale 1        Z = units                what such terms have by default
    constant(L)              scale 1        Z = L

The others speak of tokens, and such a term is refused with them: whether a row's log-probs are
summed or averaged is its objective's affair.

Formulas of methods and objectives write RED{ x_t } for x_t under the reduction that the term has,
and TOK_rows{ x_t } for its token mean over those rows: TOK_demo{} over demonstrations, TOK_hint{}
over hints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "sum_over_constant", "constant")
UNIT_NAMES = ("unit_mean", "constant")  # of terms with another unit than tokens


@dataclass(frozen=True)
class Reduction:
    """`name` is one of NAMES or UNIT_NAMES; `length` is L, for the two constant forms only."""

    name: str = "token_mean"
    length: int | None = None

    def __post_init__(self):
        if self.name not in (*NAMES, *UNIT_NAMES):
            known = ", ".join(dict.fromkeys((*NAMES, *UNIT_NAMES)))
            raise ValueError(f"unknown reduction {self.name!r}; known: {known}")
        if (self.length is not None) != self.name.endswith("constant"):
            raise ValueError(
                f"reduction {self.name!r} with length={self.length}: a length goes with "
                "sum_over_constant and constant, and only with them"
            )

    def row_scale(self, n: int) -> float:
        """Factor of a row that has n > 0 tokens in the term."""
        return 1.0 / n if self.name == "seq_mean_token_mean" else 1.0

    def denominator(self, counts: np.ndarray) -> float:
        """Z, from the token count of every row of the global batch (int [rows]); with units of
        rows or groups from a 1 for each.

        At least 1, so that an empty term is 0, not NaN.
        """
        rows = int((counts > 0).sum())
        z = {
            "token_mean": int(counts.sum()),
            "seq_mean_token_mean": rows,
            "seq_mean_token_sum": rows,
            "sum_over_constant": rows * (self.length or 0),
            "constant": self.length or 0,
            "unit_mean": rows,
        }[self.name]
        return float(max(z, 1))
