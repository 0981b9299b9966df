r"""Activation functions: of most of them backward needs a bit an entry, of the smooth ones the derivative in a few.

A smooth activation f has a bounded derivative, which is all that backward makes of the stored input: dx = f′(x) dy. So
the derivative is what is coded, between its least and largest value; and since torch's kernel wants an input, backward
gets for each code one fixed point at which f′ has the coded value. For GELU, SiLU and their kin f′ takes each of its
values on the stretch between its minimum and its maximum, where it is monotone.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.activation_memory.codes import Affine, Bits, Table
from metaopt.activation_memory.packs import Derived, Packed
from metaopt.activation_memory.store import SMALL, Call, Store

_aten = torch.ops.aten


def relu(store: Store, call: Call) -> str:
    """The mask: from how the normalised activation right before it is stored, else one bit an entry.

    Codes have a bin's edge where the sign changes, and what is lossless tells it too; half floats would not.
    """
    for slot in call.slots_of(call.result):
        if slot.saved.numel() < SMALL:
            continue
        if call.source is not None and (isinstance(call.source, Affine) or not call.source.lossy):
            slot.fill(call.source)
        else:
            # The result is never negative; and not zero is several times as fast a test as greater than zero.
            slot.fill(Bits(slot.saved, lambda piece: piece.bool(), (0.0, 1.0), store.counter))
    _remember(store, call)
    return "relu"


def _remember(store: Store, call: Call) -> None:
    """Where the input can be computed, so can the output."""
    source, function, rest, named = call.source, call.function, call.arguments[1:], dict(call.named)
    if source is None or function is None or not isinstance(call.result, Tensor):
        return
    named.pop("input", None)
    store.remember(call.result, Derived(lambda: function(source.unpack(), *rest, **named), source))


class Region(NamedTuple):
    """Backward asks only whether an entry lies within a region: the test, and a point outside of it and one inside."""

    kind: str
    test: Callable[[Call], Callable[[Tensor], Tensor]]
    points: Callable[[Call], tuple[float, float]]

    def __call__(self, store: Store, call: Call) -> str:
        """One bit an entry."""
        for slot in call.open:
            if slot.saved.is_floating_point() and slot.saved.numel() >= SMALL:
                slot.fill(Bits(slot.saved, self.test(call), self.points(call), store.counter))
        _remember(store, call)
        return self.kind


def _hardtanh_bounds(call: Call) -> tuple[float, float]:
    if call.function in (functional.relu6, torch.nn.functional.relu6):
        return 0.0, 6.0
    return float(call.get(1, "min_val", -1.0)), float(call.get(2, "max_val", 1.0))


def _between(call: Call) -> Callable[[Tensor], Tensor]:
    low, high = _hardtanh_bounds(call)
    return lambda piece: (piece > low) & (piece < high)


def _bound_points(call: Call) -> tuple[float, float]:
    low, high = _hardtanh_bounds(call)
    return low - 1.0, (low + high) / 2


hardtanh = Region("hardtanh", _between, _bound_points)
hardsigmoid = Region("hardsigmoid", lambda _: lambda piece: (piece > -3) & (piece < 3), lambda _: (-4.0, 0.0))
leaky_relu = Region("leaky_relu", lambda _: lambda piece: piece > 0, lambda _: (-1.0, 1.0))


class Smooth(NamedTuple):
    """A smooth activation: its derivative, and the stretch on which that takes all its values, rising."""

    kind: str
    derivative: Callable[[Tensor], Tensor]
    start: float
    stop: float

    def table(self, bits: int) -> tuple[Tensor, float, float]:
        """Points with evenly spaced derivatives, the least derivative, and the distance of neighbours."""
        points = torch.linspace(self.start, self.stop, 2**14, dtype=torch.float64)
        slopes = self.derivative(points)
        least, step = float(slopes[0]), float(slopes[-1] - slopes[0]) / (2**bits - 1)
        wanted = least + step * torch.arange(2**bits, dtype=torch.float64)
        return points[torch.searchsorted(slopes, wanted).clamp(max=len(points) - 1)], least, step

    def __call__(self, store: Store, call: Call) -> str:
        """From what the input is known by, else the derivative's codes."""
        for slot in call.open:
            saved = slot.saved
            if saved.shape != call.result.shape or saved.numel() < SMALL or not saved.is_floating_point():
                continue
            if call.source is not None:
                slot.fill(call.source)
            elif store.precision.bits < 16:
                slot.fill(self._coded(saved, store))
        _remember(store, call)
        return self.kind

    def _coded(self, saved: Tensor, store: Store) -> Packed:
        bits = store.precision.bits
        points, least, step = _table(self, bits)

        def codes_of(piece: Tensor) -> Tensor:
            slope = self.derivative(piece.contiguous())
            return slope.sub_(least - step / 2).div_(step).clamp_(0, 2**bits - 0.5).to(torch.int32).to(torch.uint8)

        return Table(saved, bits, codes_of, points.to(saved.device, saved.dtype), store.counter)


@cache
def _table(activation: Smooth, bits: int) -> tuple[Tensor, float, float]:
    return activation.table(bits)


def _slope(backward: Callable[..., Tensor], *more: object, **named: object) -> Callable[[Tensor], Tensor]:
    """f′ by torch's own backward kernel, on a gradient of ones."""
    return lambda x: backward(torch.ones((), dtype=x.dtype, device=x.device).expand_as(x), x, *more, **named)


gelu = Smooth("gelu", _slope(_aten.gelu_backward, approximate="none"), -(2**0.5), 2**0.5)
gelu_tanh = Smooth("gelu", _slope(_aten.gelu_backward, approximate="tanh"), -1.4191, 1.4191)
silu = Smooth("silu", _slope(_aten.silu_backward), -2.39936, 2.39936)
hardswish = Smooth("hardswish", _slope(_aten.hardswish_backward), -2.99999, 2.99999)
mish = Smooth("mish", _slope(_aten.mish_backward), -2.25586, 1.49049)


def any_gelu(store: Store, call: Call) -> str:
    """F.gelu(input, approximate): the exact function, or its approximation by tanh."""
    return (gelu_tanh if call.named.get("approximate", "none") == "tanh" else gelu)(store, call)


def by_result(store: Store, call: Call) -> str:
    """Sigmoid and tanh, whose derivative torch makes of the output, which lies between fixed bounds."""
    for slot in call.slots_of(call.result):
        slot.fill(store.codes(slot.saved))
    return "sigmoid"


ACTIVATION_HANDLERS: dict[Callable | None, Callable] = {
    **dict.fromkeys((functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), relu),
    **dict.fromkeys((functional.relu6, functional.hardtanh, functional.hardtanh_), hardtanh),
    functional.hardsigmoid: hardsigmoid,
    **dict.fromkeys((functional.leaky_relu, functional.leaky_relu_), leaky_relu),
    functional.gelu: any_gelu,
    functional.silu: silu,
    functional.hardswish: hardswish,
    functional.mish: mish,
    **dict.fromkeys((functional.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_), by_result),
    **dict.fromkeys((functional.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_), by_result),
}
