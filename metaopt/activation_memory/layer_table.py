"""The layers of a model at one batch size, with what each precision costs and spoils."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
from numpy.typing import NDArray

from metaopt.activation_memory.precision import Precision


@dataclass(frozen=True)
class Layer:
    """What is to be known of one layer that keeps activations, at one batch size.

    Layers that keep a mask at most, such as a ReLU after a normalisation, follow the layer whose codes it is read from,
    and have its precision.
    """

    name: str  # qualified name of its module
    kind: str  # such as "batch_norm", "relu" or "attention"
    dense_bytes: int  # M_l: what torch would keep
    cost: Callable[[Precision], int]  # bytes that it holds at a precision
    followers: tuple[str, ...] = ()  # names of other modules that have its precision


class LayerTable:
    """The layers, and the menu of precisions.

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
        self.names = tuple(layer.name for layer in layers)
        self.dense_bytes = numpy.array([layer.dense_bytes for layer in layers], dtype=numpy.int64)  # M_l, (L,)
        self.alive = numpy.zeros((1, len(layers))) if alive is None else alive
        self.beside = numpy.zeros(len(self.alive)) if beside is None else beside
        self.distortions = numpy.asarray(distortions, dtype=float)
        costs = [[layer.cost(precision) for precision in menu] for layer in layers]
        self.costs = numpy.array(costs, dtype=numpy.int64).reshape(len(layers), len(menu))  # bytes, (L, R)

    def peak(self, held: NDArray[numpy.int64] | Sequence[int]) -> int:
        """The most bytes that a step holds at once, where its layers hold ``held``, (L,)."""
        held = numpy.asarray(held, dtype=numpy.int64)
        return math.ceil(max(held.sum(), (self.alive @ held + self.beside).max())) + self.fixed

    @cached_property
    def hulls(self) -> list[list[int]]:
        """Positions in the menu on the lower convex hull of each layer's points, from the fewest bytes to the most."""
        return [_hull(costs, self.distortions) for costs in self.costs]

    def named(self, precisions: Iterable[Precision]) -> dict[str, Precision]:
        """The layers' precisions, (L,), by the name of each module that has them."""
        pairs = zip(self.layers, precisions, strict=True)
        return {name: precision for layer, precision in pairs for name in (layer.name, *layer.followers)}

    def chosen(self, choices: Sequence[int]) -> dict[str, Precision]:
        """As `named`, from positions in the menu, (L,)."""
        return self.named(self.menu[choice] for choice in choices)


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
