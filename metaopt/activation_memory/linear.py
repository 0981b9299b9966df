"""Convolutions, linear layers, products and poolings: inputs are kept only where something learns from them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.activation_memory.codes import Bits, Integers
from metaopt.activation_memory.packs import Derived, Stub
from metaopt.activation_memory.store import SMALL, Call, Slot, Store


def convolution(store: Store, call: Call) -> str:
    """torch keeps the input also of a frozen weight; nothing reads its values then, in first and second order."""
    weight = call.get(1, "weight")
    for slot in call.slots_of(call.get(0, "input")):
        learns = isinstance(weight, Tensor) and weight.requires_grad
        slot.fill(store.codes(slot.saved, (1,)) if learns else Stub(slot.saved))
    return "convolution"


def product(store: Store, call: Call) -> str:
    """Products keep a factor where the other one learns: codes will do."""
    for slot in call.open:
        if slot.saved.is_floating_point():
            slot.fill(store.codes(slot.saved))
    return "product"


def pooling(store: Store, call: Call) -> str:
    """Of an average's input only the shape matters; of a maximum's, also where in its window it was."""
    images = call.get(0, "input")
    for slot in call.slots_of(images):
        slot.fill(Stub(slot.saved))
    for slot in call.open:
        if slot.saved.dtype == torch.int64 and slot.saved.numel() >= SMALL:
            _indices(store, call, slot, images)
    return "pooling"


def _pair(value: int | tuple[int, ...] | list[int] | None, default: tuple[int, int]) -> tuple[int, int]:
    if value is None or value == []:
        return default
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _indices(store: Store, call: Call, slot: Slot, images: Tensor) -> None:
    """Indices into the map, as places in the window: 4 bits for windows up to 4 by 4."""
    kernel = _pair(call.get(1, "kernel_size"), (1, 1))
    stride = _pair(call.get(2, "stride"), kernel)
    padding, dilation = _pair(call.get(3, "padding", 0), (0, 0)), _pair(call.get(4, "dilation", 1), (1, 1))
    places = ((kernel[0] - 1) * dilation[0] + 1) * ((kernel[1] - 1) * dilation[1] + 1)
    indices = slot.saved
    if indices.ndim < 3 or places > 256:
        return
    width, across = images.shape[-1], (kernel[1] - 1) * dilation[1] + 1
    rows = torch.arange(indices.shape[-2], device=indices.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(indices.shape[-1], device=indices.device) * stride[1] - padding[1]
    row = indices.div(width, rounding_mode="floor")
    offset = (row - rows) * across + (indices - row * width - columns)
    packed = Integers(offset, 0, places - 1, store.counter)

    def absolute() -> Tensor:
        offset = packed.unpack()
        row = offset.div(across, rounding_mode="floor")
        return (row + rows) * width + (offset - row * across + columns)

    slot.fill(Derived(absolute, packed))


def dropout(store: Store, call: Call) -> str:
    """The mask times 1 / (1 - p), as bits."""
    p = float(call.get(1, "p", 0.5))
    for slot in call.open:
        if p < 1 and slot.saved.is_floating_point() and slot.saved.numel() >= SMALL:
            slot.fill(Bits(slot.saved, lambda piece: piece.bool(), (0.0, 1 / (1 - p)), store.counter))
    return "dropout"


LINEAR_HANDLERS: dict[Callable | None, Callable] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), convolution),
    **dict.fromkeys((functional.linear, torch.bmm, Tensor.bmm, torch.einsum, torch.addmm, torch.baddbmm), product),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__), product),
    **dict.fromkeys((functional.avg_pool1d, functional.avg_pool2d, functional.adaptive_avg_pool2d), pooling),
    **dict.fromkeys((functional.adaptive_avg_pool1d, torch.max_pool2d, functional.max_pool2d), pooling),
    **dict.fromkeys((functional.dropout, torch.dropout, torch.dropout_), dropout),
}
