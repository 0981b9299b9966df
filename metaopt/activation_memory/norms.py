r"""Normalisation layers: what is stored is the *normalised* activation, in codes whose range is known beforehand.

For x̂ = (x − μ)/σ with a bin width s and a lowest edge ℓ, both in units of x̂, the code of an entry is ⌊(x̂ − ℓ)/s⌋, and
backward gets x = μ + σ(ℓ + s(code + ½)), with torch's own kernel and its own μ and σ. Where a ReLU follows, entries
switch at x̂ = −β/γ; the bins are shifted, by half a bin at most, so that this is an edge, and the mask needs no bit of
its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.activation_memory.packs import Derived, Packed, Stub
from metaopt.activation_memory.sparse import sparse
from metaopt.activation_memory.store import SMALL, Call, Slot, Store, same
from metaopt.activation_memory.uniform import STEPS, Affine, UniformCodes, coded


class _Grid(NamedTuple):
    """Bins of the normalised activation, one number a channel."""

    low: Tensor  # lower edge of the first bin
    step: Tensor  # width of a bin
    first: Tensor  # value that code 0 stands for
    between: Tensor  # distance between the values of neighbouring codes


def _normal_grid(threshold: Tensor, bits: int) -> _Grid:
    """Bins for a standard normal x̂, with ``threshold`` (C,) on an edge.

    A single bit stands for the normal distribution's means on either side.
    """
    if bits == 1:
        below = torch.special.ndtr(threshold).clamp(1e-6, 1 - 1e-6)
        density = torch.exp(-0.5 * threshold.square()) / (2 * torch.pi) ** 0.5
        first = torch.minimum(-density / below, threshold)
        between = torch.maximum(density / (1 - below), threshold) - first
        return _Grid(threshold - 1, torch.ones_like(threshold), first, between)
    step = torch.full_like(threshold, STEPS[bits])
    low = -step * 2 ** (bits - 1)
    edge = ((threshold - low) / step).round()
    within = (edge >= 0) & (edge <= 2**bits)
    low = torch.where(within, threshold - edge * step, low)
    return _Grid(low, step, low + step / 2, step)


def batch_norm(store: Store, call: Call) -> None:
    """F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)."""
    x, weight, bias = call.get(0, "input"), call.get(3, "weight"), call.get(4, "bias")
    slots = call.slots_of(x)
    if len(slots) != 1 or x.numel() < SMALL or store.alive_anyway(slots[0].saved):
        return
    slot, saved = slots[0], slots[0].saved
    if not call.get(5, "training", False):
        # With running statistics the input matters to the weight's gradient alone.
        learns = weight is not None and weight.requires_grad
        slot.fill(store.codes(saved, (1,)) if learns else Stub(saved))
        return
    statistics = _statistics(call, x.shape[1])
    if statistics is None:
        return
    mean, rstd = statistics
    gamma = torch.ones_like(mean) if weight is None else weight.detach().to(mean.dtype, copy=True)
    beta = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype, copy=True)

    def columns(vector: Tensor) -> Tensor:
        return vector.view(1, -1, *[1] * (x.ndim - 2))

    if store.precision.keep < 1.0:
        slot.fill(_sparse(saved, columns(mean), columns(rstd), store))
    elif store.precision.bits >= 16:
        packed = slot.fill(store.any(saved))
        factor, addend = columns(gamma * rstd), columns(beta - mean * gamma * rstd)
        dtype = call.result.dtype
        store.remember(call.result, Derived(lambda: packed.unpack().mul(factor).add_(addend).to(dtype), packed))
    else:
        grid = _normal_grid(torch.where(gamma == 0, torch.zeros_like(gamma), -beta / gamma), store.precision.bits)
        std = rstd.reciprocal()
        bins = columns(grid.step * std), columns(mean + grid.low * std)
        values = columns(mean + grid.first * std), columns(grid.between * std)
        codes = slot.fill(UniformCodes(saved, store.precision.bits, *bins, store.counter, values))
        offset, scale = columns(beta + gamma * grid.first), columns(gamma * grid.between)
        store.remember(call.result, Affine(codes, offset, scale, call.result.dtype))


def _sparse(x: Tensor, mean: Tensor, rstd: Tensor, store: Store) -> Packed:
    """The largest |x̂|; what is missing comes back as x̂ = 0, the mean."""
    values, dtype = x.detach(), x.dtype
    packed = sparse((values - mean).mul_(rstd), store.precision, store.counter)
    return Derived(lambda: packed.unpack().div_(rstd).add_(mean).to(dtype), packed)


def _statistics(call: Call, channels: int) -> tuple[Tensor, Tensor] | None:
    """The batch's mean and reciprocal standard deviation, as the node saved them: its two last such vectors."""
    given = [call.get(position, name) for position, name in ((1, "running_mean"), (2, "running_var"), (3, "weight"))]
    vectors = [slot.saved for slot in call.open if slot.saved.shape == (channels,)]
    own = [vector for vector in vectors if not any(isinstance(t, Tensor) and same(vector, t) for t in given)]
    return (own[-2].detach(), own[-1].detach()) if len(own) >= 2 else None


