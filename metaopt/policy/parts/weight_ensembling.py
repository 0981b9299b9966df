r"""Weight ensembling: after each update the parameters take a small step back to where they started.

.. math:: \theta \leftarrow \alpha\,\theta + (1 - \alpha)\,\theta_0

A model that adapts without end drifts; this keeps it near a start that generalises (ROID: Marsden, Döbler and Yang,
WACV 2024, section 3.1; :math:`\alpha` of its released code).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from metaopt.errors import check_range
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext


@dataclass(frozen=True)
class WeightEnsemblingConfig:
    """``momentum``: α, the share of the adapted parameters; 1 keeps them all."""

    momentum: float = 0.99

    def __post_init__(self) -> None:
        """Check the share."""
        check_range("weight_ensembling.momentum", self.momentum, 0, 1, example="0.99")


class WeightEnsembling(Part):
    """Parameters take a small step back to their start after each update (ROID)."""

    Config = WeightEnsemblingConfig
    name = "weight_ensembling"

    def settle(self, context: StepContext) -> None:
        """In place where the update was."""
        parameters, start = context.parameters, context.start
        in_place = all(tensor.is_leaf for tensor in parameters.values())
        with torch.no_grad() if in_place else nullcontext():
            moved = {name: torch.lerp(start[name], own, self.config.momentum) for name, own in parameters.items()}
            if not in_place:
                context.parameters = moved
                return
            for name, tensor in parameters.items():
                tensor.copy_(moved[name])
