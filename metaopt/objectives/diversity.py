"""Diversity of a batch's predictions: the batch half of information maximisation (SHOT: Liang et al., ICML 2020).

D = −H(p̄) = Σ_c p̄_c log p̄_c, p̄ = mean over the batch of softmax(logits).

The sign is that of a loss: descending D raises the entropy of the mean prediction, which keeps a batch from collapsing
into a few classes while each of its predictions grows more confident.
"""

import math

from torch import Tensor
from torch.nn.functional import log_softmax

from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput


def negative_mean_entropy(logits: Tensor) -> Tensor:
    """Negative entropy in nats of the mean prediction of ``logits`` (B, C), a scalar in [−log C, 0]."""
    # The mean is taken in log space: a class that no sample predicts would else be log 0, with NaN gradients.
    log_mean = log_softmax(logits, dim=-1).logsumexp(dim=0) - math.log(logits.shape[0])  # (C,)
    return (log_mean.exp() * log_mean).sum()


class Diversity(Term):
    """Negative entropy of the batch's mean prediction, which keeps it from collapsing into a few classes (SHOT)."""

    per_sample = False

    def forward(self, output: ForwardOutput) -> Tensor:
        """A scalar, nats."""
        return negative_mean_entropy(output.logits)
