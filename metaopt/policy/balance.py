r"""Class balance: predictions corrected by what a batch as a whole is predicted to hold.

A shifted model favours a few classes. Of a stream whose classes are about as frequent as each other the batch itself
tells which: with probabilities :math:`p_i = \mathrm{softmax}(z_i)` of its n images over C classes,

.. math:: \bar p = \frac{\sum_i p_i + N/C}{n + N}, \qquad z'_i = z_i - \tau \log \bar p .

It is the correction of predictions for another class prior (Saerens et al., Neural Computation 2002), here towards an
even one, which counts as N images, so that a small batch is hardly corrected. Only predictions change: the objective
sees z. As diversity does, it takes the stream's classes for balanced.
"""

import math

from torch import Tensor, nn

from metaopt.errors import ConfigError

COUNT = 20.0
"""N: on labelled training images under other shifts, 5 to 50 do equally well in batches of 10, 50 and 200."""


class ClassBalance(nn.Module):
    """The correction, with nothing to learn.

    Args:
        strength: tau; 1 is the correction in full.

    Raises:
        ConfigError: the strength is not positive and finite.
    """

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(strength) and strength > 0):
            raise ConfigError(f"balance is {strength}; allowed is a positive number, or null for none: set 1")
        self.strength = strength

    def forward(self, logits: Tensor) -> Tensor:
        """z' of a batch's logits z, (B, C)."""
        return logits - self.strength * class_shares(logits.softmax(dim=1)).log()


def class_shares(probabilities: Tensor) -> Tensor:
    """p̄ of a batch, (C,), the even prior included; an image with NaN counts for nothing.

    Args:
        probabilities: (B, C).
    """
    images, classes = probabilities.shape
    return (probabilities.nansum(dim=0) + COUNT / classes) / (images + COUNT)
