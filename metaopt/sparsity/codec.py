"""How one tensor is stored between forward and backward: the codecs, and the rate that chooses among them.

Every pack owns its buffers, says how many bytes they are, and gives the tensor back in its own shape, type and memory
format. Packs never change, so that one may serve several nodes and several backward passes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.sparsity.bits import pack_codes, packed_bytes, unpack_codes
from metaopt.sparsity.layout import Layout
from metaopt.sparsity.ledger import Hold, Ledger

CODE_BITS = tuple(range(1, 9))
ALLOWED_BITS = (*CODE_BITS, 16, 32)


@dataclass(frozen=True)
class Rate:
    """How finely one layer's activations are stored: one decision of two numbers.

    Bits per entry: 32 as they are, 16 as half floats, 8 to 1 as codes per channel; and the share of the entries that is
    kept, those farthest from the channel's centre.
    """

    bits: int = 32
    keep: float = 1.0

    def __post_init__(self) -> None:
        """Check both against their range."""
        if self.bits not in ALLOWED_BITS:
            raise ConfigError(f"a rate has bits={self.bits}; allowed are 1 to 8, 16 or 32: set for example bits=4")
        if not 0.0 <= self.keep <= 1.0:
            raise ConfigError(f"a rate has keep={self.keep}; allowed is 0 to 1: set for example keep=0.5")

    @property
    def lossless(self) -> bool:
        """Whether tensors are stored as they are."""
        return self.bits == 32 and self.keep == 1.0


class Packed(Protocol):
    """One stored tensor."""

    lossy: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its own buffers."""
        ...

    def unpack(self) -> Tensor:
        """The tensor, or what stands for it in backward."""
        ...


