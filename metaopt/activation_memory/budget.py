"""Which precision each layer's activations are kept at, so that all of them fit into a number of bytes.

Two projections onto a budget, both one monotone search. More budget never takes a byte from any layer.

``allocate``
    rate-distortion: minimise Σ_l I_l · D(rate_l) subject to Σ_l bytes_l(rate_l) <= budget, over a menu of precisions. D
    is the codec's relative squared error on standard normal values, measured once from the codec itself. On the lower
    convex hull of each layer's points (bytes, D) the solution for the multiplier λ takes every step whose gain
    I_l·ΔD/Δbytes is above λ; so all steps, sorted by their gain, are taken in turn while they fit (Shoham and Gersho,
    IEEE TASSP 1988).
``scale_ratios``
    SURGEON's published keep ratios, in float32, times the largest common factor in (0, 1] that fits.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy
from numpy.typing import NDArray

from metaopt.activation_memory.packs import Precision
from metaopt.errors import BudgetError

MIB = 2**20
SMALLEST_KEEP = 1 / 256  # of a published ratio: below it the mask alone decides what a layer costs
HALVINGS = 20  # of the search for a common factor, in each step: to a part in a million

Costs = Callable[[Precision], int]
"""Bytes that a layer holds at a precision."""


@dataclass(frozen=True)
class Layer:
    """What is to be known of one layer that keeps activations, at one batch size.

    Layers that keep a mask at most, such as a ReLU after a normalisation, follow the layer whose codes it is read from,
    and have its precision.
    """

    name: str  # qualified name of its module
    kind: str  # such as "batch_norm", "relu" or "attention"
    dense_bytes: int  # M_l: what torch would keep
    cost: Costs
    followers: tuple[str, ...] = ()  # names of other modules that have its precision

    def precisions(self, precision: Precision) -> dict[str, Precision]:
        """The precision, by the name of each module that has it."""
        return dict.fromkeys((self.name, *self.followers), precision)


class LayerTable:
    """The layers of a model at one batch size, with what each precision costs and spoils.

    Args:
        layers: in forward order, with names of their own.
        menu: precisions to choose from.
        distortions: relative squared error of each precision, (R,), in [0, 1].
        fixed: bytes that a step holds beside the layers', whatever the precisions.
        alive: share of each layer's bytes that is still held at each moment of backward, (E, L); None: no moments.
        beside: bytes that are held at each moment beside those and ``fixed``, (E,).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        menu: Sequence[Precision],
        distortions: Sequence[float],
        fixed: int = 0,
        alive: NDArray[numpy.float64] | None = None,
        beside: NDArray[numpy.float64] | None = None,
    ) -> None:
        self.layers, self.menu, self.fixed = tuple(layers), tuple(menu), fixed
        self.alive = numpy.zeros((1, len(layers))) if alive is None else alive
        self.beside = numpy.zeros(len(self.alive)) if beside is None else beside
        self.distortions = numpy.asarray(distortions, dtype=float)
        costs = [[layer.cost(precision) for precision in menu] for layer in layers]
        self.costs = numpy.array(costs, dtype=numpy.int64).reshape(len(self.layers), len(self.menu))  # (L, R)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def dense_bytes(self) -> NDArray[numpy.int64]:
        """M_l of each layer, (L,)."""
        return numpy.array([layer.dense_bytes for layer in self.layers], dtype=numpy.int64)

    def peak(self, held: NDArray[numpy.int64] | Sequence[int]) -> int:
        """The most bytes that a step holds at once, where its layers hold ``held``, (L,)."""
        held = numpy.asarray(held, dtype=numpy.int64)
        return math.ceil(max(held.sum(), (self.alive @ held + self.beside).max())) + self.fixed

    @cached_property
    def hulls(self) -> list[list[int]]:
        """Positions in the menu on the lower convex hull of each layer's points, from the fewest bytes to the most."""
        return [_hull(costs, self.distortions) for costs in self.costs]

    def precisions(self, choices: Sequence[int]) -> dict[str, Precision]:
        """The precision of each layer by its name, from positions in the menu."""
        return merged(layer.precisions(self.menu[choice]) for layer, choice in zip(self.layers, choices, strict=True))


def too_small(smallest: int, budget: int) -> BudgetError:
    """The error for a budget that nothing fits into; ``smallest`` is what a step holds at least. Both in bytes."""
    least = math.ceil(100 * smallest / MIB) / 100
    return BudgetError(
        f"budget_mib={budget / MIB:.4g} is too small for this model and batch size; allowed are {least:g} or more: set "
        f"budget_mib={least:g} or lower batch_size"
    )


