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

from metaopt.activation_memory.codes import lookup, mask
from metaopt.activation_memory.packs import Derived
from metaopt.activation_memory.store import SMALL, Call, Store
from metaopt.activation_memory.uniform import Affine

_aten = torch.ops.aten


def relu(store: Store, call: Call) -> None:
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
            slot.fill(mask(slot.saved, store.counter, lambda piece: piece.bool()))
    call.remember_result(store)


def _region(store: Store, call: Call, inside: Callable[[Tensor], Tensor], points: tuple[float, float]) -> None:
    """Backward asks only whether an entry is inside: one bit, which comes back as a point outside or one inside."""
    for slot in call.open:
        if slot.saved.is_floating_point() and slot.saved.numel() >= SMALL:
            slot.fill(mask(slot.saved, store.counter, inside, points))
    call.remember_result(store)


def hardtanh(store: Store, call: Call) -> None:
    """F.hardtanh(input, min_val, max_val), and F.relu6(input)."""
    low, high = float(call.get(1, "min_val", -1.0)), float(call.get(2, "max_val", 1.0))
    if call.function is functional.relu6:
        low, high = 0.0, 6.0
    _region(store, call, lambda piece: (piece > low) & (piece < high), (low - 1.0, (low + high) / 2))


def hardsigmoid(store: Store, call: Call) -> None:
    """F.hardsigmoid(input), which rises between -3 and 3."""
    _region(store, call, lambda piece: (piece > -3) & (piece < 3), (-4.0, 0.0))


def leaky_relu(store: Store, call: Call) -> None:
    """F.leaky_relu(input, negative_slope)."""
    _region(store, call, lambda piece: piece > 0, (-1.0, 1.0))


class Smooth(NamedTuple):
    """A smooth activation: its derivative, and the stretch on which that takes all its values, rising."""

    derivative: Callable[[Tensor], Tensor]
    start: float
    stop: float

    def __call__(self, store: Store, call: Call) -> None:
        """From what the input is known by, else the derivative's codes."""
        for slot in call.open:
            saved = slot.saved
            if saved.shape != call.result.shape or saved.numel() < SMALL or not saved.is_floating_point():
                continue
            if call.source is not None:
                slot.fill(call.source)
            elif store.precision.bits < 16:
                slot.fill(self._coded(saved, store))
        call.remember_result(store)

    def _coded(self, saved: Tensor, store: Store) -> Derived:
        bits = store.precision.bits
        points, least, step = _table(self, bits)

        def codes_of(piece: Tensor) -> Tensor:
            slope = self.derivative(piece.contiguous())
            return slope.sub_(least - step / 2).div_(step).clamp_(0, 2**bits - 0.5).to(torch.int32).to(torch.uint8)

        return lookup(saved, bits, codes_of, points.to(saved.device, saved.dtype), store.counter)


@cache
def _table(activation: Smooth, bits: int) -> tuple[Tensor, float, float]:
    """Points with evenly spaced derivatives, the least derivative, and the distance of neighbours."""
    points = torch.linspace(activation.start, activation.stop, 2**14, dtype=torch.float64)
    slopes = activation.derivative(points)
    least, step = float(slopes[0]), float(slopes[-1] - slopes[0]) / (2**bits - 1)
    wanted = least + step * torch.arange(2**bits, dtype=torch.float64)
    return points[torch.searchsorted(slopes, wanted).clamp(max=len(points) - 1)], least, step


def _slope(backward: Callable[..., Tensor], **named: object) -> Callable[[Tensor], Tensor]:
    """f′ by torch's own backward kernel, on a gradient of ones."""
    return lambda x: backward(torch.ones((), dtype=x.dtype, device=x.device).expand_as(x), x, **named)


_exact_gelu = Smooth(_slope(_aten.gelu_backward, approximate="none"), -(2**0.5), 2**0.5)
_tanh_gelu = Smooth(_slope(_aten.gelu_backward, approximate="tanh"), -1.4191, 1.4191)
silu = Smooth(_slope(_aten.silu_backward), -2.39936, 2.39936)
hardswish = Smooth(_slope(_aten.hardswish_backward), -2.99999, 2.99999)
mish = Smooth(_slope(_aten.mish_backward), -2.25586, 1.49049)


def gelu(store: Store, call: Call) -> None:
    """F.gelu(input, approximate): the exact function, or its approximation by tanh."""
    (_tanh_gelu if call.named.get("approximate", "none") == "tanh" else _exact_gelu)(store, call)


def by_result(store: Store, call: Call) -> None:
    """Sigmoid and tanh, whose derivative torch makes of the output, which lies between fixed bounds."""
    for slot in call.slots_of(call.result):
        slot.fill(store.codes(slot.saved))