def layer_norm(store: Store, call: Call) -> None:
    """F.layer_norm(input, normalized_shape, weight, bias, eps): each token's own mean and deviation."""
    x = call.get(0, "input")
    slots = call.slots_like(x)
    if len(slots) == 1:
        tokens = x.shape[: x.ndim - len(tuple(call.get(1, "normalized_shape")))]
        rows = [slot.saved for slot in call.open if slot.saved.shape[: len(tokens)] == tokens and slot is not slots[0]]
        if len(rows) == 2:
            _fill_normalised(store, call, slots[0], rows[0].detach(), rows[1].detach(), (x.ndim - 1,))


def group_norm(store: Store, call: Call) -> None:
    """F.group_norm(input, num_groups, weight, bias, eps): each image's mean and deviation in each group of channels."""
    x, groups = call.get(0, "input"), call.get(1, "num_groups")
    slots = call.slots_like(x)
    rows = [slot.saved for slot in call.open if slot.saved.shape == (x.shape[0], groups)]
    if len(slots) == 1 and len(rows) == 2:
        shape = (x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
        mean, rstd = (row.detach().repeat_interleave(x.shape[1] // groups, dim=1).view(shape) for row in rows)
        _fill_normalised(store, call, slots[0], mean, rstd, (1,))


def _fill_normalised(
    store: Store, call: Call, slot: Slot, mean: Tensor, rstd: Tensor, channels: tuple[int, ...]
) -> None:
    """Store x̂ = (x − mean) · rstd, with a range a channel, and the output as known from it."""
    x = slot.saved.detach()
    if x.numel() < SMALL or store.alive_anyway(slot.saved):
        return
    if store.precision.keep < 1.0:
        slot.fill(_sparse(slot.saved, mean, rstd, store))
        return
    if store.precision.bits >= 16:
        slot.fill(store.any(slot.saved))
        return
    # In the tensor's own memory format, and in place: one temporary.
    codes = coded((x - mean).mul_(rstd), store.precision.bits, channels, store.counter)
    dtype, offset, scale = x.dtype, codes.offset, codes.scale
    slot.fill(Derived(lambda: codes.unpack().div_(rstd).add_(mean).to(dtype), codes))
    weight, bias = call.get(2, "weight"), call.get(3, "bias")
    if any(vector is not None and vector.numel() != offset.numel() for vector in (weight, bias)):
        return  # an affine map that is finer than the codes' channels
    if weight is not None:
        factor = weight.detach().view(offset.shape)
        offset, scale = offset * factor, scale * factor
    if bias is not None:
        offset = offset + bias.detach().view(offset.shape)
    if call.result.dtype == dtype:
        store.remember(call.result, Affine(codes, offset, scale, dtype))


def rms_norm(store: Store, call: Call) -> None:
    """F.rms_norm(input, normalized_shape, weight, eps), which is made of smaller operators where it is not fused.

    Their nodes save x several times, x̂ = x / rms for the weight's gradient, and 1 / rms.
    """
    x, own = call.get(0, "input"), call.slots_of(call.get(0, "input"))
    rows = [slot.saved for slot in call.open if slot.saved.ndim == x.ndim and slot.saved.shape[-1] == 1]
    if not own or not rows or x.shape[-1] == 1 or len(tuple(call.get(1, "normalized_shape"))) != 1:
        return
    saved, rstd = own[0].saved, rows[0].detach()
    other = [slot for slot in call.open if slot.saved.shape == x.shape and slot not in own]
    packed: Packed
    normalised: Packed
    if store.precision.bits >= 16 and store.precision.keep == 1.0:
        packed = store.any(saved)
        normalised = Derived(lambda: packed.unpack() * rstd, packed)
    elif x.numel() < SMALL or store.alive_anyway(saved):
        return
    else:
        if store.precision.keep < 1.0:
            normalised = sparse(saved.detach() * rstd, store.precision, store.counter)
        else:
            normalised = coded(saved.detach() * rstd, store.precision.bits, (x.ndim - 1,), store.counter)
        packed = Derived(lambda: normalised.unpack().div_(rstd), normalised)
    for slot in own:
        slot.fill(packed)
    for slot in other:
        slot.fill(normalised)
