"""Allocations against exhaustive search."""

import itertools
from collections.abc import Callable

import numpy
import pytest

from metaopt.activation_memory.budget import allocate, scale_ratios
from metaopt.activation_memory.layer_table import Layer, LayerTable
from metaopt.activation_memory.precision import Precision
from metaopt.errors import BudgetError

MENU = (Precision(32), Precision(8), Precision(4), Precision(2))
ERRORS = (0.0, 1e-3, 2e-2, 0.2)
NUMELS = (1000, 4000, 300)


def cost_of(numel: int) -> Callable[[Precision], int]:
    return lambda precision: (
        int(numel * precision.bits / 8 * precision.keep) + (numel // 8 if precision.keep < 1 else 0)
    )


def table(**options) -> LayerTable:
    layers = [Layer(f"n{i}", "batch_norm", 4 * n, cost_of(n)) for i, n in enumerate(NUMELS)]
    return LayerTable(layers, MENU, ERRORS, **options)


@pytest.mark.parametrize("budget", range(1500, 22_000, 700))
def test_no_allocation_of_as_many_bytes_has_less_error(budget: int) -> None:
    importance = numpy.array([1.0, 0.3, 5.0])
    chosen = allocate(table(), importance, budget)
    error = sum(i * ERRORS[c] for i, c in zip(importance, chosen, strict=True))
    used = sum(int(table().costs[row, c]) for row, c in enumerate(chosen))
    for other in itertools.product(range(len(MENU)), repeat=3):
        if sum(int(table().costs[row, c]) for row, c in enumerate(other)) <= used:
            assert sum(i * ERRORS[c] for i, c in zip(importance, other, strict=True)) >= error - 1e-12


def test_a_rate_that_is_no_bargain_is_never_chosen() -> None:
    layers = [Layer("a", "batch_norm", 4000, cost_of(1000)), Layer("b", "batch_norm", 4000, cost_of(1000))]
    tables = LayerTable(layers, (Precision(32), Precision(8), Precision(4)), (0.0, 0.19, 0.2))
    assert tables.hulls == [[2, 0], [2, 0]]  # 8 bits gain less for their bytes than 32 do


def test_the_important_layer_keeps_more() -> None:
    chosen = [allocate(table(), numpy.array(weights), 1700) for weights in ([9.0, 1.0, 1.0], [1.0, 1.0, 9.0])]
    assert table().costs[0, chosen[0][0]] > table().costs[0, chosen[1][0]]


def test_bytes_are_all_that_are_held_at_once() -> None:
    beside, held = numpy.array([1200.0, 16_000.0, 4000.0]), [250, 1000, 75]
    # Backward meets the last layer first.
    alive = numpy.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert table(fixed=10, alive=alive, beside=beside).peak(held) == 250 + 1000 + 16_000 + 10
    assert table(fixed=10, alive=numpy.ones((3, 3)), beside=beside).peak(held) == 250 + 1000 + 75 + 16_000 + 10
    assert table(fixed=10, alive=alive / 2, beside=beside).peak(held) == 125 + 500 + 16_000 + 10
    assert table().peak(held) == 1325


def test_published_ratios_are_scaled_by_one_factor() -> None:
    ratios = numpy.array([1.0, 0.5, 0.25])
    free = scale_ratios(table(), ratios, None)
    assert [free[f"n{i}"].keep for i in range(3)] == [1.0, 0.5, 0.25]
    precisions = scale_ratios(table(), ratios, 6000)
    keeps = numpy.array([precisions[f"n{i}"].keep for i in range(3)])
    assert keeps / keeps[0] == pytest.approx(ratios, rel=1e-6)
    assert {precision.bits for precision in precisions.values()} == {32}
    held = sum(layer.cost(precisions[layer.name]) for layer in table().layers)
    assert 5990 <= held <= 6000


def test_too_little_is_refused_with_what_is_enough() -> None:
    with pytest.raises(BudgetError, match=r"budget_mib=0.00095\d* is too small .* allowed are 0.01 or more"):
        allocate(table(), numpy.ones(3), 1000)
