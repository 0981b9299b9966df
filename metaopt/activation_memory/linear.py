"""Convolutions, linear layers, products, poolings, dropout: inputs are kept only where something learns from them."""

import torch
from torch import Tensor

from metaopt.activation_memory.codes import integers, mask
from metaopt.activation_memory.packs import Derived, Stub
from metaopt.activation_memory.store import SMALL, Call, Slot, Store


def convolution(store: Store, call: Call) -> None:
    """torch keeps the input also of a frozen weight; nothing reads its values then, in first and second order."""
    weight = call.get(1, "weight")
    for slot in call.slots_of(call.get(0, "input")):
        learns = isinstance(weight, Tensor) and weight.requires_grad
        slot.fill(store.codes(slot.saved, (1,)) if learns else Stub(slot.saved))


def product(store: Store, call: Call) -> None:
    """Products keep a factor where the other one learns: codes will do."""
    for slot in call.open:
        if slot.saved.is_floating_point():
            slot.fill(store.codes(slot.saved))


def pooling(store: Store, call: Call) -> None:
    """Of an average's input only the shape matters; of a maximum's, also where in its window it was."""
    images = call.get(0, "input")
    for slot in call.slots_of(images):
        slot.fill(Stub(slot.saved))
    for slot in call.open:
        if slot.saved.dtype == torch.int64 and slot.saved.numel() >= SMALL:
            _fill_indices(store, call, slot, images)


def _pair(value: int | tuple[int, ...] | list[int] | None, default: tuple[int, int]) -> tuple[int, int]:
    if value is None or value == []:
        return default
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _fill_indices(store: Store, call: Call, slot: Slot, images: Tensor) -> None:
    """Indices into the map, as places in the window: 4 bits for windows up to 4 by 4."""
    kernel = _pair(call.get(1, "kernel_size"), (1, 1))
    stride = _pair(call.get(2, "stride"), kernel)
    padding, dilation = _pair(call.get(3, "padding", 0), (0, 0)), _pair(call.get(4, "dilation", 1), (1, 1))
    down, across = ((size - 1) * apart + 1 for size, apart in zip(kernel, dilation, strict=True))
    indices, width = slot.saved, images.shape[-1]
    if indices.ndim < 3 or down * across > 256:
        return
    rows = torch.arange(indices.shape[-2], device=indices.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(indices.shape[-1], device=indices.device) * stride[1] - padding[1]
    row = indices.div(width, rounding_mode="floor")
    offset = (row - rows) * across + (indices - row * width - columns)
    packed = integers(offset, 0, down * across - 1, store.counter)

    def absolute() -> Tensor:
        offset = packed.unpack()
        row = offset.div(across, rounding_mode="floor")
        return (row + rows) * width + (offset - row * across + columns)

    slot.fill(Derived(absolute, packed))


def dropout(store: Store, call: Call) -> None:
    """The mask times 1 / (1 - p), as bits."""
    p = float(call.get(1, "p", 0.5))
    for slot in call.open:
        if p < 1 and slot.saved.is_floating_point() and slot.saved.numel() >= SMALL:
            slot.fill(mask(slot.saved, store.counter, lambda piece: piece.bool(), (0.0, 1 / (1 - p))))
