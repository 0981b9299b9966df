"""Entropy of each prediction: the loss that Tent (Wang et al., ICLR 2021) descends.

H(p) = −Σ_c p_c log p_c, p = softmax(logits).
"""

from torch import Tensor
from torch.nn.functional import log_softmax


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of ``logits`` (B, C) in nats, one value per sample (B,)."""
    log_p = log_softmax(logits, dim=-1)  # (B, C)
    return -(log_p.exp() * log_p).sum(dim=-1)
