"""Small integers in few bits: b-bit codes as planes of 4, 2 and 1 bits.

A plane of width w holds 8 / w codes a byte: byte j keeps codes j, j + m, j + 2m, ... of the m bytes' worth, so that
packing and unpacking are a few element-wise operations on contiguous pieces, on any device. 3 bits are a plane of 2 and
one of 1, and so on; 8 bits are the codes themselves.
"""

from functools import cache

import torch
from torch import Tensor

GROUP = 8  # codes are packed in multiples of this many
WIDTHS = (4, 2, 1)  # of planes, in the order in which they lie


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes, rounded up to whole groups."""
    return -(-count // GROUP) * bits


def pack_codes(codes: Tensor, bits: int, out: Tensor, scratch: Tensor) -> None:
    """Write codes into ``out``.

    Args:
        codes: (8 m,) uint8, each below 2 ** bits.
        bits: 1 to 8.
        out: (m * bits,) uint8.
        scratch: (8 m,) uint8, overwritten: new memory would cost more than the arithmetic.
    """
    if bits == 8:
        out.copy_(codes)
        return
    groups, start, shift = codes.numel() // GROUP, 0, 0
    for width in WIDTHS:
        if not bits & width:
            continue
        part = codes if shift == 0 else torch.bitwise_right_shift(codes, shift, out=scratch)
        if bits & (width - 1):  # further planes follow
            part = torch.bitwise_and(part, 2**width - 1, out=scratch)
        plane = out[start : start + groups * width]
        pieces = part.view(GROUP // width, -1)
        plane.copy_(pieces[0])
        for index in range(1, GROUP // width):
            plane.add_(pieces[index], alpha=1 << (width * index))
        start, shift = start + groups * width, shift + width


def unpack_codes(packed: Tensor, bits: int, out: Tensor, scratch: Tensor) -> Tensor:
    """Inverse of :func:`pack_codes`: (m * bits,) uint8 to (8 m,) uint8, written to ``out`` where that is needed."""
    if bits == 8:
        return packed
    groups, start, shift = packed.numel() // bits, 0, 0
    for width in WIDTHS:
        if not bits & width:
            continue
        plane = packed[start : start + groups * width]
        part = scratch if shift else out
        torch.bitwise_right_shift(plane, _shifts(width, packed.device), out=part.view(GROUP // width, -1))
        part.bitwise_and_(2**width - 1)
        if shift:
            out.add_(part, alpha=1 << shift)
        start, shift = start + groups * width, shift + width
    return out


@cache
def _shifts(width: int, device: torch.device) -> Tensor:
    """By how much each of a byte's codes is shifted, (8 / width, 1)."""
    return torch.arange(0, GROUP, width, dtype=torch.uint8, device=device)[:, None]
