"""Entropy of each prediction: the loss that Tent (Wang et al., ICLR 2021) descends.

H(p) = −Σ_c p_c log p_c, p = softmax(logits).
"""

from torch import Tensor
from torch.nn.functional import log_softmax

from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of ``logits`` (B, C) in nats, one value per sample (B,)."""
    log_p = log_softmax(logits, dim=-1)  # (B, C)
    return -(log_p.exp() * log_p).sum(dim=-1)


class Entropy(Term):
    """Entropy of each prediction (Tent)."""

    def forward(self, output: ForwardOutput) -> Tensor:
        """(B,), nats."""
        return softmax_entropy(output.logits)
