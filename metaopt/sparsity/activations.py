"""Activation functions: of most of them backward needs a bit an entry."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.sparsity.codec import Affine, Bits, Derived
from metaopt.sparsity.store import SMALL, Call, Store


def relu(store: Store, call: Call) -> str:
    """The mask: from the codes of a normalised activation right before it, else one bit an entry."""
    source = call.source
    for slot in call.slots_of(call.result):
        if slot.saved.numel() < SMALL:
            continue
        if isinstance(source, Affine):
            slot.fill(source)
        else:
            # The result is never negative; and not zero is several times as fast a test as greater than zero.
            slot.fill(Bits(slot.saved, lambda piece: piece.bool(), (0.0, 1.0), store.ledger))
    if source is not None:
        store.remember(call.result, Derived(lambda: source.unpack().relu_(), source))
    return "relu"


ACTIVATION_RULES: dict[Callable | None, Callable] = {
    function: relu
    for function in (
        functional.relu,
        functional.relu_,
        torch.relu,
        torch.relu_,
        Tensor.relu,
        Tensor.relu_,
    )
}
