r"""Normalisation layers: what is stored is the *normalised* activation, in codes whose range is known beforehand.

For x̂ = (x − μ)/σ with a bin width s and a lowest edge ℓ, both in units of x̂, the code of an entry is ⌊(x̂ − ℓ)/s⌋, and
backward gets x = μ + σ(ℓ + s(code + ½)), with torch's own kernel and its own μ and σ. Where a ReLU follows, entries
switch at x̂ = −β/γ; the bins are shifted, by half a bin at most, so that this is an edge, and the mask needs no bit of
its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.sparsity.codec import Affine, Codes, Derived, Stub
from metaopt.sparsity.store import SMALL, Call, Slot, Store

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.385, 5: 0.215, 6: 0.125, 7: 0.085, 8: 0.0493}
"""Bin widths in units of x̂, by bits.

Up to 3 bits the best uniform quantiser's of a normal distribution (Max 1960, "Quantizing for Minimum Distortion"); above,
wider, since real activations have heavier tails.
"""


class Grid(NamedTuple):
    """Bins of the normalised activation, one number a channel."""

    low: Tensor  # lower edge of the first bin
    step: Tensor  # width of a bin
    first: Tensor  # value that code 0 stands for
    between: Tensor  # distance between the values of neighbouring codes


def normal_grid(threshold: Tensor, bits: int) -> Grid:
    """Bins for a standard normal x̂, with ``threshold`` (C,) on an edge.

    A single bit stands for the normal distribution's means on either side.
    """
    if bits == 1:
        below = torch.special.ndtr(threshold).clamp(1e-6, 1 - 1e-6)
        density = torch.exp(-0.5 * threshold.square()) / (2 * torch.pi) ** 0.5
        first = torch.minimum(-density / below, threshold)
        between = torch.maximum(density / (1 - below), threshold) - first
        return Grid(threshold - 1, torch.ones_like(threshold), first, between)
    step = torch.full_like(threshold, STEPS[bits])
    low = -step * 2 ** (bits - 1)
    edge = ((threshold - low) / step).round()
    within = (edge >= 0) & (edge <= 2**bits)
    low = torch.where(within, threshold - edge * step, low)
    return Grid(low, step, low + step / 2, step)


def _columns(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped to broadcast along dimension 1."""
    return vector.view(1, -1, *[1] * (like.ndim - 2))


def batch_norm(store: Store, call: Call) -> str | None:
    """F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)."""
    x = call.get(0, "input")
    weight, bias, training = call.get(3, "weight"), call.get(4, "bias"), call.get(5, "training", False)
    slots = call.slots_of(x)
    if len(slots) != 1 or x.numel() < SMALL:
        return "batch_norm"
    if not training:
        return _running_batch_norm(store, call, slots[0])
    mean, rstd = _statistics(call, x.shape[1])
    if mean is None or rstd is None:
        return "batch_norm"
    scale = torch.ones_like(mean) if weight is None else weight.detach().to(mean.dtype, copy=True)
    shift = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype, copy=True)
    result = call.result
    if store.rate.bits >= 16:
        packed = store.any(slots[0].saved)
        slots[0].fill(packed)
        multiplier = _columns(scale * rstd, x)
        addend = _columns(shift - mean * scale * rstd, x)
        store.remember(result, Derived(lambda: packed.unpack().mul(multiplier).add_(addend), packed))
        return "batch_norm"
    threshold = torch.where(scale == 0, torch.zeros_like(scale), -shift / scale)
    grid = normal_grid(threshold, store.rate.bits)
    std = rstd.reciprocal()
    codes = Codes(
        slots[0].saved,
        store.rate.bits,
        _columns(grid.step * std, x),
        _columns(mean + grid.low * std, x),
        store.ledger,
        (_columns(mean + grid.first * std, x), _columns(grid.between * std, x)),
    )
    slots[0].fill(codes)
    offset, factor = _columns(shift + scale * grid.first, x), _columns(scale * grid.between, x)
    store.remember(result, Affine(codes, offset, factor))
    return "batch_norm"


def _statistics(call: Call, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """The batch's mean and reciprocal standard deviation, as the node saved them: its two last such vectors."""
    given = [call.get(position, name) for position, name in ((1, "running_mean"), (2, "running_var"), (3, "weight"))]
    vectors = [slot.saved for slot in call.open if slot.saved.shape == (channels,)]
    own = [vector for vector in vectors if not any(isinstance(t, Tensor) and t is vector for t in given)]
    own = [vector for vector in own if not any(isinstance(t, Tensor) and t.data_ptr() == vector.data_ptr() for t in given)]
    return (own[-2].detach(), own[-1].detach()) if len(own) >= 2 else (None, None)


def _running_batch_norm(store: Store, call: Call, slot: Slot) -> str:
    """With running statistics the input matters to the weight's gradient alone."""
    weight = call.get(3, "weight")
    if weight is None or not weight.requires_grad:
        slot.fill(Stub(slot.saved))
    return "batch_norm"


NORM_RULES: dict[Callable | None, Callable] = {functional.batch_norm: batch_norm, torch.batch_norm: batch_norm}
