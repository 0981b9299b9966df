"""Sparsity: the entries farthest from their centre, a bit-packed mask of where they are, and nothing of the rest."""

import numpy
import torch
from torch import Tensor

from metaopt.activation_memory.byte_counter import ByteCounter
from metaopt.activation_memory.codes import Payload
from metaopt.activation_memory.layout import Layout
from metaopt.activation_memory.packs import Derived, Packed, Plain, half
from metaopt.activation_memory.precision import Precision
from metaopt.activation_memory.uniform import coded

SAMPLE = 2**14  # entries that the threshold is found from
MARGIN = 0.012  # share of the entries by which such a threshold misses at most: three standard errors
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def largest(magnitudes: Tensor, keep: float) -> Tensor:
    """Mask of the share ``keep`` of the entries, rounded, that are largest; fewer where some are equal, never more.

    A sample of evenly spread entries tells in which narrow band the threshold lies: no sort over all.
    """
    flat = magnitudes.reshape(-1)
    most = min(round(keep * flat.numel()), flat.numel() - 1)
    # A stride without a common divisor with the usual sizes, so that no channel is left out.
    stride = max(1, flat.numel() // SAMPLE) | 1
    bounds = torch.tensor([1.0 - keep - MARGIN, 1.0 - keep + MARGIN], device=flat.device).clamp_(0.0, 1.0)
    low, high = torch.quantile(flat[::stride].float(), bounds).to(flat.dtype)
    above = selected(flat, flat > low)
    band = selected(above, above <= high)
    rank = above.numel() - most  # of the largest entry that is left out
    if not 1 <= rank <= band.numel():
        band, rank = flat, flat.numel() - most
    return magnitudes > band.kthvalue(rank).values


def selected(values: Tensor, mask: Tensor) -> Tensor:
    """``values[mask]``. On a CPU by NumPy, which takes a quarter of the time that torch's indexing does.

    Args:
        values: of any shape, whose own order is that of memory.
        mask: bool, of the same shape.
    """
    if values.device.type != "cpu":
        return values[mask]
    # As integers, for NumPy has no bfloat16.
    bare = values.detach().reshape(-1).view(INTEGERS[values.element_size()])
    return torch.from_numpy(numpy.compress(mask.reshape(-1).numpy(), bare.numpy())).view(values.dtype)


def sparse(centred: Tensor, precision: Precision, counter: ByteCounter) -> Derived:
    """The entries of largest magnitude; the others come back as zero.

    Args:
        centred: a tensor whose entries' centre is zero.
        precision: share of the entries, and how their values are stored.
        counter: counts the bytes.
    """
    layout = Layout.of(centred)
    if precision.keep == 0.0:
        return Derived(lambda: layout.empty()[0].zero_(), lossy=True)
    physical = layout.physical(centred)
    where = largest(physical.abs(), precision.keep)
    bits, kept = Payload(where, 1, lambda piece: piece.view(torch.uint8), counter), selected(physical, where)
    values: Packed
    if precision.bits == 32 or kept.numel() == 0 or (precision.bits == 16 and kept.element_size() <= 2):
        values = Plain(kept, counter)
    elif precision.bits == 16:
        values = half(kept, counter)
    else:
        values = coded(kept, precision.bits, (), counter)
    return Derived(lambda: _scattered(layout, bits, values.unpack()), lossy=True)


def _scattered(layout: Layout, where: Payload, values: Tensor) -> Tensor:
    """The values in their places, and zeros."""
    result, physical = layout.empty()
    physical.zero_()
    if values.device.type != "cpu":
        physical.masked_scatter_(where.decode(Tensor.copy_), values)
        return result
    # By position, in half the time, a piece at a time: positions take 8 bytes each.
    flat, start, taken = physical.view(-1), 0, 0
    for bits in where.read():
        positions = torch.from_numpy(numpy.flatnonzero(bits.view(torch.bool).numpy()))
        part = values[taken : taken + len(positions)]
        flat[start : start + len(bits)].scatter_(0, positions, part)
        start, taken = start + len(bits), taken + len(positions)
    return result
