"""Which handler stores what an operator saves: one table over torch's functions and methods.

A handler is called once the operator has run. It fills the slots it understands; the rest is stored as the unknown is.
It returns the operator's kind, for the records, or None where it did not recognise what was saved.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metaopt.activation_memory.activations import ACTIVATION_HANDLERS
from metaopt.activation_memory.attention import ATTENTION_HANDLERS
from metaopt.activation_memory.linear import LINEAR_HANDLERS
from metaopt.activation_memory.norms import NORM_HANDLERS
from metaopt.activation_memory.packs import Derived
from metaopt.activation_memory.store import Call, Store

HANDLERS: dict[Callable | None, Callable] = {
    **NORM_HANDLERS,
    **ACTIVATION_HANDLERS,
    **ATTENTION_HANDLERS,
    **LINEAR_HANDLERS,
}


def view(store: Store, call: Call) -> None:
    """Another shape of what is known."""
    source, function, rest, named = call.source, call.function, call.arguments[1:], dict(call.named)
    if source is not None and function is not None and isinstance(call.result, Tensor):
        named.pop("input", None)
        store.remember(call.result, Derived(lambda: function(source.unpack(), *rest, **named), source))


def shifted(store: Store, call: Call) -> None:
    """A known tensor plus or times a number, or a tensor that is small beside it: a bias on attention scores."""
    other = call.get(1, "other")
    source, function, result = call.source, call.function, call.result
    if source is None or function is None or not isinstance(result, Tensor) or call.named:
        return
    if not isinstance(other, Tensor):
        store.remember(result, Derived(lambda: function(source.unpack(), other), source))
    elif 8 * other.numel() <= result.numel():
        kept = store.keep(other)
        store.remember(result, Derived(lambda: function(source.unpack(), kept.unpack()), source, kept))


FOLLOWERS: dict[Callable, Callable] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), view),
    **dict.fromkeys((Tensor.transpose, Tensor.permute, torch.transpose, torch.permute, Tensor.contiguous), view),
    **dict.fromkeys((Tensor.add, Tensor.__add__, torch.add, Tensor.mul, Tensor.__mul__, torch.mul), shifted),
}
"""Operators whose output is known where their input is, whether they save anything or not."""
