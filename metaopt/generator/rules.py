"""Hand-made update rules, as pure ``init``/``update`` pairs: the rivals that a learned generator is measured against.

``adam`` is Kingma and Ba (2015), algorithm 1; ``sgd`` is gradient descent with heavy-ball momentum as in torch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.generator.features import Moments, gradient_features, init_moments
from metaopt.parameters import flatten, unflatten
from metaopt.types import Parameters


def _check_rate(rule: str, lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"method.lr of {rule} is {lr}; it must be positive and finite: use for example 1e-3")


@dataclass(frozen=True)
class Adam:
    """Adam at learning rate ``lr``."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the rate and the decays."""
        _check_rate("adam", self.lr)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"method.betas is {[*self.betas]}; it takes two numbers in [0, 1): use for example [0.9, 0.999]"
            )

    def init(self, parameters: Parameters) -> Moments:
        """Zero moments."""
        return init_moments(flatten(parameters).detach())

    def update(self, gradients: Parameters, state: Moments) -> tuple[Parameters, Moments]:
        """Learning rate times the normalised momentum."""
        momentum, _, state = gradient_features(flatten(gradients), state, self.betas, self.eps)
        return unflatten(self.lr * momentum, gradients), state


class SGDState(NamedTuple):
    """The velocity of heavy-ball momentum."""

    velocity: Tensor  # (N,)


@dataclass(frozen=True)
class SGD:
    """Gradient descent at learning rate ``lr``, velocity = momentum · velocity + gradient."""

    lr: float = 1e-3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the rate and the momentum."""
        _check_rate("sgd", self.lr)
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"method.momentum of sgd is {self.momentum}; it must lie in [0, 1): use for example 0.9")

    def init(self, parameters: Parameters) -> SGDState:
        """Zero velocity."""
        return SGDState(torch.zeros_like(flatten(parameters).detach()))

    def update(self, gradients: Parameters, state: SGDState) -> tuple[Parameters, SGDState]:
        """Learning rate times the new velocity."""
        velocity = self.momentum * state.velocity + flatten(gradients)
        return unflatten(self.lr * velocity, gradients), SGDState(velocity)
