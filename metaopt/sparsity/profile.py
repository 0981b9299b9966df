"""What a model keeps for backward at each rate and batch size, known before the first real batch.

Dry runs on two small numbers of images measure the bytes of each layer at each rate of the menu. They are affine in the
number of images, so two points give them for any batch.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaopt.measure import MemoryMeter
from metaopt.sparsity.codec import Rate
from metaopt.sparsity.importance import learning_layers, match_layers
from metaopt.sparsity.ratios import MIB, Layer, LayerTable
from metaopt.sparsity.saved import SavedActivations
from metaopt.types import Parameters

FEW = 2  # images of the smaller dry runs; the larger ones have twice as many
FEW_BYTES = 2**20  # that a dry run should keep: very small tensors are not coded at all
MOST = 32  # images of the smaller dry runs at most
MENU = (
    *(Rate(bits) for bits in (32, 16, 8, 6, 5, 4, 3, 2, 1)),
    *(Rate(bits, keep) for bits, keep in ((4, 0.5), (4, 0.25), (3, 0.5), (3, 0.25), (3, 0.1), (3, 0.05))),
)
"""Rates that a rule chooses from; what is no bargain for a layer drops out by itself."""
CHEAPEST = Rate(1)
RATIOS = (Rate(32, 0.75), Rate(32, 0.25))  # between and beyond these, bytes in float32 are affine in the keep ratio
SLACK = 64  # bytes a layer, for codes that are rounded up to whole bytes
MASK_SHARE = 1 / 16  # of the dense bytes, float32: a bit an entry is 1 / 32
SAMPLES = (64, 16, 16, 16)  # of a standard normal, on which distortions are measured

Pass = Callable[[Tensor], Tensor]
"""One forward pass on images (n, 3, H, W): a scalar to differentiate."""


_Fit = tuple[NDArray[numpy.float64], NDArray[numpy.float64]]


class Profile:
    """The layers of a model at any batch size.

    Args:
        model: the model that ``loss_of`` runs.
        loss_of: one forward pass.
        parameters: what is differentiated.
        images: a batch, (B, 3, H, W); the dry runs take the first of it, over again where it has too few.
        prunes: whether the menu has rates that prune, or bits alone.
    """

    def __init__(
        self, model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor, *, prunes: bool = True
    ) -> None:
        self.menu = tuple(rate for rate in MENU if prunes or rate.keep == 1.0)
        size = _enough(model, loss_of, images)
        few = [_take(images, size), _take(images, 2 * size)]
        self._size = size
        self._outside = [_outside(model, loss_of, parameters, some) for some in few]
        rates = (*self.menu, *(RATIOS if prunes else ()))
        runs = {rate: [_dry_run(model, loss_of, some, rate) for some in few] for rate in rates}
        first = runs[Rate()]
        self._groups = _groups(first[0], list(learning_layers(parameters)))
        self._kinds = {name: first[0][name].kind for name in self._groups}
        self._dense = self._affine([{name: part.dense for name, part in run.items()} for run in first])
        self._held = {
            rate: self._affine([{name: part.held for name, part in run.items()} for run in pair])
            for rate, pair in runs.items()
        }

        traces = [_lendings(model, loss_of, parameters, some) for some in few]
        self._lent = self._by_layer(traces)
        self._ordered = all(once for _, once in traces)  # of two forwards, one is held whole at the other's end

    def table(self, images: int) -> LayerTable:
        """The layers for a batch of so many images."""
        dense = self._at(self._dense, images)
        held = {rate: self._at(fit, images) + SLACK for rate, fit in self._held.items()}
        layers = [
            Layer(
                name,
                self._kinds[name],
                max(1, int(dense[row])),
                _Cost({rate: int(sizes[row]) for rate, sizes in held.items()}),
                followers,
            )
            for row, (name, followers) in enumerate(self._groups.items())
        ]
        return self._assemble(layers, images)

    def _assemble(self, layers: Sequence[Layer], images: int) -> LayerTable:
        errors = [distortion(rate) for rate in self.menu]
        lent = self._at(self._lent, images).astype(numpy.int64).tolist()
        return LayerTable(layers, self.menu, errors, self._scaled(self._outside, images), lent, self._ordered)

    def _by_layer(self, traces: Sequence[tuple[list[tuple[int, int]], bool]]) -> _Fit:
        """Most bytes that were lent to backward at once while it was at each group, and the slope per image."""
        rows: list[NDArray[numpy.float64]] = []
        for column, (trace, _) in enumerate(traces):
            start, slope = self._held[CHEAPEST]
            sums = numpy.cumsum(start + column * self._size * slope)
            lent = numpy.zeros(len(sums))
            for packed, size in trace:
                # Backward is at the layer up to which as much is still packed.
                row = min(len(sums) - 1, int(numpy.searchsorted(sums, packed)))
                lent[row] = max(lent[row], size)
            rows.append(lent)
        small, large = rows
        return small, numpy.maximum(0.0, large - small) / self._size

    def _affine(self, pair: Sequence[dict[str, int]]) -> _Fit:
        """Bytes of each group in the smaller dry run, and the slope per image, both (L,)."""
        small, large = (
            numpy.array(
                [sum(sizes.get(part, 0) for part in (name, *rest)) for name, rest in self._groups.items()], float
            )
            for sizes in pair
        )
        return small, (large - small) / self._size

    def _at(self, fit: _Fit, images: int) -> NDArray[numpy.float64]:
        """Bytes of each group for a batch of so many images, (L,)."""
        start, slope = fit
        return numpy.ceil(start + slope * (images - self._size))

    def _scaled(self, pair: Sequence[int], images: int) -> int:
        """A number of bytes in both dry runs at any number of images."""
        small, large = pair
        slope = max(0.0, (large - small) / self._size)
        return max(0, math.ceil(small + slope * (images - self._size)))


class _Cost:
    """Bytes of one layer: as measured, and between the measured keep ratios in float32 on a line."""

    def __init__(self, measured: dict[Rate, int]) -> None:
        self._measured = measured
        self._slope = self._start = math.nan
        if RATIOS[0] not in measured:
            return
        (more, less), (high, low) = RATIOS, (measured[rate] for rate in RATIOS)
        self._slope = (high - low) / (more.keep - less.keep)
        self._start = low - self._slope * less.keep

    def __call__(self, rate: Rate) -> int:
        if rate in self._measured:
            return self._measured[rate]
        return math.ceil(self._start + self._slope * rate.keep)


@lru_cache(maxsize=256)
def distortion(rate: Rate) -> float:
    """Relative squared error of a layer's normalised activation at a rate, on standard normal values; in [0, 1]."""
    values = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    error = (as_kept(values, rate) - values).square().sum() / values.square().sum()
    return min(1.0, float(error))


