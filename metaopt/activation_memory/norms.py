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

from metaopt.activation_memory.codes import STEPS, Affine, Codes, coded
from metaopt.activation_memory.packs import Derived, Packed, Stub
from metaopt.activation_memory.sparse import Sparse
from metaopt.activation_memory.store import SMALL, Call, Slot, Store, same


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
    if len(slots) != 1 or x.numel() < SMALL or store.alive_anyway(slots[0].saved):
        return "batch_norm"
    if not training:
        return _running_batch_norm(store, call, slots[0])
    mean, rstd = _statistics(call, x.shape[1])
    if mean is None or rstd is None:
        return "batch_norm"
    scale = torch.ones_like(mean) if weight is None else weight.detach().to(mean.dtype, copy=True)
    shift = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype, copy=True)
    result = call.result
    if store.precision.keep < 1.0:
        slots[0].fill(_sparse(slots[0].saved, _columns(mean, x), _columns(rstd, x), store))
        return "batch_norm"
    if store.precision.bits >= 16:
        packed = store.any(slots[0].saved)
        slots[0].fill(packed)
        multiplier = _columns(scale * rstd, x)
        addend = _columns(shift - mean * scale * rstd, x)
        store.remember(result, Derived(lambda: packed.unpack().mul(multiplier).add_(addend), packed))
        return "batch_norm"
    threshold = torch.where(scale == 0, torch.zeros_like(scale), -shift / scale)
    grid = normal_grid(threshold, store.precision.bits)
    std = rstd.reciprocal()
    codes = Codes(
        slots[0].saved,
        store.precision.bits,
        _columns(grid.step * std, x),
        _columns(mean + grid.low * std, x),
        store.counter,
        (_columns(mean + grid.first * std, x), _columns(grid.between * std, x)),
    )
    slots[0].fill(codes)
    offset, factor = _columns(shift + scale * grid.first, x), _columns(scale * grid.between, x)
    store.remember(result, Affine(codes, offset, factor))
    return "batch_norm"


def _sparse(x: Tensor, mean: Tensor, rstd: Tensor, store: Store) -> Packed:
    """The largest |x̂|; what is missing comes back as x̂ = 0, the mean."""
    values, dtype = x.detach(), x.dtype
    packed = Sparse((values - mean).mul_(rstd), store.precision, store.counter)
    return Derived(lambda: packed.unpack().div_(rstd).add_(mean).to(dtype), packed)


