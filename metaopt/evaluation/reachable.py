"""Which storages an object keeps alive: tensors nested at will in containers, attributes, slots and closures."""

import functools
import types
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Block(NamedTuple):
    """A memory block that something keeps alive."""

    key: int  # identity, unique while the block is referred to, be it weakly
    size: int  # bytes
    reference: Any  # weak; None where the kind of object allows none

    @property
    def freed(self) -> bool:
        """Whether the memory is gone, as far as a weak reference can tell."""
        if isinstance(self.reference, StorageWeakRef):
            return self.reference.expired()
        return self.reference is not None and self.reference() is None


class Bookkeeping:
    """Base of objects that count memory and hold none, where a search for what is held stops."""

    __slots__ = ()


_PLAIN = (str, int, float, complex, torch.dtype, torch.device)
_LEAVES = (Bookkeeping, type, types.ModuleType, types.FrameType, types.CodeType, nn.Module, nn.Parameter, *_PLAIN)


def _strided_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with a storage of their own that the tensor consists of: itself, or a sparse one's parts."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _strided_parts(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


def blocks_of(tensor: Tensor) -> Iterator[Block]:
    """The storages behind a tensor; views and expanded tensors share theirs with their base."""
    for part in _strided_parts(tensor):
        storage = part.untyped_storage()
        yield Block(storage._cdata, storage.nbytes(), StorageWeakRef(storage))


def reachable_blocks(root: Any) -> Iterator[Block]:
    """The memory that ``root`` keeps alive, each block at least once.

    Followed are containers, attributes, slots, closures, partial functions and bound methods; NumPy arrays and bytes
    count too. Not followed are modules, parameters, classes, weak references and `Bookkeeping`, nor the graph behind a
    tensor.
    """
    seen: set[int] = set()
    pending: list[Any] = [root]
    keep: list[Any] = []  # an object made on the way must live until the end, or its id goes to another
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        keep.append(item)
        if isinstance(item, Tensor):
            yield from blocks_of(item)
        elif isinstance(item, numpy.ndarray):
            yield from _array_blocks(item)
        elif isinstance(item, bytes | bytearray):
            yield Block(id(item), len(item), None)
        else:
            pending.extend(_children(item))


def _array_blocks(array: numpy.ndarray) -> Iterator[Block]:
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    if isinstance(array.base, Tensor):  # tensor.numpy() shares the tensor's memory
        yield from blocks_of(array.base)
    else:
        yield Block(id(array), array.nbytes, weakref.ref(array))


def _children(item: Any) -> Iterator[Any]:
    if isinstance(item, Mapping):
        yield from item.values()
        yield from item.keys()
    elif isinstance(item, Collection):
        yield from item
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, types.FunctionType):
        yield from (item.__defaults__, item.__kwdefaults__)
        yield from (cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType())
    yield getattr(item, "__dict__", None)
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            name = f"_{cls.__name__.lstrip('_')}{slot}" if slot.startswith("__") and not slot.endswith("__") else slot
            if name not in ("__dict__", "__weakref__"):
                yield getattr(item, name, None)


def _state_tensors(state: Any) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, nn.Module):
        yield from state.parameters()
        yield from state.buffers()
    elif is_dataclass(state) and not isinstance(state, type):
        for field in fields(state):
            yield from _state_tensors(getattr(state, field.name))
    elif isinstance(state, dict):
        for value in state.values():
            yield from _state_tensors(value)
    elif isinstance(state, (tuple, list)):
        for value in state:
            yield from _state_tensors(value)


def state_mib(state: Any) -> float:
    """MiB of the unique storages in a state: moments, gradient memory, teacher, anchors.

    Args:
        state: tensors, modules, and dataclasses, dicts, tuples and lists of such, nested at will; anything else counts
            nothing.
    """
    blocks = {block.key: block.size for tensor in _state_tensors(state) for block in blocks_of(tensor)}
    return sum(blocks.values()) / 2**20
