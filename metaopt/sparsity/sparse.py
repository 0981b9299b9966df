"""Sparsity: the entries farthest from their centre, a bit-packed mask of where they are, and nothing of the rest."""

import torch
from torch import Tensor

from metaopt.sparsity.codec import Half, Kept, Packed, Rate
from metaopt.sparsity.codes import Bits, coded
from metaopt.sparsity.layout import Layout
from metaopt.sparsity.ledger import Ledger

SAMPLE = 2**14
"""Entries that the threshold is found from."""


def sampled_threshold(magnitudes: Tensor, keep: float) -> Tensor:
    """The value that a share ``keep`` of the entries exceed, estimated on evenly spread entries: no sort over all.

    The standard error of the share is below 0.4 % of the entries.
    """
    flat = magnitudes.reshape(-1)
    # A stride without a common divisor with the usual sizes, so that no channel is left out.
    stride = max(1, flat.numel() // SAMPLE) | 1
    return torch.quantile(flat[::stride].float(), 1.0 - keep).to(magnitudes.dtype)


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
        mask = magnitudes > sampled_threshold(magnitudes, rate.keep)
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
