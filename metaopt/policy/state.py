"""What changes while a policy adapts, apart from the parameters themselves: a mapping from part to state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

State = dict[str, Any]
"""A tree of tensors, or None, for "rule" and for each part by its name; never changed, each step makes one."""


def map_tensors(function: Any, state: State) -> State:
    """The same state with ``function`` applied to each of its tensors."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, state)


def detached_state(state: State) -> State:
    """The same values cut from every graph."""
    return map_tensors(torch.Tensor.detach, state)


def copied_state(state: State) -> State:
    """Contiguous copies that share no storage with the original."""
    return map_tensors(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), state)


def state_to_dict(state: State) -> dict[str, list[Tensor]]:
    """The tensors of each part in a fixed order, copied, for a file."""
    return {
        name: [leaf for leaf in pytree.tree_leaves(copied_state(own)) if isinstance(leaf, Tensor)]
        for name, own in state.items()
    }


def state_from_dict(values: Mapping[str, list[Tensor]], like: State) -> State:
    """Inverse of :func:`state_to_dict`, in the structure of a fresh state ``like``.

    What is empty in a fresh state takes its shape from the first batch, so that any will do.

    Raises:
        ValueError: other parts, another number of tensors, or another shape, than ``like`` has.
    """
    if set(values) != set(like):
        differing = sorted(set(values) ^ set(like))
        raise ValueError(f"the saved state has other parts ({', '.join(differing)})")
    return {name: _filled(values[name], like[name]) for name in like}


def _filled(tensors: list[Tensor], like: Any) -> Any:
    leaves, structure = pytree.tree_flatten(like)
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != len(slots) or any(
        leaves[index].numel() > 0 and tensor.shape != leaves[index].shape
        for index, tensor in zip(slots, tensors, strict=True)
    ):
        raise ValueError("the saved state belongs to another rule or another model")
    for index, tensor in zip(slots, tensors, strict=True):
        leaves[index] = tensor.to(leaves[index])
    return pytree.tree_unflatten(leaves, structure)


def check_mean_prediction(name: str, mean: Tensor, classes: int) -> None:
    """Refuse anything but the mean of predictions over ``classes`` classes, (C,), or (0,) before any.

    Raises:
        ValueError: it has another shape, or is no probability.
    """
    if tuple(mean.shape) not in ((0,), (classes,)) or bool(((mean < 0) | (mean > 1.01)).any()):
        raise ValueError(f"the mean prediction of {name} is no probabilities of {classes} classes")
