"""How a tensor lies in memory, and its pieces in that order: what codecs walk over."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.activation_memory.bits import GROUP

CHUNK = 2**20
"""Elements that a codec handles at once: few enough for caches, and enough for several threads to share."""


class Piece(NamedTuple):
    """Some rows of the physical view, and where their codes lie."""

    rows: slice
    elements: int
    groups: int  # of `GROUP` codes, the last one padded
    first_group: int


@dataclass(frozen=True)
class Layout:
    """Shape, type and memory order of a tensor.

    The physical view is the tensor with its dimensions in the order in which they lie in memory, so that channels-last
    maps are walked through, and come back, as channels-last.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]  # dimensions from the slowest to the fastest
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """The layout of ``tensor``; memory that views skip is left out."""
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
        return cls(tuple(tensor.shape), order, tensor.dtype, tensor.device)

    def physical(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape, or one that broadcasts to it dimension by dimension, in memory order."""
        return tensor.permute(self.order)

    def empty(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A new tensor of this layout, and its physical view, which is contiguous."""
        physical = torch.empty([self.shape[dim] for dim in self.order], dtype=dtype or self.dtype, device=self.device)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return physical.permute(inverse), physical

    def pieces(self) -> Iterator[Piece]:
        """Runs of rows of about `CHUNK` elements."""
        rows = self.shape[self.order[0]]
        width = max(1, math.prod(self.shape) // max(1, rows))
        step = max(1, CHUNK // width)
        first_group = 0
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            elements = (stop - start) * width
            groups = -(-elements // GROUP)
            yield Piece(slice(start, stop), elements, groups, first_group)
            first_group += groups
