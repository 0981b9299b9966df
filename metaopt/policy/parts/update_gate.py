r"""The update gate: whether a batch is worth a backward pass, decided before the model runs on it.

From signals that cost no backward pass,

.. math:: x = (\log D,\; \log(1 + a),\; \log(1 + r),\; H / \log C),

the distance D of the batch from those before it (:mod:`metaopt.policy.parts.shift_distance`), the batches a since the
domain began (at most 8), the batches r since the last update and the mean entropy H of the last predictions over C
classes, the gate opens where :math:`z = w \cdot x + b > 0`. In a domain that goes on and on, a rest opens it again.
Meta-training sees its decision s through a straight-through estimator,
:math:`\theta' = \theta + s\,(\theta_{new} - \theta)` with :math:`\partial s := \partial\,\mathrm{sigmoid}(z)`, under a
price on updates, a Lagrange multiplier that is raised until their share is the one asked for.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.policy.part import Part
from metaopt.policy.parts.shift_distance import ShiftDistance
from metaopt.policy.step import StepContext
from metaopt.types import Parameters, StepOutput

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


def next_state(state: GateState, logits: Tensor, updated: bool) -> GateState:
    """After a batch.

    Args:
        state: before it.
        logits: predictions on it, (B, C).
        updated: whether the model was updated on it.
    """
    entropy = torch.special.entr(logits.detach().softmax(dim=1)).sum(dim=1).mean() / math.log(logits.shape[1])
    rest = torch.zeros_like(state.rest) if updated else state.rest + 1
    return GateState(state.age + 1, rest, entropy.to(state.entropy))


@dataclass(frozen=True)
class UpdateGateConfig:
    """When the gate opens: as it learns to, or periodically, which a learned one has to beat at the same share."""

    share: float | None = None  # of the batches at most that meta-training lets it open at
    every: int | None = None  # it opens at every so-many-th batch of a domain and learns nothing; None: it learns

    def __post_init__(self) -> None:
        """Check every value against its range."""
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(
                f"update_gate.share is {self.share}; allowed are 0 < share < 1, or update_gate=false: set 0.28, say"
            )
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"update_gate.every is {self.every}; it must be at least 1: set 1 to update on every batch"
            )


class UpdateGate(Part):
    """Tells whether a batch is worth an update: a learned weighing of signals, or every so-many-th batch."""

    Config = UpdateGateConfig
    name = "update_gate"
    events = ("skipped",)

    def __init__(self, config: UpdateGateConfig | None = None) -> None:
        super().__init__(config)
        self.learned = self.learned_only = self.config.every is None  # pyright: ignore[reportAttributeAccessIssue]
        if self.learned:
            self.uses = (ShiftDistance,)  # pyright: ignore[reportAttributeAccessIssue]: of this one
            self.weights = nn.Parameter(torch.tensor(FIRST_WEIGHTS))
            self.bias = nn.Parameter(torch.tensor(FIRST_BIAS))

    def init(self, parameters: Parameters) -> GateState:
        """Before the first batch."""
        return init_gate(next(iter(parameters.values())).detach())

    def z(self, state: GateState, distance: Tensor) -> Tensor:
        """z, scalar, differentiable in the learned numbers; the gate opens above 0.

        Args:
            state: what the gate remembers.
            distance: D, scalar.
        """
        if self.config.every is not None:
            return torch.ones_like(distance) if int(state.age) % self.config.every == 0 else -torch.ones_like(distance)
        distance, age = distance.clamp(1e-6, 1e6), state.age.clamp_max(OLDEST)
        signals = torch.stack([distance.log(), age.log1p(), state.rest.log1p(), state.entropy])
        return self.weights @ signals.to(self.weights) + self.bias

    def decide(self, context: StepContext) -> Tensor:
        """z of the batch."""
        state, told = context.state[self.name], context.signals.get("shift_distance")
        return self.z(state, state.age.new_ones(()) if told is None else told)

    def judge(self, context: StepContext, output: StepOutput) -> None:
        """Remember what was decided."""
        context.remember(self.name, next_state(context.state[self.name], output.logits, output.updated))
        if not context.opened:
            context.events.append("skipped")


def straight_through(z: Tensor) -> Tensor:
    """The hard decision, 0 or 1, with the derivative of sigmoid(z)."""
    soft = z.sigmoid()
    return (z > 0).to(soft) + soft - soft.detach()