class Kept:
    """The tensor itself.

    Hooks switch off autograd's check for tensors that were changed in place after they were saved; it is made here.
    """

    lossy = False

    def __init__(self, tensor: Tensor, ledger: Ledger | None) -> None:
        # Detached: a saved output that still carries its grad_fn would keep its own node, and so itself, alive.
        self._tensor = tensor.detach()
        self._version = tensor._version
        self._hold = None if ledger is None else ledger.hold(tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, which views share; nothing for what is alive anyway."""
        return 0 if self._hold is None else self._tensor.untyped_storage().nbytes()

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place since.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that backward needs was changed in place after it was "
                f"saved (version {self._tensor._version}, saved at version {self._version}): change a clone instead"
            )
        return self._tensor


class Stub:
    """Stands for a tensor of which backward reads the shape and memory format alone."""

    lossy = False
    nbytes = 0

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._strides = tuple(tensor.shape), tensor.stride()
        self._options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}

    def unpack(self) -> Tensor:
        """Memory that nobody reads, in the strides that keep torch from copying it; zeros for second derivatives."""
        if torch.is_grad_enabled():
            return torch.zeros((), **self._options).expand(self._shape)
        return torch.empty_strided(self._shape, self._strides, **self._options)


class Half:
    """Half floats: float16 where the values fit, else bfloat16."""

    lossy = True

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        self._dtype = tensor.dtype
        low, high = torch.aminmax(tensor.detach())
        fits = bool(torch.maximum(-low, high) < torch.finfo(torch.float16).max)
        self._values = tensor.detach().to(torch.float16 if fits else torch.bfloat16)
        self._hold = ledger.hold(self._values)

    @property
    def nbytes(self) -> int:
        """Two bytes an element."""
        return self._values.untyped_storage().nbytes()

    def unpack(self) -> Tensor:
        """The values in their own type."""
        return self._values.to(self._dtype)


class _Payload:
    """Codes of b bits and the layout that they are in."""

    __slots__ = ("_hold", "bits", "buffer", "layout")

    def __init__(self, layout: Layout, bits: int, ledger: Ledger) -> None:
        self.layout, self.bits = layout, bits
        self.buffer = torch.empty(layout.groups * bits, dtype=torch.uint8, device=layout.device)
        self._hold: Hold = ledger.hold(self.buffer)

    def write(self, codes_of: Callable[[Tensor], Tensor], tensor: Tensor) -> None:
        """Store ``codes_of(piece)``, uint8 of any shape, of each piece of ``tensor``'s physical view."""
        physical = self.layout.physical(tensor)
        for piece in self.layout.pieces():
            codes = codes_of(physical[piece.start : piece.stop]).reshape(-1)
            if piece.elements % 8:
                codes = torch.nn.functional.pad(codes, (0, piece.groups * 8 - piece.elements))
            start = piece.first_group * self.bits
            pack_codes(codes, self.bits, self.buffer[start : start + piece.groups * self.bits])


    def read(self) -> Iterator[Tensor]:
        """The codes of each piece, flat, in physical order."""
        for piece in self.layout.pieces():
            start = piece.first_group * self.bits
            yield unpack_codes(self.buffer[start : start + piece.groups * self.bits], self.bits)[: piece.elements]


class Bits:
    """A mask, one bit an entry; comes back as the two values given."""

    lossy = False

    def __init__(self, tensor: Tensor, test: Callable[[Tensor], Tensor], values: tuple[float, float], ledger: Ledger):
        self._payload = _Payload(Layout.of(tensor), 1, ledger)
        self._values = values  # where the test fails, where it holds
        self._payload.write(lambda piece: test(piece).view(torch.uint8), tensor)

    @property
    def nbytes(self) -> int:
        """An eighth of a byte an entry."""
        return self._payload.buffer.numel()

    def unpack(self) -> Tensor:
        """One value or the other, in the tensor's own type."""
        low, high = self._values
        layout = self._payload.layout
        result, physical = layout.empty()
        flat = physical.view(-1)
        done = 0
        for bits in self._payload.read():
            part = flat[done : done + bits.numel()]
            part.copy_(bits)
            if (low, high) != (0.0, 1.0):
                part.mul_(high - low).add_(low)
            done += bits.numel()
        return result


def _cut(operand: Tensor, rows: slice) -> Tensor:
    """The rows of an operand that goes with some rows of a physical view."""
    return operand if operand.shape[0] == 1 else operand[rows]


def _widened(rows: Tensor, a: Tensor, b: Tensor, width: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """The same three, repeated along a narrow last dimension: element-wise kernels are slow on short inner loops."""
    channels = a.shape[-1]
    times = width // channels
    if times < 2 or a.numel() != channels or rows.numel() % (times * channels) or not rows.is_contiguous():
        return rows, a, b
    return rows.view(-1, times * channels), a.reshape(-1).repeat(times), b.reshape(-1).repeat(times)


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
        ledger: Ledger,
        values: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        layout = Layout.of(tensor)
        self._payload = _Payload(layout, bits, ledger)
        factor, shift = layout.physical(scale.reciprocal()), layout.physical(-low / scale)
        top, position = 2**bits - 0.5, 0
        # Allocated once: fresh memory for each piece would cost more than the arithmetic.
        size = max(piece.elements for piece in layout.pieces())
        floats = torch.empty(size, dtype=torch.promote_types(tensor.dtype, scale.dtype), device=layout.device)
        integers = torch.empty(size, dtype=torch.int32, device=layout.device)
        codes = torch.empty(size, dtype=torch.uint8, device=layout.device)

        def codes_of(rows: Tensor) -> Tensor:
            nonlocal position
            part = slice(position, position + rows.shape[0])
            position += rows.shape[0]
            rows, a, b = _widened(rows, _cut(factor, part), _cut(shift, part))
            scaled = floats[: rows.numel()].view(rows.shape)
            torch.addcmul(b, rows, a, out=scaled).clamp_(0, top)
            # By way of int32: torch converts floats to bytes one at a time.
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
        scale, offset = layout.physical(scale), layout.physical(offset)
        for piece, codes in zip(layout.pieces(), self._payload.read(), strict=True):
            part = slice(piece.start, piece.stop)
            rows, a, b = _widened(physical[part], _cut(scale, part), _cut(offset, part))
            rows.copy_(codes.view(rows.shape))
            torch.addcmul(b, rows, a, out=rows)
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


class Derived:
    """What is computed from other packs, which cost nothing here."""

    nbytes = 0

    def __init__(self, compute: Callable[[], Tensor], *parents: Packed, lossy: bool | None = None) -> None:
        self._compute, self._parents = compute, parents
        self.lossy = any(parent.lossy for parent in parents) if lossy is None else lossy

    def unpack(self) -> Tensor:
        """Compute it again."""
        with torch.no_grad():
            return self._compute()


class Table:
    """Codes that index a table of values."""

    lossy = True

    def __init__(
        self, tensor: Tensor, bits: int, codes_of: Callable[[Tensor], Tensor], table: Tensor, ledger: Ledger
    ) -> None:
        self._payload = _Payload(Layout.of(tensor), bits, ledger)
        self._payload.write(codes_of, tensor.detach())
        self._table = table

    @property
    def nbytes(self) -> int:
        """b / 8 bytes an entry."""
        return self._payload.buffer.numel()

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

    def __init__(self, tensor: Tensor, low: int, high: int, ledger: Ledger) -> None:
        self._low = low
        self._dtype = tensor.dtype
        span = high - low
        if span < 256:
            bits = max(1, span.bit_length())
            self._payload = _Payload(Layout.of(tensor), bits, ledger)
            self._payload.write(lambda piece: (piece - low).to(torch.uint8), tensor)
            self._buffer = self._payload.buffer
        else:
            self._payload = None
            narrow = torch.int16 if span < 2**16 else torch.int32
            # Centred, for both types are signed.
            self._low = low + (2**15 if narrow is torch.int16 else 0)
            self._buffer = (tensor - self._low).to(narrow)
            self._hold = ledger.hold(self._buffer)

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


def affine_bytes(numel: int, channels: int, rate: Rate) -> int:
    """Bytes of a float32 tensor of ``numel`` entries in ``channels`` channels at a rate."""
    if rate.bits >= 16:
        values = numel * rate.bits // 8
        return values if rate.keep == 1.0 else round(values * rate.keep) + packed_bytes(numel, 1)
    kept = numel if rate.keep == 1.0 else round(numel * rate.keep)
    mask = 0 if rate.keep == 1.0 else packed_bytes(numel, 1)
    return packed_bytes(kept, rate.bits) + mask + 2 * 4 * channels
