"""Tensors in few bits an entry: masks, integers, uniform codes per channel, and codes that index a table.

Tensors are walked through in the order in which they lie in memory, a piece at a time, so that temporaries stay in
cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metaopt.activation_memory.affine import Operands, affine
from metaopt.activation_memory.bits import GROUP, pack_codes, unpack_codes
from metaopt.activation_memory.byte_counter import ByteCounter, Hold
from metaopt.activation_memory.layout import Layout

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.385, 5: 0.215, 6: 0.125, 7: 0.085, 8: 0.0493}
"""Bin widths in standard deviations, by bits.

Up to 3 bits the best uniform quantiser's of a normal distribution (Max 1960, "Quantizing for Minimum Distortion");
above, wider, since real activations have heavier tails.
"""


class _Payload:
    """Codes of b bits and the layout that they are in."""

    __slots__ = ("_hold", "bits", "buffer", "layout")

    def __init__(self, layout: Layout, bits: int, counter: ByteCounter) -> None:
        self.layout, self.bits = layout, bits
        self.buffer = torch.empty(layout.groups * bits, dtype=torch.uint8, device=layout.device)
        self._hold: Hold = counter.hold(self.buffer)

    def write(self, codes_of: Callable[[Tensor], Tensor], tensor: Tensor) -> None:
        """Store ``codes_of(piece)``, uint8 of any shape, of each piece of ``tensor``'s physical view."""
        physical, scratch = self.layout.physical(tensor), self._memory()
        for piece in self.layout.pieces():
            codes = codes_of(physical[piece.start : piece.stop]).reshape(-1)
            if piece.elements % 8:
                codes = torch.nn.functional.pad(codes, (0, piece.groups * 8 - piece.elements))
            start = piece.first_group * self.bits
            packed = self.buffer[start : start + piece.groups * self.bits]
            pack_codes(codes, self.bits, packed, scratch[: len(codes)])

    def read(self) -> Iterator[Tensor]:
        """The codes of each piece, flat, in physical order; the next piece overwrites them."""
        codes, scratch = self._memory(), self._memory()
        for piece in self.layout.pieces():
            start, size = piece.first_group * self.bits, piece.groups * GROUP
            packed = self.buffer[start : start + piece.groups * self.bits]
            yield unpack_codes(packed, self.bits, codes[:size], scratch[:size])[: piece.elements]

    def _memory(self) -> Tensor:
        """For the codes of the largest piece. Fresh memory for each would cost more than the arithmetic."""
        most = max((piece.groups for piece in self.layout.pieces()), default=0) * GROUP
        return torch.empty(most, dtype=torch.uint8, device=self.layout.device)


class Bits:
    """A mask, one bit an entry; comes back as the two values given."""

    lossy = False

    def __init__(
        self, tensor: Tensor, test: Callable[[Tensor], Tensor], values: tuple[float, float], counter: ByteCounter
    ):
        self._payload = _Payload(Layout.of(tensor), 1, counter)
        self._values = values  # where the test fails, where it holds
        self._payload.write(lambda piece: test(piece).view(torch.uint8), tensor)

    @property
    def nbytes(self) -> int:
        """An eighth of a byte an entry."""
        return self._payload.buffer.numel()

    def pieces(self) -> Iterator[Tensor]:
        """The mask as zeros and ones in uint8, a piece at a time, flat, in the order of memory."""
        return self._payload.read()

    def unpack(self) -> Tensor:
        """One value or the other, in the tensor's own type."""
        low, high = self._values
        layout = self._payload.layout
        result, physical = layout.empty()
        flat = physical.view(-1)
        done = 0
        for bits in self.pieces():
            part = flat[done : done + bits.numel()]
            part.copy_(bits)
            if (low, high) != (0.0, 1.0):
                part.mul_(high - low).add_(low)
            done += bits.numel()
        return result


class Table:
    """Codes that index a table of values."""

    lossy = True

    def __init__(
        self, tensor: Tensor, bits: int, codes_of: Callable[[Tensor], Tensor], table: Tensor, counter: ByteCounter
    ) -> None:
        self._payload = _Payload(Layout.of(tensor), bits, counter)
        self._payload.write(codes_of, tensor.detach())
        self._table, self._hold = table, counter.hold(table)

    @property
    def nbytes(self) -> int:
        """b / 8 bytes an entry, and the table."""
        return self._payload.buffer.numel() + self._table.nbytes

    def unpack(self) -> Tensor:
        """The values that the codes stand for."""
        layout = self._payload.layout
        result, physical = layout.empty()
        flat, done = physical.view(-1), 0
        for codes in self._payload.read():
            part = flat[done : done + codes.numel()]
            torch.index_select(self._table, 0, codes.to(torch.int32), out=part)
            done += codes.numel()
        return result


