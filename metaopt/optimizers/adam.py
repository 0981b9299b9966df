r"""Adam (Kingma and Ba, 2015, algorithm 1), and the features that the meta gradient generator takes over from it:
bias-corrected moments of the gradient, normalised coordinate by coordinate.

.. math::
    m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \\
    x_t = \Big(\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon},\; \frac{g_t}{\sqrt{\hat v_t} + \epsilon}\Big)

with :math:`\hat m_t = m_t / (1-\beta_1^t)` and :math:`\hat v_t = v_t / (1-\beta_2^t)`. The first feature is Adam's
direction. Source: MGG (arXiv 2412.16901), section 3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.errors import ConfigError, check_positive
from metaopt.parameters import flatten, unflatten
from metaopt.types import Parameters


class Moments(NamedTuple):
    """Running first and second moments of the gradient."""

    momentum: Tensor  # m, (N,)
    second_moment: Tensor  # v, (N,)
    step: Tensor  # t, scalar int64: updates so far


def init_moments(like: Tensor) -> Moments:
    """Zero moments for ``like`` of shape (N,)."""
    step = torch.zeros((), dtype=torch.int64, device=like.device)
    return Moments(torch.zeros_like(like), torch.zeros_like(like), step)


def safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose derivative is zero, not infinite, where the value is zero (a dead channel)."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def gradient_features(
    gradient: Tensor, moments: Moments, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Moments]:
    """Update the moments and normalise.

    Args:
        gradient: g, shape (N,).
        moments: moments before this gradient.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.

    Returns:
        Normalised momentum (N,), normalised gradient (N,), and the new moments.
    """
    step = moments.step + 1
    momentum = torch.lerp(gradient, moments.momentum, betas[0])
    second_moment = torch.lerp(gradient * gradient, moments.second_moment, betas[1])
    count = step.to(gradient.dtype)
    scale = 1.0 / (safe_sqrt(second_moment / (1.0 - betas[1] ** count)) + eps)
    return momentum * (scale / (1.0 - betas[0] ** count)), gradient * scale, Moments(momentum, second_moment, step)


@dataclass(frozen=True)
class Adam:
    """Learning rate times the normalised momentum."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the rate and the decays."""
        check_positive("method.lr of adam", self.lr)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"method.rule.betas is {[*self.betas]}; it takes two numbers in [0, 1): use for example [0.9, 0.999]"
            )

    def init(self, parameters: Parameters) -> Moments:
        """Zero moments."""
        return init_moments(flatten(parameters).detach())

    def update(self, gradients: Parameters, state: Moments) -> tuple[Parameters, Moments]:
        """Learning rate times the normalised momentum."""
        momentum, _, state = gradient_features(flatten(gradients), state, self.betas, self.eps)
        return unflatten(self.lr * momentum, gradients), state
