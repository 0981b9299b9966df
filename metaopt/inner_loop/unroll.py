r"""Unrolled adaptation: what every way of differentiating it shares.

An unroll runs K steps of ``policy.step`` on K + 1 batches. Position t (1 to K) is scored by the meta-loss L_t of the
parameters :math:`\theta_t`, which have adapted to the batches before t, on batch t. The meta-loss is the mean over
positions; its gradient in the learned tensors :math:`\varphi` is taken by :mod:`metaopt.inner_loop.meta_gradient`.

Truncation cuts the graph every T steps: position t then only answers for the steps since the last cut.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.experts.mixture import EXPERT_TENSORS
from metaopt.inner_loop.rates import RateTask
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.state import PolicyState
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
        if self.gradient not in GRADIENTS:
            raise ConfigError(f"meta.gradient is {self.gradient!r}; allowed are {', '.join(GRADIENTS)}: choose one")
        for name, value in (("truncation", self.truncation), ("term_steps", self.term_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"meta.{name} is {value}; it must be null or at least 1: set for example 8")
        if not (math.isfinite(self.noise_price) and self.noise_price >= 0):
            raise ConfigError(
                f"meta.noise_price is {self.noise_price}; it must be finite and 0 or more: set for example 5"
            )


@dataclass
class MetaGradient:
    """What one unroll gives."""

    losses: list[Tensor]  # meta-loss at positions 1..K, detached scalars
    gradients: dict[str, Tensor]  # mean meta-loss differentiated in each learned tensor of the policy
    parameters: Parameters  # adapted parameters after the last step, detached
    state: PolicyState  # state after the last step, detached
    opened: list[bool] = field(default_factory=list)  # per step: whether the update gate opened; empty without one

    @property
    def loss(self) -> Tensor:
        """Mean meta-loss over the positions, scalar."""
        return torch.stack(self.losses).mean()


def learned_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """The policy's tensors that meta-training changes."""
    return {name: tensor for name, tensor in policy.named_parameters() if tensor.requires_grad}


PARTS = {  # of a policy, by how the names of their learned tensors start and end
    "generator": ("rule.", ""),
    "objective": ("objective.", ""),
    "rates": ("pruning.", ""),
    "restoration": ("restoration.", ""),
    "gate": ("gate.", ""),
    "prior": ("prior.", ""),
    "initialization": ("initialization.", ""),
    "gates": ("learned_experts.", (".router.weight", ".router.bias")),
    "experts": ("learned_experts.", EXPERT_TENSORS),
}


def part_of(name: str) -> str | None:
    """The part that a policy's tensor of this name belongs to."""
    return next((part for part, (start, end) in PARTS.items() if name.startswith(start) and name.endswith(end)), None)


def squares_by_part(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum of squares of the meta-gradient in each part of the policy that learns, scalars."""
    squares = {part: [g.square().sum() for name, g in gradients.items() if part_of(name) == part] for part in PARTS}
    return {part: torch.stack(found).sum() for part, found in squares.items() if found}


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
        rates: RateTask | None,
        generator: torch.Generator | None,
        update_price: float = 0.0,
    ) -> None:
        self.policy, self.model, self.batches = policy, model, batches
        self.meta_loss, self.apply, self.config = meta_loss, apply, config
        self.learned = learned_tensors(policy)
        self.gradients = {name: torch.zeros_like(tensor) for name, tensor in self.learned.items()}
        experts = policy.learned_experts
        gates = set() if experts is None else {id(tensor) for tensor in experts.gates().values()}
        # Learned tensors that act in the forward pass itself, not through the rule.
        self.direct = {n: tensor for n, tensor in self.learned.items() if id(tensor) in gates or n.startswith("prior.")}
        self.losses: list[Tensor] = []
        self.rates, self.generator = rates, generator
        self.update_price, self.opened = update_price, list[bool]()

    @property
    def steps(self) -> int:
        """K."""
        return len(self.batches) - 1

    def segments(self) -> list[tuple[int, int]]:
        """First and last position of each stretch between two cuts."""
        length = self.config.truncation or self.steps
        return [(start, min(start + length, self.steps)) for start in range(0, self.steps, length)]

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