class Integers:
    """Integers from ``low`` on, in the fewest bits."""

    lossy = False

    def __init__(self, tensor: Tensor, low: int, high: int, counter: ByteCounter) -> None:
        self._low = low
        self._dtype = tensor.dtype
        span = high - low
        if span < 256:
            bits = max(1, span.bit_length())
            self._payload = _Payload(Layout.of(tensor), bits, counter)
            self._payload.write(lambda piece: (piece - low).to(torch.uint8), tensor)
            self._buffer = self._payload.buffer
        else:
            self._payload = None
            narrow = torch.int16 if span < 2**16 else torch.int32
            # Centred, for both types are signed.
            self._low = low + (2**15 if narrow is torch.int16 else 0)
            self._buffer = (tensor - self._low).to(narrow)
            self._hold = counter.hold(self._buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed integers."""
        return self._buffer.untyped_storage().nbytes()

    def unpack(self) -> Tensor:
        """The integers in their own type."""
        if self._payload is None:
            return self._buffer.to(self._dtype).add_(self._low)
        result, physical = self._payload.layout.empty()
        flat, done = physical.view(-1), 0
        for codes in self._payload.read():
            flat[done : done + codes.numel()].copy_(codes)
            done += codes.numel()
        return result.add_(self._low)


class Codes:
    """Uniform codes: entry = scale * code + offset, both broadcast along the channels.

    Args:
        tensor: what is stored.
        bits: 1 to 8.
        scale: width of a bin, shaped to broadcast to the tensor dimension by dimension.
        low: lower edge of the first bin; values beyond the bins fall into the outermost.
        values: reconstruction of code 0 and the distance to that of code 1, where they are not the bins' centres.
    """

    lossy = True

    def __init__(
        self,
        tensor: Tensor,
        bits: int,
        scale: Tensor,
        low: Tensor,
        counter: ByteCounter,
        values: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        layout = Layout.of(tensor)
        self._payload = _Payload(layout, bits, counter)
        operands = Operands(layout.physical(scale.reciprocal()), layout.physical(-low / scale))
        top, position = 2**bits - 0.5, 0
        # Allocated once: fresh memory for each piece would cost more than the arithmetic.
        size = max(piece.elements for piece in layout.pieces())
        floats = torch.empty(size, dtype=torch.promote_types(tensor.dtype, scale.dtype), device=layout.device)
        integers = torch.empty(size, dtype=torch.int16, device=layout.device)
        codes = torch.empty(size, dtype=torch.uint8, device=layout.device)

        def codes_of(rows: Tensor) -> Tensor:
            nonlocal position
            part = slice(position, position + rows.shape[0])
            position += rows.shape[0]
            rows, a, b = operands.of(rows, part)
            scaled = floats[: rows.numel()].view(rows.shape)
            affine(rows, a, b, scaled).clamp_(0, top)
            # By way of int16: torch converts floats to bytes one at a time.
            whole = integers[: rows.numel()].copy_(scaled.view(-1))
            return codes[: rows.numel()].copy_(whole)

        self._payload.write(codes_of, tensor.detach())
        self.offset, self.scale = (low + scale / 2, scale) if values is None else values

    @property
    def nbytes(self) -> int:
        """b / 8 bytes an entry and two numbers a channel."""
        affine = (self.offset, self.scale)
        return self._payload.buffer.numel() + sum(tensor.numel() * tensor.element_size() for tensor in affine)

    def unpack(self) -> Tensor:
        """The values, in the tensor's own type."""
        return self.decode(self.offset, self.scale)

    def decode(self, offset: Tensor, scale: Tensor) -> Tensor:
        """``scale * code + offset`` with other numbers, which gives any affine function of the stored tensor."""
        layout = self._payload.layout
        result, physical = layout.empty(torch.promote_types(layout.dtype, scale.dtype))
        operands = Operands(layout.physical(scale), layout.physical(offset))
        for piece, codes in zip(layout.pieces(), self._payload.read(), strict=True):
            part = slice(piece.start, piece.stop)
            rows, a, b = operands.of(physical[part], part)
            rows.copy_(codes.view(rows.shape))
            affine(rows, a, b, rows)
        return result.to(layout.dtype)


class Affine:
    """An affine function of stored codes, which costs nothing here; its sign is that of the tensor it stands for."""

    lossy = True
    nbytes = 0

    def __init__(self, codes: Codes, offset: Tensor, scale: Tensor) -> None:
        self._codes, self._offset, self._scale = codes, offset, scale

    def unpack(self) -> Tensor:
        """``scale * code + offset``."""
        return self._codes.decode(self._offset, self._scale)


def channels_of(tensor: Tensor) -> tuple[int, ...]:
    """The dimension along which entries are alike: 1 of maps, else the last.

    Four dimensions may be (B, C, H, W) or (B, H, W, C); the two equal ones, and the strides, tell.
    """
    if tensor.ndim != 4:
        return (tensor.ndim - 1,)
    if not tensor.is_contiguous():
        return (1,) if tensor.stride(1) == 1 else (3,)
    return (3,) if tensor.shape[1] == tensor.shape[2] != tensor.shape[3] else (1,)


def coded(tensor: Tensor, bits: int, channels: tuple[int, ...], counter: ByteCounter) -> Codes:
    """Codes between each channel's least and largest entry; in few bits, within what suits a normal distribution."""
    values = tensor.detach()
    others = [dim for dim in range(tensor.ndim) if dim not in channels]
    low, high = values.amin(others, keepdim=True), values.amax(others, keepdim=True)
    if low.dtype in (torch.float16, torch.bfloat16):
        low, high = low.float(), high.float()
    if bits < 6:
        variance, mean = torch.var_mean(values.to(low.dtype), others, keepdim=True, correction=0)
        std = variance.sqrt()
        if bits == 1:
            half = std * (2 / torch.pi) ** 0.5  # the mean distance from the mean, of a normal distribution
            scale = torch.where(std > 0, std, torch.ones_like(std))
            return Codes(tensor, 1, scale, mean - scale, counter, (mean - half, 2 * half))
        reach = STEPS[bits] * 2 ** (bits - 1) * std
        low, high = torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)
    span = high - low
    scale = torch.where(span > 0, span * (1 + 1e-6) / 2**bits, torch.ones_like(span))
    # A constant channel comes back as it was.
    first = torch.where(span > 0, low + scale / 2, low)
    return Codes(tensor, bits, scale, low, counter, (first, scale))
