r"""The update gate: whether a batch is worth a backward pass, decided before the model runs on it.

From signals that cost no backward pass,

.. math:: x = (\log D,\; \log(1 + a),\; \log(1 + r),\; H / \log C),

the distance D of the batch from those before it (:mod:`metaopt.policy.shift`), the batches a since the domain began
(at most 8), the batches r since the last update and the mean entropy H of the last predictions over C classes, the gate
opens where :math:`z = w \cdot x + b > 0`. In a domain that goes on and on, a rest opens it again. Meta-training sees
its decision s through a straight-through estimator, :math:`\theta' = \theta + s\,(\theta_{new} - \theta)` with
:math:`\partial s := \partial\,\mathrm{sigmoid}(z)`, under a price on updates that is raised until their share is the
one asked for.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError

# Of (log D, log(1 + a), log(1 + r), H / log C): a shift and a rest call for an update, a domain that is known does not.
FIRST_WEIGHTS = (0.5, -1.0, 0.5, 0.0)
FIRST_BIAS = 1.0
OLDEST = 8.0  # batches: a domain that lasts longer than meta-training's default tasks counts as this old


class GateState(NamedTuple):
    """What the gate remembers, scalars."""

    age: Tensor  # batches since the domain began
    rest: Tensor  # batches since the last update
    entropy: Tensor  # of the last predictions, over its largest value; 0 before any


def init_gate(like: Tensor) -> GateState:
    """Before the first batch."""
    return GateState(like.new_zeros(()), like.new_zeros(()), like.new_zeros(()))


def stepped(state: GateState, logits: Tensor, updated: bool) -> GateState:
    """After a batch.

    Args:
        state: before it.
        logits: predictions on it, (B, C).
        updated: whether the model was updated on it.
    """
    entropy = torch.special.entr(logits.detach().softmax(dim=1)).sum(dim=1).mean() / math.log(logits.shape[1])
    rest = torch.zeros_like(state.rest) if updated else state.rest + 1
    return GateState(state.age + 1, rest, entropy.to(state.entropy))


class LearnedGate(nn.Module):
    """Opens where a learned weighing of the signals says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(FIRST_WEIGHTS))
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS))

    def forward(self, state: GateState, distance: Tensor) -> Tensor:
        """z, scalar, differentiable in the learned numbers; the gate opens above 0.

        Args:
            state: what the gate remembers.
            distance: D, scalar.
        """
        distance, age = distance.clamp(1e-6, 1e6), state.age.clamp_max(OLDEST)
        signals = torch.stack([distance.log(), age.log1p(), state.rest.log1p(), state.entropy])
        return self.weights @ signals.to(self.weights) + self.bias


class PeriodicGate(nn.Module):
    """Opens at every ``every``-th batch: what a learned gate has to beat at the same share of updates.

    Raises:
        ConfigError: ``every`` is below 1.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"method.update_every is {every}; it must be at least 1: set 1 to update on every batch")
        self.every = every

    def forward(self, state: GateState, distance: Tensor) -> Tensor:
        """1 at every ``every``-th batch of a domain, else -1; arguments as of :class:`LearnedGate`."""
        return torch.ones_like(distance) if int(state.age) % self.every == 0 else -torch.ones_like(distance)


Gate = LearnedGate | PeriodicGate


def straight_through(z: Tensor) -> Tensor:
    """The hard decision, 0 or 1, with the derivative of sigmoid(z)."""
    soft = z.sigmoid()
    return (z > 0).to(soft) + soft - soft.detach()
