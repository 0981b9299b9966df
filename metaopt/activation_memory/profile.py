"""What a model keeps for backward at each precision and batch size, known before the first real batch.

Dry runs on two small numbers of images measure the bytes of each layer at each precision of the menu. They are affine
in the number of images, so two points give them for any batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaopt.activation_memory.backward_trace import CHEAPEST, trace_backward
from metaopt.activation_memory.distortion import distortion
from metaopt.activation_memory.importance import learning_layers, match_layers
from metaopt.activation_memory.layer_table import Layer, LayerTable
from metaopt.activation_memory.precision import Precision
from metaopt.activation_memory.saved_activations import LayerRecord, SavedActivations
from metaopt.types import Parameters

FEW = 2  # images of the smaller dry runs; the larger ones have twice as many
FEW_BYTES = 2**20  # that a dry run should keep: very small tensors are not coded at all
MOST = 32  # images of the smaller dry runs at most
MENU = (
    *(Precision(bits) for bits in (32, 16, 8, 6, 5, 4, 3, 2, 1)),
    *(Precision(bits, keep) for bits, keep in ((4, 0.5), (4, 0.25), (3, 0.5), (3, 0.25), (3, 0.1), (3, 0.05))),
)
"""Precisions that an allocation chooses from; what is no bargain for a layer drops out by itself."""
WHOLE = (Precision(32), Precision(16), Precision(8))  # measured, beside the cheapest; codes are affine in their bits
PRUNED = tuple(Precision(*pair) for pair in ((4, 0.5), (4, 0.25), (3, 0.05), (32, 0.75), (32, 0.25)))  # measured, too
RESERVE = 0.06  # of what a step holds at the cheapest precision, for what the dry runs do not foresee
SLACK = 64  # bytes a layer, for codes that are rounded up to whole bytes
MASK_SHARE = 1 / 16  # of the dense bytes, float32: a bit an entry is 1 / 32
TOLD_SHARE = 1 / 64  # of the bytes in float32: with codes of its own a module keeps 1 / 32

Pass = Callable[[Tensor], Tensor]
"""One forward pass on images (n, 3, H, W): a scalar that carries its graph."""

_Pair = list[NDArray[numpy.float64]]  # of the smaller and the larger dry run


class Profile:
    """The layers of a model at any batch size from that of the smaller dry run on.

    Args:
        model: the model that ``loss_of`` runs.
        loss_of: one forward pass.
        parameters: what is differentiated.
        images: a batch, (B, 3, H, W); the dry runs take the first of it, over again where it has too few.
        prunes: whether the menu has precisions that prune, or bits alone.
    """

    def __init__(
        self, model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor, *, prunes: bool = True
    ) -> None:
        self.menu = tuple(precision for precision in MENU if prunes or precision.keep == 1.0)
        self.smallest, first = _enough(model, loss_of, images)
        few = [_take(images, self.smallest), _take(images, 2 * self.smallest)]
        traces = [trace_backward(model, loss_of, parameters, some) for some in few]
        runs = {CHEAPEST: [_by_module(trace.records) for trace in traces]}
        for precision in (*WHOLE, *(PRUNED if prunes else ())):
            known = first if precision == Precision() else _dry_run(model, loss_of, few[0], precision)
            runs[precision] = [known, _dry_run(model, loss_of, few[1], precision)]
        whole = runs[Precision()]
        pruned = runs[PRUNED[-1]][0] if prunes else {}
        self._groups = _groups(whole[0], runs[CHEAPEST][0], pruned, list(learning_layers(parameters)))
        members = [(name, *followers) for name, followers in self._groups.items()]

        def sums(pair: Sequence[dict[str, _Part]], value: str) -> _Pair:
            rows = [[[getattr(run[name], value) for name in names if name in run] for names in members] for run in pair]
            return [numpy.array([sum(numbers) for numbers in row], float) for row in rows]

        self._kinds = {name: whole[0][name].kind for name in self._groups}
        # Where a tensor is coded in the larger run alone, bytes are not on one line.
        small, large = sums(whole, "small")
        self._crossing = small != large
        self._dense = sums(whole, "dense")
        self._held = {precision: sums(pair, "held") for precision, pair in runs.items()}
        marks = list(dict.fromkeys(moment for trace in traces for moment in trace.alive))
        shares = [[trace.shares(mark, members) for mark in marks] for trace in traces]
        self._alive = numpy.array(shares).max(axis=0)  # (E, L)
        self._beside = [numpy.array([trace.beside.get(mark, 0) for mark in marks], float) for trace in traces]

    def table(self, images: int) -> LayerTable:
        """The layers for a batch of so many images, ``smallest`` or more."""
        dense = self._at(self._dense, images)
        held = {precision: self._bytes(pair, images) for precision, pair in self._held.items()}
        layers: list[Layer] = []
        for row, (name, followers) in enumerate(self._groups.items()):
            cost = _Cost({precision: int(sizes[row]) for precision, sizes in held.items()})
            layers.append(Layer(name, self._kinds[name], max(1, int(dense[row])), cost, followers))
        errors = [distortion(precision) for precision in self.menu]
        beside = self._at(self._beside, images, least_slope=0.0)
        fixed = int(beside[0])  # at the end of the forward pass, which is the first of the moments
        table = LayerTable(layers, self.menu, errors, fixed, self._alive, beside - fixed)
        table.fixed += math.ceil(RESERVE * table.peak(table.costs.min(axis=1)))
        return table

    def _bytes(self, pair: _Pair, images: int) -> NDArray[numpy.float64]:
        """What each group holds, (L,)."""
        larger = pair[1] * max(1.0, images / (2 * self.smallest))
        return SLACK + numpy.where(self._crossing, numpy.maximum(pair[0], larger), self._at(pair, images))

    def _at(self, pair: _Pair, images: int, least_slope: float = -math.inf) -> NDArray[numpy.float64]:
        """Numbers that are affine in the images, from those of both dry runs."""
        small, large = pair
        slope = numpy.maximum(least_slope, (large - small) / self.smallest)
        return numpy.ceil(numpy.maximum(0.0, small + slope * (images - self.smallest)))


class Profiles:
    """Profiles of one model under one loss, each made when it is first asked for: all that run both may share them."""

    def __init__(self) -> None:
        self._profiles: dict[tuple, Profile] = {}
        self._tables: dict[tuple, LayerTable] = {}

    def table(
        self, model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor, *, prunes: bool
    ) -> LayerTable:
        """The layers of a batch of this shape; the arguments are those of :class:`Profile`."""
        batch, one = (prunes, *images.shape), (prunes, *images.shape[1:])
        if batch not in self._tables:
            profile = self._profiles.get(one)
            if profile is None or profile.smallest > len(images):
                profile = self._profiles[one] = Profile(model, loss_of, parameters, images, prunes=prunes)
            self._tables[batch] = profile.table(len(images))
        return self._tables[batch]


class _Cost:
    """Bytes of one layer: as measured, and between the measured precisions b₀ + b₁ · bits + b₂ · bits · keep.

    Codes of all entries are such a line in the bits, pruned ones have a mask beside; values in float32 are one in the
    keep ratio.
    """

    def __init__(self, measured: dict[Precision, int]) -> None:
        self._measured = measured
        self._lines = [self._line((CHEAPEST, Precision(8)))]
        if PRUNED[0] in measured:
            self._lines += [self._line(PRUNED[:3]), self._line(PRUNED[3:])]

    def _line(self, precisions: Sequence[Precision]) -> list[float]:
        """The least solution through the measured points."""
        points = numpy.array([(1.0, kept.bits, kept.bits * kept.keep) for kept in precisions])
        measured = numpy.array([self._measured[kept] for kept in precisions], float)
        return numpy.linalg.lstsq(points, measured, rcond=None)[0].tolist()

    def __call__(self, precision: Precision) -> int:
        if precision in self._measured:
            return self._measured[precision]
        line = 0 if precision.keep == 1.0 else 1 if precision.bits <= 8 else 2
        start, per_bit, per_kept = self._lines[line]
        return math.ceil(start + precision.bits * (per_bit + per_kept * precision.keep) - 1e-6)


class _Part(NamedTuple):
    """What one module kept in a dry run; bytes."""

    kind: str
    dense: int
    held: int
    small: int  # tensors of too few entries to be coded


def _take(images: Tensor, count: int) -> Tensor:
    """The first images, over again where there are too few."""
    return images[torch.arange(count, device=images.device) % len(images)]


def _enough(model: nn.Module, loss_of: Pass, images: Tensor) -> tuple[int, dict[str, _Part]]:
    """How many images a dry run needs, a batch at most, so that what it keeps is typical; and what it keeps dense."""
    size = min(FEW, len(images))
    while True:
        parts = _dry_run(model, loss_of, _take(images, size), Precision())
        if 4 * size > min(4 * MOST, len(images)) or sum(part.dense for part in parts.values()) >= FEW_BYTES:
            return size, parts
        size *= 2


def _dry_run(model: nn.Module, loss_of: Pass, images: Tensor, precision: Precision) -> dict[str, _Part]:
    """What each module keeps of one forward pass at one precision, by its name."""
    with torch.enable_grad(), SavedActivations(model, memory="pruned", default=precision) as saved:
        loss_of(images)
    return _by_module(saved.layers)


def _by_module(records: Sequence[LayerRecord]) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    for record in records:
        kind, dense, held, small = parts.get(record.name, (record.kind, 0, 0, 0))
        parts[record.name] = _Part(kind, dense + record.dense_bytes, held + record.held_bytes, small + record.small)
    return parts


def _groups(
    parts: dict[str, _Part], cheapest: dict[str, _Part], pruned: dict[str, _Part], learning: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Modules that keep a mask at most, or what is told upstream, under the learning layer there; others alone.

    What is told upstream costs little while all is kept there, and more once that is pruned.
    """

    def follows(name: str) -> bool:
        part = parts[name]
        return (
            part.held <= part.dense * MASK_SHARE
            or cheapest[name].held <= part.held * TOLD_SHARE
            or (name in pruned and pruned[name].held > part.held)
        )

    groups: dict[str, tuple[str, ...]] = {}
    for name, source in zip(parts, match_layers(list(parts), learning), strict=True):
        leader = learning[source]
        if name != leader and leader in parts and follows(name):
            groups[leader] = (*groups.get(leader, ()), name)
        else:
            groups.setdefault(name, ())
    return groups
