r"""Learned precision: a small head corrects the importance of each layer, meta-trained through a soft allocation.

With SURGEON's importance I_l from the running GI, features f_l of the layer and a head h,

    log J_l = log I_l + h(f_l)

is the importance that the rate-distortion allocation is done for. h starts at 0: as the allocation ``rate_distortion``.
Online the allocation is hard, for whatever budget is given; in meta-training it is soft at temperature T,

    p_lk = softmax_k(−(J_l · D_k + λ · b_lk) / T),    Σ_lk p_lk · b_lk = budget,

with the bytes b in shares of the dense total and J of mean 1. The multiplier λ comes from bisection, and its derivative
from one Newton step at the solution, which is the implicit function theorem's.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.activation_memory.allocation import DECAY, Allocation, AllocationState
from metaopt.activation_memory.budget import allocate
from metaopt.activation_memory.importance import layer_importance, match_layers
from metaopt.activation_memory.layer_table import LayerTable
from metaopt.activation_memory.precision import Precision
from metaopt.errors import ConfigError

KINDS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")  # any other has none of these bits
FEATURES = 5 + len(KINDS)
FLOOR = 1e-4  # of an importance, whose logarithm the head corrects
HALVINGS = 60  # of the search for the multiplier


@dataclass(frozen=True)
class LearnedPrecisionConfig:
    """What a learned head is built from."""

    hidden: int = 16
    decay: float = DECAY  # of the running GI
    temperature: float = 0.02  # T, in meta-training

    def __post_init__(self) -> None:
        """Check every value against its range."""
        if self.hidden < 1:
            raise ConfigError(f"rates.hidden is {self.hidden}; it must be at least 1: set for example 16")
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"rates.decay is {self.decay}; allowed is [0, 1): set for example 0.9")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"rates.temperature is {self.temperature}; it must be positive: set for example 0.02")

    def to_dict(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return asdict(self)


class LearnedPrecision(nn.Module, Allocation):
    """An allocation with learned tensors.

    Args:
        config: its sizes.
    """

    def __init__(self, config: LearnedPrecisionConfig | None = None) -> None:
        super().__init__()
        self.config = config or LearnedPrecisionConfig()
        self.decay = self.config.decay
        self.hidden = nn.Linear(FEATURES, self.config.hidden)
        self.output = nn.Linear(self.config.hidden, 1, bias=False)
        nn.init.zeros_(self.output.weight)

    @torch.no_grad()
    def precisions(
        self, table: LayerTable, learning: Sequence[str], state: AllocationState, budget: int | None
    ) -> dict[str, Precision]:
        """The rate-distortion allocation for the corrected importance; without a budget the best precision for all."""
        return table.chosen(_allocated(table, self.importance(table, learning, state, budget), budget))

    def importance(
        self, table: LayerTable, learning: Sequence[str], state: AllocationState, budget: int | None
    ) -> Tensor:
        """J_l of mean 1, (L,), differentiable in the head."""
        dense = torch.as_tensor(table.dense_bytes, dtype=torch.float64)
        gradient = state.importance.detach().cpu().double()[match_layers(table.names, learning)]  # (L,)
        published = layer_importance(gradient, dense).clamp_min(FLOOR)
        features, weight = layer_features(table, dense, gradient, budget), self.hidden.weight
        offset = self.output(torch.tanh(self.hidden(features.to(weight)))).squeeze(1)
        log_importance = published.log().to(weight) + offset
        return log_importance.softmax(dim=0) * len(log_importance)

    def soft_choices(self, table: LayerTable, learning: Sequence[str], state: AllocationState, budget: int) -> Tensor:
        """p, (L, R): how much of each precision of the menu a layer gets; differentiable in the head."""
        importance = self.importance(table, learning, state, budget)
        chosen = _allocated(table, importance, budget)
        held = table.costs[range(len(chosen)), chosen]
        beside = table.peak(held) - int(held.sum())  # the layers' bytes, at the hard allocation's fullest moment
        scale = 1.0 / float(table.dense_bytes.sum())
        cost = torch.as_tensor(table.costs * scale).to(importance)
        energy = importance.unsqueeze(1) * torch.as_tensor(table.distortions).to(importance)
        return soft_allocation(energy, cost, (budget - beside) * scale, self.config.temperature)


def _allocated(table: LayerTable, importance: Tensor, budget: int | None) -> list[int]:
    return allocate(table, importance.detach().cpu().double().numpy(), budget)


def bytes_over_budget(table: LayerTable, choices: Tensor, budget: int) -> int:
    """By how much the expected bytes of soft choices p, (L, R), make a step go over the budget; 0 if they do not."""
    expected = (choices.detach().cpu().double() * torch.as_tensor(table.costs)).sum(dim=1)
    return max(0, table.peak(expected.ceil().long().numpy()) - budget)


def layer_features(table: LayerTable, dense: Tensor, gradient: Tensor, budget: int | None) -> Tensor:
    """What the head sees of each layer, (L, FEATURES) in float64.

    Log share of bytes, depth, log GI relative to the mean and whether there is one, log of the budget as a share of the
    dense bytes, and the kind.
    """
    count = len(table.layers)
    seen = gradient.sum() > 0
    relative = torch.where(seen, (gradient / gradient.mean().clamp_min(1e-30)).clamp_min(FLOOR).log(), 0.0)
    share = 0.0 if budget is None else math.log(min(1.0, budget / float(dense.sum())))
    kinds = [[float(layer.kind == kind) for kind in KINDS] for layer in table.layers]
    columns = [
        (dense / dense.mean()).log(),
        torch.linspace(0.0, 1.0, count, dtype=torch.float64),
        relative,
        seen.double().expand(count),
        torch.full((count,), share, dtype=torch.float64),
    ]
    return torch.cat([torch.stack(columns, dim=1), torch.tensor(kinds, dtype=torch.float64)], dim=1)


def soft_allocation(energy: Tensor, cost: Tensor, budget: float, temperature: float) -> Tensor:
    """p_lk for the multiplier at which the expected cost is the budget.

    Args:
        energy: J_l · D_k, (L, R).
        cost: b_lk, (L, R).
        budget: in the same unit; clamped to what soft choices can cost.
        temperature: T.
    """

    def choices(multiplier: Tensor) -> Tensor:
        return (-(energy + multiplier * cost) / temperature).softmax(dim=1)

    with torch.no_grad():
        # Asymmetric in log space: no multiplier makes the cheapest certain, and a large negative one the dearest.
        low, high = energy.new_tensor(-1e4), energy.new_tensor(1e4)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            over = (choices(middle) * cost).sum() > budget
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        found = (low + high) / 2
        chosen = choices(found)
        mean = (chosen * cost).sum(dim=1, keepdim=True)
        slope = -(chosen * (cost - mean).square()).sum() / temperature
    expected = (choices(found) * cost).sum()
    newton = torch.where(slope.abs() > 1e-12, (expected - expected.detach()) / slope.clamp(max=-1e-12), 0.0)
    return choices(found - newton)