def as_kept(inputs: Tensor, rate: Rate, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """What backward gets to see of the input of a batch normalisation that was kept at a rate.

    Args:
        inputs: (B, C, ...).
        rate: how it was kept.
        weight: of the normalisation, (C,), and its
        bias: which place the codec's bins; None: 1 and 0.
    """
    layer = nn.BatchNorm1d(inputs.shape[1], track_running_stats=False).to(inputs)
    with torch.no_grad():
        for own, given in ((layer.weight, weight), (layer.bias, bias)):
            if given is not None:
                own.copy_(given)
    with torch.enable_grad(), SavedActivations(layer, memory="pruned", default=rate):
        # Not a leaf: the batch that a model is called with is alive anyway, and the engine leaves it alone.
        middle = inputs.detach().reshape(*inputs.shape[:2], -1).requires_grad_().clone()
        node = layer(middle).grad_fn
    assert node is not None
    with torch.no_grad():
        return node._saved_input.detach().reshape(inputs.shape)  # type: ignore[attr-defined]  # reading it unpacks it


class _Part(NamedTuple):
    """What one module kept in a dry run; bytes."""

    kind: str
    dense: int
    held: int


def _take(images: Tensor, count: int) -> Tensor:
    """The first images, over again where there are too few."""
    return images[torch.arange(count, device=images.device) % len(images)]


def _enough(model: nn.Module, loss_of: Pass, images: Tensor) -> int:
    """How many images a dry run needs so that what it keeps is typical."""
    size = FEW
    while size < MOST:
        parts = _dry_run(model, loss_of, _take(images, size), Rate())
        if sum(part.dense for part in parts.values()) >= FEW_BYTES:
            break
        size *= 2
    return size


def _dry_run(model: nn.Module, loss_of: Pass, images: Tensor, rate: Rate) -> dict[str, _Part]:
    """What each module keeps of one forward pass at one rate, by its name."""
    parts: dict[str, _Part] = {}
    with torch.enable_grad(), SavedActivations(model, memory="pruned", default=rate) as saved:
        loss = loss_of(images)
        for record in saved.layers:
            kind, dense, held = parts.get(record.name, (record.kind, 0, 0))
            parts[record.name] = _Part(kind, dense + record.dense_bytes, held + record.held_bytes)
        del loss
    return parts


def _groups(parts: dict[str, _Part], learning: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Modules that keep a mask at most, under the name of the learning layer upstream; all others by themselves."""
    names = list(parts)
    groups: dict[str, list[str]] = {}
    for name, source in zip(names, match_layers(names, learning), strict=True):
        _, dense, held = parts[name]
        leader = learning[source]
        if name != leader and leader in parts and held <= dense * MASK_SHARE:
            groups.setdefault(leader, []).append(name)
        else:
            groups.setdefault(name, [])
    return {name: tuple(followers) for name, followers in groups.items()}


def _lendings(
    model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor
) -> tuple[list[tuple[int, int]], bool]:
    """Packed and lent bytes at each lending of a backward pass at the cheapest rates; whether there was one forward."""
    calls: list[None] = []
    # A forward without gradients, as a teacher's, keeps nothing for backward.
    handle = model.register_forward_pre_hook(lambda *_: calls.append(None) if torch.is_grad_enabled() else None)
    try:
        with torch.enable_grad(), SavedActivations(model, memory="pruned", default=CHEAPEST) as saved:
            loss = loss_of(images)
            saved.ledger.trace = []
            torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            return saved.ledger.trace, len(calls) == 1
    finally:
        handle.remove()


def _outside(model: nn.Module, loss_of: Pass, parameters: Parameters, images: Tensor) -> int:
    """Bytes that a forward pass holds beside what the engine stores, such as for the loss."""
    with (
        torch.enable_grad(),
        MemoryMeter([*parameters.values(), images], model=model) as meter,
        SavedActivations(model, memory="pruned", default=CHEAPEST) as saved,
    ):
        loss = loss_of(images)
        held = round(meter.held_mib * MIB) - saved.held_bytes
        del loss
    return max(0, held)
