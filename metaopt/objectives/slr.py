"""Soft likelihood ratio of each prediction (ROID: Marsden, Döbler and Yang, WACV 2024).

SLR(p) = −Σ_c p_c (log p_c − log(1 − p_c)), p = softmax(logits).

Its gradient does not vanish on confident predictions as the entropy's does, but the ratio itself is unbounded there:
in float32 it is infinite, with NaN gradients, from a logit gap of about 17 on. So each logarithm's argument is clamped.
"""

import torch
from torch import Tensor

from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput

CLAMP = 1e-5


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """Soft likelihood ratio of ``logits`` (B, C), one value per sample (B,), between −log(1/CLAMP − 1) and log(C − 1).

    Both logarithms see arguments within [CLAMP, 1 − CLAMP]; where one is clamped, its derivative is zero.
    """
    p = torch.softmax(logits, dim=-1)  # (B, C)
    # 1 − p is clamped itself rather than taken from the clamped p: 1 − CLAMP rounds to 1 in half precision.
    log_odds = p.clamp(CLAMP, 1 - CLAMP).log() - (1 - p).clamp(CLAMP, 1 - CLAMP).log()
    return -(p * log_odds).sum(dim=-1)


class SoftLikelihoodRatio(Term):
    """Soft likelihood ratio of each prediction, whose gradient does not vanish on sure ones (ROID)."""

    def forward(self, output: ForwardOutput) -> Tensor:
        """(B,)."""
        return soft_likelihood_ratio(output.logits)
