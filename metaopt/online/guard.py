"""Guards of online adaptation: what must not happen to a deployed model, and what is done instead."""

from collections import Counter

import torch
from torch import Tensor

from metaopt.parameters import flatten
from metaopt.types import Parameters

NONFINITE = "nonfinite"
SKIPPED = "skipped"  # no refusal: the update gate stayed closed
RESTORED = "restored"  # no refusal: the stream shifted and the source came back


class FiniteGuard:
    """Refuses an update whose loss or squared gradient norm is NaN or infinite: parameters and state stay as they were.

    The square counts because it enters the second moments, where an infinity would stay for good.

    ``events`` counts the refusals by name, here ``nonfinite``.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter({NONFINITE: 0})

    def __call__(self, loss: Tensor, gradients: Parameters) -> bool:
        """Whether to apply the update."""
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(flatten(gradients).square().sum()))
        if not finite:
            self.events[NONFINITE] += 1
        return finite
