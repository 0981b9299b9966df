"""Consistency of the predictions on an image and on an augmented view of it (SURGEON, arXiv 2503.20354, released code).

R = −(C / 100) Σ_c p_c log p′_c

with p the softmax on the image and p′ the one on the view, both of which learn. The factor is the released code's: a
term weight of 1 is the published method.
"""

from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from metaopt.errors import ConfigError
from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput

SHARE_PER_CLASS = 0.01


def view_consistency(logits: Tensor, view_logits: Tensor | None) -> Tensor:
    """Cross-entropy in nats between the predictions ``logits`` (B, C) and those on the view, times C / 100: (B,).

    Raises:
        ConfigError: there are no predictions on a view.
    """
    if view_logits is None:
        raise ConfigError(
            "the objective's term 'consistency' got no logits of an augmented view, needs (B, C); "
            "give them as ForwardOutput.view_logits, as the adaptation step does, or drop the term"
        )
    cross_entropy = -(softmax(logits, dim=-1) * log_softmax(view_logits, dim=-1)).sum(dim=-1)
    return SHARE_PER_CLASS * logits.shape[1] * cross_entropy


class Consistency(Term):
    """Consistency of the predictions on an image and on an augmented view of it (SURGEON)."""

    needs = frozenset({"view"})

    def forward(self, output: ForwardOutput) -> Tensor:
        """(B,), nats."""
        return view_consistency(output.logits, output.view_logits)
