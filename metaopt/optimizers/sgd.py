"""Gradient descent with heavy-ball momentum, as in torch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.errors import ConfigError, check_positive
from metaopt.parameters import flatten, unflatten
from metaopt.types import Parameters


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
        check_positive("method.lr of sgd", self.lr)
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"method.rule.momentum is {self.momentum}; it must lie in [0, 1): use for example 0.9")

    def init(self, parameters: Parameters) -> SGDState:
        """Zero velocity."""
        return SGDState(torch.zeros_like(flatten(parameters).detach()))

    def update(self, gradients: Parameters, state: SGDState) -> tuple[Parameters, SGDState]:
        """Learning rate times the new velocity."""
        velocity = self.momentum * state.velocity + flatten(gradients)
        return unflatten(self.lr * velocity, gradients), SGDState(velocity)
