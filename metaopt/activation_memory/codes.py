"""Tensors as small integers in few bits an entry: masks, integers, and codes that index a table.

Tensors are walked through in the order in which they lie in memory, a piece at a time, so that temporaries stay in
cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metaopt.activation_memory.bits import GROUP, pack_codes, unpack_codes
from metaopt.activation_memory.byte_counter import ByteCounter, Hold
from metaopt.activation_memory.layout import Layout
from metaopt.activation_memory.packs import Derived


class Payload:
    """Codes of ``bits`` bits for the entries of ``tensor``: ``codes_of(piece)``, uint8, of each physical piece."""

    __slots__ = ("_hold", "bits", "buffer", "layout")

    def __init__(self, tensor: Tensor, bits: int, codes_of: Callable[[Tensor], Tensor], counter: ByteCounter) -> None:
        self.layout, self.bits = Layout.of(tensor), bits
        groups = sum(piece.groups for piece in self.layout.pieces())
        self.buffer = torch.empty(groups * bits, dtype=torch.uint8, device=tensor.device)
        self._hold: Hold = counter.hold(self.buffer)
        physical, scratch = self.layout.physical(tensor.detach()), self._memory()
        for piece in self.layout.pieces():
            codes = codes_of(physical[piece.rows]).reshape(-1)
            if piece.elements % GROUP:
                codes = torch.nn.functional.pad(codes, (0, piece.groups * GROUP - piece.elements))
            start = piece.first_group * bits
            pack_codes(codes, bits, self.buffer[start : start + piece.groups * bits], scratch[: len(codes)])

    def read(self) -> Iterator[Tensor]:
        """The codes of each piece, flat, in physical order; the next piece overwrites them."""
        codes, scratch = self._memory(), self._memory()
        for piece in self.layout.pieces():
            start, size = piece.first_group * self.bits, piece.groups * GROUP
            packed = self.buffer[start : start + piece.groups * self.bits]
            yield unpack_codes(packed, self.bits, codes[:size], scratch[:size])[: piece.elements]

    def decode(self, write: Callable[[Tensor, Tensor], object]) -> Tensor:
        """A tensor of the layout, made by ``write(part, codes)`` of each flat part."""
        result, physical = self.layout.empty()
        flat, done = physical.view(-1), 0
        for codes in self.read():
            write(flat[done : done + len(codes)], codes)
            done += len(codes)
        return result

    def _memory(self) -> Tensor:
        """For the codes of the largest piece. Fresh memory for each would cost more than the arithmetic."""
        most = max((piece.groups for piece in self.layout.pieces()), default=0) * GROUP
        return torch.empty(most, dtype=torch.uint8, device=self.layout.device)


def mask(
    tensor: Tensor,
    counter: ByteCounter,
    test: Callable[[Tensor], Tensor] = lambda piece: piece,
    values: tuple[float, float] = (0.0, 1.0),
) -> Derived:
    """One bit an entry; comes back as the two values given: where the test fails, and where it holds."""
    payload = Payload(tensor, 1, lambda piece: test(piece).view(torch.uint8), counter)
    low, high = values
    if values == (0.0, 1.0):
        return Derived(lambda: payload.decode(Tensor.copy_))
    return Derived(lambda: payload.decode(lambda part, bits: part.copy_(bits).mul_(high - low).add_(low)))


def lookup(
    tensor: Tensor, bits: int, codes_of: Callable[[Tensor], Tensor], table: Tensor, counter: ByteCounter
) -> Derived:
    """Codes that index a table of values."""
    payload = Payload(tensor, bits, codes_of, counter)

    def write(part: Tensor, codes: Tensor) -> None:
        torch.index_select(table, 0, codes.to(torch.int32), out=part)

    return Derived(lambda: payload.decode(write), lossy=True, hold=counter.hold(table))


def integers(tensor: Tensor, low: int, high: int, counter: ByteCounter) -> Derived:
    """Integers from ``low`` to ``high``, in the fewest bits."""
    dtype, span = tensor.dtype, high - low
    if span < 256:
        bits = max(1, span.bit_length())
        payload = Payload(tensor, bits, lambda piece: (piece - low).to(torch.uint8), counter)
        return Derived(lambda: payload.decode(Tensor.copy_).add_(low))
    # Centred, for both types are signed.
    narrow, centre = (torch.int16, low + 2**15) if span < 2**16 else (torch.int32, low)
    values = (tensor - centre).to(narrow)
    return Derived(lambda: values.to(dtype).add_(centre), hold=counter.hold(values))
