"""Convolutions and poolings: their inputs are kept only where a weight learns from them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.sparsity.codec import Stub
from metaopt.sparsity.store import Call, Store


def convolution(store: Store, call: Call) -> str:
    """torch keeps the input also of a frozen weight; nothing reads its values then, in first and second order."""
    images, weight = call.get(0, "input"), call.get(1, "weight")
    if isinstance(weight, Tensor) and not weight.requires_grad:
        for slot in call.slots_of(images):
            slot.fill(Stub(slot.saved))
    return "convolution"


CONVOLUTION_RULES: dict[Callable | None, Callable] = {
    function: convolution
    for function in (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        functional.conv2d,
    )
}