def _statistics(call: Call, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """The batch's mean and reciprocal standard deviation, as the node saved them: its two last such vectors."""
    given = [call.get(position, name) for position, name in ((1, "running_mean"), (2, "running_var"), (3, "weight"))]
    vectors = [slot.saved for slot in call.open if slot.saved.shape == (channels,)]
    own = [vector for vector in vectors if not any(isinstance(t, Tensor) and same(vector, t) for t in given)]
    return (own[-2].detach(), own[-1].detach()) if len(own) >= 2 else (None, None)


def _running_batch_norm(store: Store, call: Call, slot: Slot) -> str:
    """With running statistics the input matters to the weight's gradient alone."""
    weight = call.get(3, "weight")
    if weight is None or not weight.requires_grad:
        slot.fill(Stub(slot.saved))
    else:
        slot.fill(store.codes(slot.saved, (1,)))
    return "batch_norm"


def layer_norm(store: Store, call: Call) -> str:
    """F.layer_norm(input, normalized_shape, weight, bias, eps): each token's own mean and deviation."""
    x = call.get(0, "input")
    slots = call.slots_like(x)
    if len(slots) == 1:
        tokens = x.shape[: x.ndim - len(tuple(call.get(1, "normalized_shape")))]
        rows = [slot.saved for slot in call.open if slot.saved.shape[: len(tokens)] == tokens and slot is not slots[0]]
        if len(rows) == 2:
            _normalised(store, call, slots[0], rows[0], rows[1], (x.ndim - 1,))
    return "layer_norm"


def group_norm(store: Store, call: Call) -> str:
    """F.group_norm(input, num_groups, weight, bias, eps): each image's mean and deviation in each group of channels."""
    x, groups = call.get(0, "input"), call.get(1, "num_groups")
    slots = call.slots_like(x)
    rows = [slot.saved for slot in call.open if slot.saved.shape == (x.shape[0], groups)]
    if len(slots) == 1 and len(rows) == 2:
        shape = (x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
        mean, rstd = (row.repeat_interleave(x.shape[1] // groups, dim=1).view(shape) for row in rows)
        _normalised(store, call, slots[0], mean, rstd, (1,))
    return "group_norm"


def _normalised(store: Store, call: Call, slot: Slot, mean: Tensor, rstd: Tensor, channels: tuple[int, ...]) -> None:
    """Store x̂ = (x − mean) · rstd, with a range a channel, and the output as known from it."""
    x = slot.saved.detach()
    weight, bias = call.get(2, "weight"), call.get(3, "bias")
    if x.numel() < SMALL or store.alive_anyway(slot.saved):
        return
    if store.precision.keep < 1.0:
        slot.fill(_sparse(slot.saved, mean.detach(), rstd.detach(), store))
        return
    if store.precision.bits >= 16:
        slot.fill(store.any(slot.saved))
        return
    mean, rstd = mean.detach(), rstd.detach()
    # In the tensor's own memory format, and in place: one temporary.
    codes = coded((x - mean).mul_(rstd), store.precision.bits, channels, store.counter)
    dtype = x.dtype
    slot.fill(Derived(lambda: codes.unpack().div_(rstd).add_(mean).to(dtype), codes))
    offset, scale = codes.offset, codes.scale
    for vector in (weight, bias):
        if vector is not None and vector.numel() != offset.numel():
            return  # an affine map that is finer than the codes' channels
    if weight is not None:
        factor = weight.detach().view(offset.shape)
        offset, scale = offset * factor, scale * factor
    if bias is not None:
        offset = offset + bias.detach().view(offset.shape)
    if call.result.dtype == dtype:
        store.remember(call.result, Affine(codes, offset, scale))


def rms_norm(store: Store, call: Call) -> str:
    """F.rms_norm(input, normalized_shape, weight, eps), which is made of smaller operators where it is not fused.

    Their nodes save x several times, x̂ = x / rms for the weight's gradient, and 1 / rms.
    """
    x = call.get(0, "input")
    rows = [slot.saved for slot in call.open if slot.saved.ndim == x.ndim and slot.saved.shape[-1] == 1]
    if x.shape[-1] == 1 or not rows or len(tuple(call.get(1, "normalized_shape"))) != 1:
        return "rms_norm"
    rstd = rows[0].detach()
    own, other = call.slots_of(x), [slot for slot in call.open if slot.saved.shape == x.shape]
    other = [slot for slot in other if slot not in own]
    if store.precision.bits >= 16 and store.precision.keep == 1.0:
        packed = store.any(own[0].saved) if own else None
        for slot in own:
            assert packed is not None
            slot.fill(packed)
        if packed is not None:
            for slot in other:
                slot.fill(Derived(lambda: packed.unpack() * rstd, packed))
        return "rms_norm"
    if not own or x.numel() < SMALL or store.alive_anyway(own[0].saved):
        return "rms_norm"
    normalised = own[0].saved.detach() * rstd
    if store.precision.keep < 1.0:
        codes = Sparse(normalised, store.precision, store.counter)
    else:
        codes = coded(normalised, store.precision.bits, (x.ndim - 1,), store.counter)
    for slot in own:
        slot.fill(Derived(lambda: codes.unpack().div_(rstd), codes))
    for slot in other:
        slot.fill(codes)
    return "rms_norm"


NORM_HANDLERS: dict[Callable | None, Callable] = {
    functional.batch_norm: batch_norm,
    torch.batch_norm: batch_norm,
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    functional.group_norm: group_norm,
    torch.group_norm: group_norm,
    functional.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}
