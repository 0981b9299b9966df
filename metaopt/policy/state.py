"""What changes while a policy adapts, apart from the parameters themselves."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.experts import TeacherState


@dataclass(frozen=True)
class PolicyState:
    """State of one adaptation run; immutable, each step makes a new one."""

    # Changes at every update.
    rule: Any = None  # the update rule's own state: a tree of tensors, or None for a method without updates
    pruning: Any = None  # the pruning rule's: what earlier gradients told of the layers; None without such a rule
    teacher: TeacherState | None = None  # running mean of the parameters; None for a method without a teacher
    # Changes at every batch.
    gate: Any = None  # what the update gate remembers, as a GateState; None for a method without one
    shift: Any = None  # the images since the last restoration, as a ShiftReference; None where nobody watches

    @property
    def tree(self) -> tuple[Any, ...]:
        """All parts, as one tree of tensors."""
        return tuple(getattr(self, part.name) for part in fields(self))


def map_tensors(function: Any, state: PolicyState) -> PolicyState:
    """The same state with ``function`` applied to each of its tensors."""
    return PolicyState(*pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, state.tree))


def detached_state(state: PolicyState) -> PolicyState:
    """The same values cut from every graph."""
    return map_tensors(torch.Tensor.detach, state)


def copied_state(state: PolicyState) -> PolicyState:
    """Contiguous copies that share no storage with the original."""
    return map_tensors(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), state)


def state_to_list(state: PolicyState) -> list[Tensor]:
    """The state's tensors in a fixed order, for a file."""
    return [leaf for leaf in pytree.tree_leaves(copied_state(state).tree) if isinstance(leaf, Tensor)]


def state_from_list(tensors: list[Tensor], like: PolicyState) -> PolicyState:
    """Inverse of :func:`state_to_list`, in the structure of a fresh state ``like``.

    Raises:
        ValueError: another number of tensors, or another shape, than ``like`` has.
    """
    leaves, structure = pytree.tree_flatten(like.tree)
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if [tuple(tensor.shape) for tensor in tensors] != [tuple(leaves[index].shape) for index in slots]:
        raise ValueError("the saved state belongs to another rule or another model")
    for index, tensor in zip(slots, tensors, strict=True):
        leaves[index] = tensor.to(leaves[index])
    return PolicyState(*pytree.tree_unflatten(leaves, structure))
