"""Uniform quantisation by channel: a * code + b."""

import torch
from torch import Tensor

from metaopt.activation_memory.byte_counter import ByteCounter
from metaopt.activation_memory.codes import Payload
from metaopt.activation_memory.layout import Layout

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.385, 5: 0.215, 6: 0.125, 7: 0.085, 8: 0.0493}
"""Bin widths in standard deviations, by bits.

Up to 3 bits the best uniform quantiser's of a normal distribution (Max 1960, "Quantizing for Minimum Distortion");
above, wider, since real activations have heavier tails.
"""

WIDTH = 1024  # of a row on which element-wise kernels are fast


class _AffineMap:
    """``factor * rows + shift`` for the rows of a physical view, by those kernels that are fast at it.

    Vectors along a narrow last dimension are repeated once: element-wise kernels are slow on short inner loops.
    """

    def __init__(self, factor: Tensor, shift: Tensor) -> None:
        self._factor, self._shift = factor, shift
        times = WIDTH // factor.shape[-1]
        self._wide: tuple[Tensor, Tensor] | None = None
        if times > 1 and factor.numel() == factor.shape[-1]:
            self._wide = factor.reshape(-1).repeat(times), shift.reshape(-1).repeat(times)

    def apply(self, rows: Tensor, part: slice, out: Tensor) -> Tensor:
        """Of the view's rows ``part``, into ``out``, which may be ``rows``; the result may have another shape."""
        if self._wide is not None and rows.is_contiguous() and rows.numel() % len(self._wide[0]) == 0:
            rows, out = (tensor.view(-1, len(self._wide[0])) for tensor in (rows, out))
            a, b = self._wide
        else:
            a, b = (operand if len(operand) == 1 else operand[part] for operand in (self._factor, self._shift))
        if a.shape[-1] == 1:  # torch's one kernel takes three times as long for what repeats along the last dimension
            return torch.mul(rows, a, out=out).add_(b)
        return torch.addcmul(b, rows, a, out=out)


class UniformCodes:
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
        to_code = _AffineMap(layout.physical(scale.reciprocal()), layout.physical(-low / scale))
        top, position = 2**bits - 0.5, 0
        # Allocated once: fresh memory for each piece would cost more than the arithmetic.
        size = max(piece.elements for piece in layout.pieces())
        floats = torch.empty(size, dtype=torch.promote_types(tensor.dtype, scale.dtype), device=tensor.device)
        integers = torch.empty(size, dtype=torch.int16, device=tensor.device)
        codes = torch.empty(size, dtype=torch.uint8, device=tensor.device)

        def codes_of(rows: Tensor) -> Tensor:
            nonlocal position
            part = slice(position, position + len(rows))
            position += len(rows)
            scaled = to_code.apply(rows, part, floats[: rows.numel()].view(rows.shape)).clamp_(0, top)
            # By way of int16: torch converts floats to bytes one at a time.
            whole = integers[: rows.numel()].copy_(scaled.view(-1))
            return codes[: rows.numel()].copy_(whole)

        self._payload = Payload(tensor, bits, codes_of, counter)
        self.offset, self.scale = (low + scale / 2, scale) if values is None else values

    def unpack(self) -> Tensor:
        """The values, in the tensor's own type."""
        return self.decode(self.offset, self.scale)

    def decode(self, offset: Tensor, scale: Tensor) -> Tensor:
        """``scale * code + offset`` with other numbers, which gives any affine function of the stored tensor."""
        layout = self._payload.layout
        result, physical = layout.empty(torch.promote_types(layout.dtype, scale.dtype))
        to_value = _AffineMap(layout.physical(scale), layout.physical(offset))
        for piece, codes in zip(layout.pieces(), self._payload.read(), strict=True):
            rows = physical[piece.rows]
            rows.copy_(codes.view(rows.shape))
            to_value.apply(rows, piece.rows, rows)
        return result.to(layout.dtype)


class Affine:
    """An affine function of stored codes, which costs nothing here; its sign is that of the tensor it stands for."""

    lossy = True

    def __init__(self, codes: UniformCodes, offset: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self._codes, self._offset, self._scale, self._dtype = codes, offset, scale, dtype

    def unpack(self) -> Tensor:
        """``scale * code + offset``."""
        return self._codes.decode(self._offset, self._scale).to(self._dtype)


def channels_of(tensor: Tensor) -> tuple[int, ...]:
    """The dimension along which entries are alike: 1 of maps, else the last.

    Four dimensions may be (B, C, H, W) or (B, H, W, C); the two equal ones, and the strides, tell.
    """
    if tensor.ndim != 4:
        return (tensor.ndim - 1,)
    if not tensor.is_contiguous():
        return (1,) if tensor.stride(1) == 1 else (3,)
    return (3,) if tensor.shape[1] == tensor.shape[2] != tensor.shape[3] else (1,)


def coded(tensor: Tensor, bits: int, channels: tuple[int, ...], counter: ByteCounter) -> UniformCodes:
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
            return UniformCodes(tensor, 1, scale, mean - scale, counter, (mean - half, 2 * half))
        reach = STEPS[bits] * 2 ** (bits - 1) * std
        low, high = torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)
    span = high - low
    scale = torch.where(span > 0, span * (1 + 1e-6) / 2**bits, torch.ones_like(span))
    # A constant channel comes back as it was.
    first = torch.where(span > 0, low + scale / 2, low)
    return UniformCodes(tensor, bits, scale, low, counter, (first, scale))
