"""Sparsity: the entries farthest from their centre, a bit-packed mask of where they are, and nothing of the rest."""

import torch
from torch import Tensor

from metaopt.sparsity.codec import Half, Kept, Packed, Rate
from metaopt.sparsity.codes import Bits, coded
from metaopt.sparsity.layout import Layout
from metaopt.sparsity.ledger import Ledger

SAMPLE = 2**14
"""Entries that the threshold is found from."""


MARGIN = 0.012
"""Share of the entries by which a threshold from a sample misses at most: three standard errors."""


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
    band, above = flat[(flat > low) & (flat <= high)], int((flat > high).sum())
    rank = band.numel() - (most - above)  # of the largest entry that is left out
    if not 1 <= rank <= band.numel():
        band, rank = flat, flat.numel() - most
    return magnitudes > band.kthvalue(rank).values


class Sparse:
    """Entries of largest magnitude; the others come back as zero.

    Args:
        centred: a tensor whose entries' centre is zero.
        rate: share of the entries, and how their values are stored.
        ledger: counts the bytes.
    """

    lossy = True

    def __init__(self, centred: Tensor, rate: Rate, ledger: Ledger) -> None:
        self._layout = Layout.of(centred)
        self._mask: Bits | None = None
        self._values: Packed | None = None
        if rate.keep == 0.0:
            return
        physical = self._layout.physical(centred)
        magnitudes = physical.abs()
        mask = largest(magnitudes, rate.keep)
        self._mask = Bits(mask, lambda piece: piece, (0.0, 1.0), ledger)
        values = physical[mask]
        if rate.bits == 32:
            self._values = Kept(values, ledger)
        elif rate.bits == 16 or values.numel() == 0:
            self._values = Half(values, ledger) if values.numel() else Kept(values, ledger)
        else:
            self._values = coded(values, rate.bits, (), ledger)

    @property
    def nbytes(self) -> int:
        """A bit an entry and the codes of what is kept."""
        if self._mask is None or self._values is None:
            return 0
        return self._mask.nbytes + self._values.nbytes

    def unpack(self) -> Tensor:
        """What was kept, and zeros."""
        result, physical = self._layout.empty()
        physical.zero_()
        if self._mask is not None and self._values is not None:
            physical.masked_scatter_(self._mask.unpack(), self._values.unpack())
        return result
