"""Entropy of the predictions that are certain enough (EATA: Niu et al., ICML 2022; SURGEON: CVPR 2025).

F = mean over {i : H_i < E₀} of exp(E₀ − H_i) · H_i, E₀ = 0.4 log C

with the entropy H_i in nats. The weight is a constant to the gradient. EATA's second filter, for samples alike, is not
part of it.
"""

import math

from torch import Tensor

from metaopt.objectives.entropy import softmax_entropy
from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput

MARGIN = 0.4
"""E₀ as a share of the largest possible entropy, log C."""


def filtered_entropy(logits: Tensor) -> Tensor:
    """Weighted entropy of ``logits`` (B, C), one value per sample (B,): 0 for an uncertain one.

    The values are scaled so that their mean over the batch is the mean over the samples that pass; where none does, all
    are 0 (the released codes give NaN).
    """
    margin = MARGIN * math.log(logits.shape[1])
    entropy = softmax_entropy(logits)  # (B,)
    passes = (entropy.detach() < margin).to(entropy)
    weight = passes * (margin - entropy.detach()).exp()
    return weight * entropy * (len(entropy) / passes.sum().clamp(min=1.0))


class FilteredEntropy(Term):
    """Entropy of the predictions that are certain enough, weighted by how certain (EATA's first filter, SURGEON)."""

    def forward(self, output: ForwardOutput) -> Tensor:
        """(B,), nats."""
        return filtered_entropy(output.logits)
