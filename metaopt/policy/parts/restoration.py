r"""Restoration: how much of the source model comes back before a batch is predicted.

Adaptation that runs on through one shift after another drifts and collapses. So before each batch

.. math:: \theta \leftarrow \theta + \rho\,(\theta_S - \theta), \qquad
    \rho = \rho_0 + (\rho_1 - \rho_0)\, \mathrm{sigmoid}\big((\log D - \log \tau) / w\big)

with the parameters :math:`\theta_S` that it started with (the source's, or a learned initialization) and the batch's
distance D from those before it (:mod:`metaopt.policy.parts.shift_distance`). :math:`\rho_0` is a steady pull to the
source, like the weight ensembling of ROID (WACV 2024). At D above :math:`\tau` another domain has begun, and the share
:math:`\rho_1` of the source comes back: Niloy et al. (WACV 2024) restore all of it, but some of what one shift taught
serves the next. What the rules remember then starts anew. All four numbers are learned, on tasks that begin where
another task ended.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError, check_positive
from metaopt.policy.part import Part
from metaopt.policy.parts.shift_distance import ShiftDistance
from metaopt.policy.step import StepContext


@dataclass(frozen=True)
class RestorationConfig:
    """Values that meta-training starts from, and those of a method without a policy."""

    base: float = 0.003  # rho_0
    peak: float = 0.8  # rho_1
    threshold: float = 6.0  # tau, a distance
    width: float = 0.3  # w, in log distance

    def __post_init__(self) -> None:
        """Check every value against its range."""
        for name, value in (("base", self.base), ("peak", self.peak)):
            if not 0 < value < 1:
                raise ConfigError(f"restoration.{name} is {value}; allowed is 0 < {name} < 1: set for example 0.5")
        check_positive("restoration.threshold", self.threshold, "6")
        check_positive("restoration.width", self.width, "0.3")


class Restoration(Part):
    """A share of the start comes back where the stream shifts: a learned map from the shift distance to it."""

    Config = RestorationConfig
    name = "restoration"
    uses = (ShiftDistance,)
    events = ("restored",)

    def __init__(self, config: RestorationConfig | None = None) -> None:
        super().__init__(config)
        config = config or RestorationConfig()
        self.base_logit = nn.Parameter(torch.tensor(math.log(config.base / (1 - config.base))))
        self.peak_logit = nn.Parameter(torch.tensor(math.log(config.peak / (1 - config.peak))))
        self.log_threshold = nn.Parameter(torch.tensor(math.log(config.threshold)))
        self.log_width = nn.Parameter(torch.tensor(math.log(config.width)))

    def strength(self, distance: Tensor) -> Tensor:
        """rho in (0, 1), scalar, differentiable in the learned numbers.

        Args:
            distance: D, scalar.
        """
        base, peak = self.base_logit.sigmoid(), self.peak_logit.sigmoid()
        # An infinite distance would leave NaN derivatives behind.
        above = distance.clamp(1e-6, 1e6).log() - self.log_threshold
        return base + (peak - base) * (above * (-self.log_width).exp()).sigmoid()

    def begins_anew(self, distance: Tensor) -> bool:
        """Whether another domain has begun, so that what the rules remember is forgotten."""
        return float(distance.detach()) > float(self.log_threshold.detach().exp())

    def restore(self, context: StepContext) -> None:
        """theta + rho (theta_S - theta), differentiable in the parameters and in what is learned."""
        distance, start = context.signals["shift_distance"], context.start
        distance = distance / context.signals.get("design_effect", 1.0)
        strength = self.strength(distance)
        context.parameters = {
            name: torch.lerp(tensor, start[name], strength.to(tensor)) for name, tensor in context.parameters.items()
        }
        if self.begins_anew(distance):
            context.begin_anew("restored")