def allocate(table: LayerTable, importance: NDArray[numpy.float64], budget: int | None) -> list[int]:
    """The rate-distortion allocation.

    Args:
        table: the layers.
        importance: I_l, (L,), not negative.
        budget: bytes for the whole step, ``table.fixed`` included; None for the best precision everywhere.

    Returns:
        A position in the menu for each layer.

    Raises:
        BudgetError: the cheapest precisions are over the budget; the message says what they need.
    """
    choices = [hull[0] for hull in table.hulls]
    if budget is None:
        return [hull[-1] for hull in table.hulls]
    least = table.costs[numpy.arange(len(choices)), choices]
    if table.peak(least) > budget:
        raise too_small(table.peak(least), budget)
    layers, sizes, gains, goals = table_steps(table)
    # Stable, and falling within a layer: a layer's steps come in their order, whatever its importance.
    order = numpy.argsort(-(importance[layers] * gains), kind="stable")

    def held(taken: int) -> NDArray[numpy.int64]:
        return least + numpy.bincount(layers[order[:taken]], sizes[order[:taken]], len(choices)).astype(numpy.int64)

    taken = bisect_right(range(len(order) + 1), budget, key=lambda taken: table.peak(held(taken))) - 1
    for step in order[:taken]:
        choices[layers[step]] = int(goals[step])
    return choices


def table_steps(
    table: LayerTable,
) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64], NDArray[numpy.float64], NDArray[numpy.int64]]:
    """All steps along the layers' hulls: layer, bytes, error saved per byte, and the precision that it leads to."""
    rows = [
        (layer, table.costs[layer, after] - table.costs[layer, before], before, after)
        for layer, hull in enumerate(table.hulls)
        for before, after in pairwise(hull)
    ]
    layers, sizes, befores, goals = numpy.array(rows, dtype=numpy.int64).reshape(-1, 4).T
    return layers, sizes, (table.distortions[befores] - table.distortions[goals]) / sizes, goals


def scale_ratios(table: LayerTable, ratios: NDArray[numpy.float64], budget: int | None) -> dict[str, Precision]:
    """Published keep ratios within a budget.

    Args:
        table: the layers.
        ratios: r_l, (L,) in [0, 1].
        budget: bytes for the whole step; None leaves the ratios as they are.

    Raises:
        BudgetError: the smallest ratios are over the budget.
    """

    layers = table.layers

    def scaled(factor: float) -> list[Precision]:
        return [_kept(layer, max(SMALLEST_KEEP, factor * float(r))) for layer, r in zip(layers, ratios, strict=True)]

    def total(factor: float) -> int:
        return table.peak([layer.cost(precision) for layer, precision in zip(layers, scaled(factor), strict=True)])

    factor = 1.0
    if budget is not None and total(factor) > budget:
        low, factor = 0.0, 1.0
        if total(low) > budget:
            raise too_small(total(low), budget)
        for _ in range(HALVINGS):
            middle = (low + factor) / 2
            low, factor = (middle, factor) if total(middle) <= budget else (low, middle)
        factor = low
    return merged(layer.precisions(precision) for layer, precision in zip(layers, scaled(factor), strict=True))


def uniform_choice(table: LayerTable, budget: int | None) -> int:
    """Position of the best single precision for all layers that fits.

    Of two precisions the worse one is left out where the better costs no more in any layer, and the better one where it
    costs less in some: so here too a larger budget takes a byte from no layer.

    Raises:
        BudgetError: the cheapest precision is over the budget.
    """
    totals = table.costs.sum(axis=0)
    ladder: list[int] = []
    for precision in sorted(
        range(len(table.menu)), key=lambda precision: (totals[precision], table.distortions[precision])
    ):
        if not ladder or (
            table.distortions[precision] < table.distortions[ladder[-1]]
            and bool((table.costs[:, precision] >= table.costs[:, ladder[-1]]).all())
        ):
            ladder.append(precision)
    if budget is None:
        return ladder[-1]
    fitting = [precision for precision in ladder if table.peak(table.costs[:, precision]) <= budget]
    if not fitting:
        raise too_small(table.peak(table.costs[:, ladder[0]]), budget)
    return fitting[-1]


def merged(parts: Iterable[dict[str, Precision]]) -> dict[str, Precision]:
    """One mapping from many."""
    return {name: precision for part in parts for name, precision in part.items()}


def _kept(layer: Layer, keep: float) -> Precision:
    """The precision of a keep ratio in float32; dense where the mask would cost more than it saves."""
    dense, pruned = Precision(32, 1.0), Precision(32, min(1.0, keep))
    return dense if layer.cost(pruned) >= layer.cost(dense) else pruned


def _hull(costs: NDArray[numpy.int64], distortions: NDArray[numpy.float64]) -> list[int]:
    """Lower convex hull of the points (cost, distortion), by Andrew's monotone chain."""
    hull: list[int] = []
    for point in sorted(range(len(costs)), key=lambda point: (costs[point], distortions[point])):
        if hull and (costs[point] == costs[hull[-1]] or distortions[point] >= distortions[hull[-1]]):
            continue
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            left = (distortions[first] - distortions[second]) * (costs[point] - costs[second])
            right = (distortions[second] - distortions[point]) * (costs[second] - costs[first])
            if left > right:
                break
            hull.pop()
        hull.append(point)
    return hull
