"""Pruning rules: pure ``init`` / ``rates`` / ``observe``, from the layers' gradients to what is kept of each.

=============== ======================================================== ====================================
rule            importance                                               onto the budget
=============== ======================================================== ====================================
published       SURGEON's, from an extra pass on 10 images of each batch float32 keep ratios, one common factor
single_pass     SURGEON's, from the running GI of the steps before       float32 keep ratios, one common factor
rate_distortion SURGEON's, from the running GI of the steps before       bits and keep ratios, least error
uniform         none                                                     the best single rate
random          drawn once                                               bits and keep ratios, least error
=============== ======================================================== ====================================
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.errors import ConfigError
from metaopt.sparsity.codec import Rate
from metaopt.sparsity.importance import layer_importance, learning_layers, match_layers
from metaopt.sparsity.ratios import LayerTable, allocate, scale_ratios, uniform_choice
from metaopt.types import Parameters


class PruningState(NamedTuple):
    """What a rule remembers of the steps before."""

    importance: Tensor  # running GI of each learning layer, (n,) float32; zeros before the first gradient
    steps: Tensor  # gradients seen, scalar int64


class PruningRule(Protocol):
    """Decides each layer's rate before a forward pass, and learns from the gradients after it."""

    @property
    def extra_samples(self) -> int:
        """Images of every batch whose own backward pass gives the importance; 0: the real backward pass gives it."""
        ...

    def init(self, parameters: Parameters) -> PruningState:
        """State before the first step."""
        ...

    def rates(
        self, table: LayerTable, learning: Sequence[str], state: PruningState, budget: int | None
    ) -> dict[str, Rate]:
        """Rate of each layer by its name.

        Args:
            table: the layers, at this batch's size.
            learning: names of the layers that ``state.importance`` speaks of.
            state: what earlier gradients told.
            budget: bytes for the whole step; None for no limit.

        Raises:
            ConfigError: the budget is below what the cheapest rates need.
        """
        ...

    def observe(self, importance: Tensor, state: PruningState) -> PruningState:
        """State after a backward pass whose GI was ``importance``, (n,)."""
        ...


def fresh_state(parameters: Parameters) -> PruningState:
    """Nothing seen yet."""
    first = next(iter(parameters.values()))
    count = len(learning_layers(parameters))
    return PruningState(
        torch.zeros(count, dtype=torch.float32, device=first.device), torch.zeros((), dtype=torch.int64)
    )


def published_importance(table: LayerTable, learning: Sequence[str], state: PruningState) -> numpy.ndarray:
    """I_l of each layer of the table, (L,); ones before the first gradient."""
    matched = match_layers(table.names, learning)
    gradient = state.importance.cpu().double()[matched]
    return layer_importance(gradient, torch.from_numpy(table.dense_bytes).double()).numpy()


@dataclass(frozen=True)
class Published:
    """SURGEON as published (arXiv 2503.20354): GI from an extra pass on a few random images of every batch."""

    extra_samples: int = 10

    def init(self, parameters: Parameters) -> PruningState:
        """Nothing seen yet."""
        return fresh_state(parameters)

    def rates(
        self, table: LayerTable, learning: Sequence[str], state: PruningState, budget: int | None
    ) -> dict[str, Rate]:
        """r_l = I_l / max I in float32, scaled into the budget by one factor."""
        return scale_ratios(table, published_importance(table, learning, state), budget)

    def observe(self, importance: Tensor, state: PruningState) -> PruningState:
        """The latest GI replaces the one before."""
        return PruningState(importance, state.steps + 1)


@dataclass(frozen=True)
class SinglePass:
    """SURGEON without its extra pass: its importance, from a running mean of the GI of the real backward passes before.

    The first batch of a run has none and treats all layers alike.
    """

    decay: float = 0.9
    extra_samples: int = 0

    def __post_init__(self) -> None:
        """Check the decay."""
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"the decay of the running importance is {self.decay}; allowed is [0, 1): set 0.9")

    def init(self, parameters: Parameters) -> PruningState:
        """Nothing seen yet."""
        return fresh_state(parameters)

    def rates(
        self, table: LayerTable, learning: Sequence[str], state: PruningState, budget: int | None
    ) -> dict[str, Rate]:
        """r_l = I_l / max I in float32, scaled into the budget by one factor."""
        return scale_ratios(table, published_importance(table, learning, state), budget)

    def observe(self, importance: Tensor, state: PruningState) -> PruningState:
        """Running mean: the plain mean of the first gradients, until the exponential one is the slower of the two."""
        weight = max(1.0 - self.decay, 1.0 / (int(state.steps) + 1))
        return PruningState(torch.lerp(state.importance, importance, weight), state.steps + 1)


@dataclass(frozen=True)
class RateDistortion:
    """The same importance, and for it the bits and keep ratios of the least weighted error."""

    decay: float = SinglePass.decay
    extra_samples: int = 0

    def init(self, parameters: Parameters) -> PruningState:
        """Nothing seen yet."""
        return fresh_state(parameters)

    def rates(
        self, table: LayerTable, learning: Sequence[str], state: PruningState, budget: int | None
    ) -> dict[str, Rate]:
        """The rate-distortion allocation for I_l; without a budget the best rate for all."""
        return table.rates(allocate(table, published_importance(table, learning, state), budget))

    def observe(self, importance: Tensor, state: PruningState) -> PruningState:
        """As :class:`SinglePass`."""
        return SinglePass(self.decay).observe(importance, state)


@dataclass(frozen=True)
class Uniform:
    """The same rate for every layer: what a rule has to beat."""

    extra_samples: int = 0

    def init(self, parameters: Parameters) -> PruningState:
        """Nothing seen yet."""
        return fresh_state(parameters)

    def rates(
        self, table: LayerTable, learning: Sequence[str], state: PruningState, budget: int | None
    ) -> dict[str, Rate]:
        """The best single rate within the budget."""
        return table.rates([uniform_choice(table, budget)] * len(table.layers))

    def observe(self, importance: Tensor, state: PruningState) -> PruningState:
        """Count the step."""
        return PruningState(state.importance, state.steps + 1)


@dataclass(frozen=True)
class Random:
    """Importances drawn once, log-uniform over three decades: what any importance has to beat."""

    seed: int = 0
    extra_samples: int = 0

    def init(self, parameters: Parameters) -> PruningState:
        """Nothing seen yet."""
        return fresh_state(parameters)

    def rates(
        self, table: LayerTable, learning: Sequence[str], state: PruningState, budget: int | None
    ) -> dict[str, Rate]:
        """The rate-distortion allocation for the drawn importances."""
        drawn = torch.rand(len(table.layers), generator=generator_for("pruning", self.seed), dtype=torch.float64)
        return table.rates(allocate(table, (-drawn * math.log(1000.0)).exp().numpy(), budget))

    def observe(self, importance: Tensor, state: PruningState) -> PruningState:
        """Count the step."""
        return PruningState(state.importance, state.steps + 1)


PRUNING_RULES: dict[str, Callable[[], PruningRule]] = {
    "published": Published,
    "single_pass": SinglePass,
    "rate_distortion": RateDistortion,
    "uniform": Uniform,
    "random": Random,
}
"""Rules without learned tensors, by the name that ``method.pruning`` calls them."""


def build_rule(name: str, rules: Mapping[str, Callable[[], PruningRule]] = PRUNING_RULES) -> PruningRule:
    """The rule of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in rules:
        raise ConfigError(f"method.pruning is {name!r}; allowed are {', '.join(rules)}: choose one")
    return rules[name]()
