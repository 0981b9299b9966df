"""Which precision each layer's activations are kept at, so that all of them fit into a number of bytes.

Three projections onto a budget, each one monotone search. More budget never takes a byte from any layer.

``allocate``
    rate-distortion: minimise Σ_l I_l · D(k_l) subject to Σ_l bytes_l(k_l) <= budget, over a menu of precisions k. D is
    the codec's relative squared error on standard normal values, measured once from the codec itself. On the lower
    convex hull of each layer's points (bytes, D) the solution for the multiplier λ takes every step whose gain
    I_l·ΔD/Δbytes is above λ; so all steps, sorted by their gain, are taken in turn while they fit (Shoham and Gersho,
    IEEE TASSP 1988).
``scale_ratios``
    SURGEON's published keep ratios, in float32, times the largest common factor in (0, 1] that fits.
``best_uniform``
    the best single precision for all layers.
"""

import math
from bisect import bisect_right
from itertools import pairwise

import numpy
from numpy.typing import NDArray

from metaopt.activation_memory.layer_table import Layer, LayerTable
from metaopt.activation_memory.precision import Precision
from metaopt.errors import BudgetError
from metaopt.evaluation.meter import MIB

SMALLEST_KEEP = 1 / 256  # of a published ratio: below it the mask alone decides what a layer costs
HALVINGS = 20  # of the search for a common factor, in each step: to a part in a million


def too_small(smallest: int, budget_mib: float) -> BudgetError:
    """The error for a budget that nothing fits into; ``smallest`` is what a step holds at least, in bytes."""
    least = math.ceil(100 * smallest / MIB) / 100
    return BudgetError(
        f"budget_mib={budget_mib:g} is too small for this model and batch size; allowed are {least:g} or more: set "
        f"budget_mib={least:g} or lower batch_size",
        smallest,
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
    if budget is None:
        return [hull[-1] for hull in table.hulls]
    choices = [hull[0] for hull in table.hulls]
    least = table.costs[numpy.arange(len(choices)), choices]
    if table.peak(least) > budget:
        raise too_small(table.peak(least), budget / MIB)
    # All steps along the hulls: layer, bytes, and the positions in the menu that they start from and lead to.
    steps = [
        (layer, table.costs[layer, after] - table.costs[layer, before], before, after)
        for layer, hull in enumerate(table.hulls)
        for before, after in pairwise(hull)
    ]
    layers, sizes, starts, goals = numpy.array(steps, dtype=numpy.int64).reshape(-1, 4).T
    gains = (table.distortions[starts] - table.distortions[goals]) / sizes
    # Stable, and falling within a layer: a layer's steps come in their order, whatever its importance.
    order = numpy.argsort(-(importance[layers] * gains), kind="stable")

    def peak(taken: int) -> int:
        first = order[:taken]
        return table.peak(least + numpy.bincount(layers[first], sizes[first], len(choices)).astype(numpy.int64))

    for step in order[: bisect_right(range(len(order) + 1), budget, key=peak) - 1]:
        choices[layers[step]] = int(goals[step])
    return choices


def scale_ratios(table: LayerTable, ratios: NDArray[numpy.float64], budget: int | None) -> dict[str, Precision]:
    """Published keep ratios within a budget.

    Args:
        table: the layers.
        ratios: r_l, (L,) in [0, 1].
        budget: bytes for the whole step; None leaves the ratios as they are.

    Raises:
        BudgetError: the smallest ratios are over the budget.
    """

    def scaled(factor: float) -> list[Precision]:
        keeps = [max(SMALLEST_KEEP, factor * float(ratio)) for ratio in ratios]
        return [_pruned(layer, keep) for layer, keep in zip(table.layers, keeps, strict=True)]

    def peak(factor: float) -> int:
        return table.peak([layer.cost(kept) for layer, kept in zip(table.layers, scaled(factor), strict=True)])

    factor = 1.0
    if budget is not None and peak(factor) > budget:
        low, high = 0.0, factor
        if peak(low) > budget:
            raise too_small(peak(low), budget / MIB)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if peak(middle) <= budget else (low, middle)
        factor = low
    return table.named(scaled(factor))


def _pruned(layer: Layer, keep: float) -> Precision:
    """A keep ratio in float32; dense where the mask would cost more than it saves."""
    dense, pruned = Precision(32, 1.0), Precision(32, min(1.0, keep))
    return dense if layer.cost(pruned) >= layer.cost(dense) else pruned


def best_uniform(table: LayerTable, budget: int | None) -> dict[str, Precision]:
    """The best single precision for all layers that fits into ``budget`` bytes; None for no limit.

    Of two precisions the worse one is left out where the better costs no more in any layer, and the better one where it
    costs less in some: so here too a larger budget takes a byte from no layer.

    Raises:
        BudgetError: the cheapest precision is over the budget.
    """
    costs, errors, totals = table.costs, table.distortions, table.costs.sum(axis=0)
    ladder: list[int] = []
    for choice in sorted(range(len(table.menu)), key=lambda choice: (totals[choice], errors[choice])):
        better = not ladder or errors[choice] < errors[ladder[-1]]
        if better and (not ladder or bool((costs[:, choice] >= costs[:, ladder[-1]]).all())):
            ladder.append(choice)
    fitting = [choice for choice in ladder if budget is None or table.peak(costs[:, choice]) <= budget]
    if budget is not None and not fitting:
        raise too_small(table.peak(costs[:, ladder[0]]), budget / MIB)
    return table.chosen([fitting[-1]] * len(table.layers))
