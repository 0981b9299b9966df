r"""Class balance: predictions corrected by what a batch as a whole is predicted to hold.

A shifted model favours a few classes. Of a stream whose classes are about as frequent as each other the batch itself
tells which: with probabilities :math:`p_i = \mathrm{softmax}(z_i)` of its n images over C classes,

.. math:: \bar p = \frac{\sum_i p_i + N/C}{n + N}, \qquad z'_i = z_i - \tau \log \bar p .

It is the correction of predictions for another class prior (Saerens et al., Neural Computation 2002), here towards an
even one, which counts as N images, so that a small batch is hardly corrected. Only predictions change: the objective
sees z. As diversity does, it takes the stream's classes for balanced.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext

COUNT = 20.0
"""N: on labelled training images under other shifts, 5 to 50 do equally well in batches of 10, 50 and 200."""


@dataclass(frozen=True)
class ClassBalanceConfig:
    """``strength``: tau; 1 is the correction in full."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the strength."""
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise ConfigError(
                f"class_balance.strength is {self.strength}; allowed is a positive number, or no class_balance: set 1"
            )


class ClassBalance(Part):
    """Predictions corrected by what a batch as a whole is predicted to hold; nothing to learn."""

    Config = ClassBalanceConfig
    name = "class_balance"
    own_judge = "drop"

    def not_exported(self, state: Any) -> str:
        """The correction is one of each batch."""
        return "class_balance, which corrects by what each batch as a whole is predicted to hold"

    def answer(self, context: StepContext, logits: Tensor) -> Tensor:
        """z' of a batch's logits z, (B, C); z of one whose classes are known not to be even (`class_skew`)."""
        known = any(bool(context.signals.get(name, False)) for name in ("skewed", "uneven"))
        return logits if known else self.corrected(logits)

    def corrected(self, logits: Tensor) -> Tensor:
        """The same without a step."""
        return logits - self.config.strength * class_shares(logits.softmax(dim=1)).log()


def class_shares(probabilities: Tensor) -> Tensor:
    """p̄ of a batch, (C,), the even prior included; an image with NaN counts for nothing.

    Args:
        probabilities: (B, C).
    """
    images, classes = probabilities.shape
    return (probabilities.nansum(dim=0) + COUNT / classes) / (images + COUNT)
