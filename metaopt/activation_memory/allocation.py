"""Allocations: pure ``init`` / ``precisions`` / ``observe``, from the layers' gradients to what is kept of each.

One without learned tensors is two functions: where the layers' importance comes from, and what it becomes within the
budget.

=============== ======================================================== ====================================
allocation      importance                                               onto the budget
=============== ======================================================== ====================================
published       SURGEON's, from an extra pass on 10 images of each batch float32 keep ratios, one common factor
single_pass     SURGEON's, from the running GI of the steps before       float32 keep ratios, one common factor
rate_distortion SURGEON's, from the running GI of the steps before       bits and keep ratios, least error
uniform         all alike                                                the best single precision
random          drawn once                                               bits and keep ratios, least error
=============== ======================================================== ====================================
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaopt.activation_memory.budget import allocate, best_uniform, scale_ratios
from metaopt.activation_memory.importance import layer_importance, learning_layers, match_layers
from metaopt.activation_memory.layer_table import LayerTable
from metaopt.activation_memory.precision import Precision
from metaopt.data.seeding import generator_for
from metaopt.errors import ConfigError
from metaopt.types import Parameters

DECAY = 0.9  # of the running GI


class AllocationState(NamedTuple):
    """What an allocation remembers of the steps before."""

    importance: Tensor  # running GI of each learning layer, (n,) float32; zeros before the first gradient
    steps: Tensor  # gradients seen, scalar int64


class Allocation:
    """Decides each layer's precision before a forward pass, and learns from the gradients after it."""

    extra_samples: int = 0  # images of every batch whose own backward gives the importance; 0: the real one gives it
    decay: float = DECAY  # of the running GI; 0: the latest replaces the one before

    def init(self, parameters: Parameters) -> AllocationState:
        """State before the first step: nothing seen yet."""
        device = next(iter(parameters.values())).device
        importance = torch.zeros(len(learning_layers(parameters)), dtype=torch.float32, device=device)
        return AllocationState(importance, torch.zeros((), dtype=torch.int64))

    def precisions(
        self, table: LayerTable, learning: Sequence[str], state: AllocationState, budget: int | None
    ) -> dict[str, Precision]:
        """Precision of each layer by its name.

        Args:
            table: the layers, at this batch's size.
            learning: names of the layers that ``state.importance`` speaks of.
            state: what earlier gradients told.
            budget: bytes for the whole step; None for no limit.

        Raises:
            ConfigError: the budget is below what the cheapest precisions need.
        """
        raise NotImplementedError

    def observe(self, importance: Tensor, state: AllocationState) -> AllocationState:
        """State after a backward pass whose GI was ``importance``, (n,).

        The plain mean of the first, until the exponential one is the slower of the two.
        """
        weight = max(1.0 - self.decay, 1.0 / (int(state.steps) + 1))
        return AllocationState(torch.lerp(state.importance, importance, weight), state.steps + 1)


Importance = Callable[[LayerTable, Sequence[str], AllocationState], NDArray[numpy.float64]]
"""I_l of each layer of the table, (L,), from the names of the layers that the state speaks of, and the state."""

Projection = Callable[[LayerTable, NDArray[numpy.float64], int | None], dict[str, Precision]]
"""The precision of each layer by its name, from I_l and a budget in bytes; None for no limit."""


@dataclass(frozen=True)
class ComposedAllocation(Allocation):
    """One without learned tensors. The first batch of a run has no gradient yet and treats all layers alike."""

    importance: Importance
    projection: Projection
    extra_samples: int = 0
    decay: float = DECAY

    def __post_init__(self) -> None:
        """Check the decay."""
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"the decay of the running importance is {self.decay}; allowed is [0, 1): set 0.9")

    def precisions(
        self, table: LayerTable, learning: Sequence[str], state: AllocationState, budget: int | None
    ) -> dict[str, Precision]:
        """The importance, projected onto the budget."""
        return self.projection(table, self.importance(table, learning, state), budget)


def published_importance(table: LayerTable, learning: Sequence[str], state: AllocationState) -> NDArray[numpy.float64]:
    """SURGEON's I_l, (L,) in [0, 1]; ones before the first gradient."""
    gradient = state.importance.cpu().double()[match_layers(table.names, learning)]
    return layer_importance(gradient, torch.from_numpy(table.dense_bytes).double()).numpy()


def equal_importance(table: LayerTable, learning: Sequence[str], state: AllocationState) -> NDArray[numpy.float64]:
    """Ones, (L,): what an importance has to beat."""
    return numpy.ones(len(table.layers))


def random_importance(table: LayerTable, learning: Sequence[str], state: AllocationState) -> NDArray[numpy.float64]:
    """Drawn once, log-uniform over three decades, (L,): what any importance has to beat as well."""
    drawn = torch.rand(len(table.layers), generator=generator_for("pruning", 0), dtype=torch.float64)
    return (-drawn * math.log(1000.0)).exp().numpy()


def least_distortion(table: LayerTable, importance: NDArray[numpy.float64], budget: int | None) -> dict[str, Precision]:
    """The rate-distortion allocation for I_l; without a budget the best precision for all."""
    return table.chosen(allocate(table, importance, budget))


def same_for_all(table: LayerTable, importance: NDArray[numpy.float64], budget: int | None) -> dict[str, Precision]:
    """The best precision that all layers can have, whatever their importance."""
    return best_uniform(table, budget)


ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "published": partial(ComposedAllocation, published_importance, scale_ratios, extra_samples=10, decay=0.0),
    "single_pass": partial(ComposedAllocation, published_importance, scale_ratios),
    "rate_distortion": partial(ComposedAllocation, published_importance, least_distortion),
    "uniform": partial(ComposedAllocation, equal_importance, same_for_all),
    "random": partial(ComposedAllocation, random_importance, least_distortion),
}
"""Allocations without learned tensors, by the name that ``method.pruning`` calls them."""


def build_allocation(name: str) -> Allocation:
    """The allocation of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ALLOCATIONS:
        raise ConfigError(f"method.pruning is {name!r}; allowed are {', '.join(ALLOCATIONS)}: choose one")
    return ALLOCATIONS[name]()
