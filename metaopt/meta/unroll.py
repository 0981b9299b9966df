r"""Unrolled adaptation: what every way of differentiating it shares.

An unroll runs K steps of ``policy.step`` on K + 1 batches. Position t (1 to K) is scored by the meta-loss L_t of the
parameters :math:`\theta_t`, which have adapted to the batches before t, on batch t. The meta-loss is the mean over
positions; its gradient in the learned tensors :math:`\varphi` is taken by :mod:`metaopt.meta.meta_gradient`.

Truncation cuts the graph every T steps: position t then only answers for the steps since the last cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError, check_one_of, check_range
from metaopt.meta.precision_gradient import BudgetTask
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.state import State
from metaopt.policy.step import StepContext
from metaopt.types import ApplyUpdate, Parameters, StepOutput

GRADIENTS = ("first_order", "full")


@dataclass(frozen=True)
class MetaBatch:
    """One batch of a task: what the policy sees, and what the meta-loss compares its predictions with."""

    images: Tensor  # shifted view, (B, 3, H, W) in [0, 1]
    targets: Tensor | None = None  # class probabilities, (B, C); None where the meta-loss needs none


class MetaLoss(Protocol):
    """Scores the predictions at one position of the unroll, without labels."""

    own_objective: bool
    """Whether the score is the policy's own inner loss, so that one backward pass serves both."""

    def __call__(self, output: StepOutput, batch: MetaBatch) -> Tensor:
        """Scalar score of one batch."""
        ...


@dataclass(frozen=True)
class UnrollConfig:
    """How the meta-gradient is taken."""

    gradient: str = "first_order"
    truncation: int | None = None  # steps between cuts of the graph; None: no cut
    term_steps: int | None = 1  # steps of an unroll at which learned objective weights see each term's own gradient
    noise_price: float = 5.0  # of the noise that learned rates bring into an update, relative to it

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_one_of("meta.gradient", self.gradient, GRADIENTS)
        for name, value in (("truncation", self.truncation), ("term_steps", self.term_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"meta.{name} is {value}; it must be null or at least 1: set for example 8")
        check_range("meta.noise_price", self.noise_price, 0, example="5")


@dataclass
class MetaGradient:
    """What one unroll gives."""

    losses: list[Tensor]  # meta-loss at positions 1..K, detached scalars
    gradients: dict[str, Tensor]  # mean meta-loss differentiated in each learned tensor of the policy
    parameters: Parameters  # adapted parameters after the last step, detached
    state: State  # state after the last step, detached
    opened: list[bool] = field(default_factory=list)  # per step: whether the update gate opened; empty without one

    @property
    def loss(self) -> Tensor:
        """Mean meta-loss over the positions, scalar."""
        return torch.stack(self.losses).mean()


def learned_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The policy's tensors that meta-training changes."""
    return {name: tensor for name, tensor in policy.named_parameters() if tensor.requires_grad}


def learned_groups(policy: AdaptationPolicy) -> dict[str, list[str]]:
    """Names of the policy's tensors that learn, by group: objective, generator, and what each part calls its own."""
    learned = learned_tensors(policy)
    groups: dict[str, list[str]] = {}
    for name in learned:
        if name.startswith("rule."):
            groups.setdefault("generator", []).append(name)
        elif name.startswith("objective."):
            groups.setdefault("objective", []).append(name)
    for part in policy.listed:
        for group, tensors in part.learned_groups().items():
            names = [name for name in (f"parts.{part.name}.{own}" for own in tensors) if name in learned]
            if names:
                groups[group] = names
    return groups


class Unroll:
    """One unroll in progress: sums the meta-gradient segment by segment."""

    def __init__(
        self,
        policy: AdaptationPolicy,
        model: nn.Module,
        batches: Sequence[MetaBatch],
        meta_loss: MetaLoss,
        apply: ApplyUpdate,
        config: UnrollConfig,
        budget: BudgetTask | None,
        generator: torch.Generator | None,
        lagrange_multiplier: float = 0.0,
        first_position: int = 0,
    ) -> None:
        self.policy, self.model, self.batches = policy, model, batches
        self.meta_loss, self.apply, self.config = meta_loss, apply, config
        self.learned = learned_tensors(policy)
        self.gradients = {name: torch.zeros_like(tensor) for name, tensor in self.learned.items()}
        acting = {id(tensor) for part in policy.listed for tensor in part.direct()}
        # Learned tensors that act in the forward pass itself, not through the rule.
        self.direct = {name: tensor for name, tensor in self.learned.items() if id(tensor) in acting}
        self.losses: list[Tensor] = []
        self.budget, self.generator = budget, generator
        self.lagrange_multiplier, self.opened = lagrange_multiplier, list[bool]()
        self.first_position = first_position  # batches of the stream before the first of these

    @property
    def steps(self) -> int:
        """K."""
        return len(self.batches) - 1

    def segments(self) -> list[tuple[int, int]]:
        """First and last position of each stretch between two cuts."""
        length = self.config.truncation or self.steps
        return [(start, min(start + length, self.steps)) for start in range(0, self.steps, length)]

    def context(self, parameters: Parameters, state: State, position: int) -> StepContext:
        """The batch at a position of this unroll on its way through the step."""
        images, met = self.batches[position].images, self.first_position + position
        return StepContext(self.policy, self.model, parameters, state, images, met)

    def begin(self, parameters: Parameters) -> Parameters:
        """Where a fresh unroll starts: learned first values with their graph, all other tensors as leaves."""
        started = self.policy.start(parameters)
        return {
            n: tensor if tensor.requires_grad else tensor.detach().requires_grad_() for n, tensor in started.items()
        }

    def accumulate(self, total: Tensor) -> None:
        """Add the gradient of one segment's share of the mean meta-loss."""
        tensors = list(self.learned.values())
        if not tensors or not total.requires_grad:
            return
        gradients = torch.autograd.grad(total / self.steps, tensors, allow_unused=True, materialize_grads=True)
        for name, gradient in zip(self.learned, gradients, strict=True):
            self.gradients[name] = self.gradients[name] + gradient
