"""What the operators' handlers work with: the running call, the slots that it saved, and how tensors get stored."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from metaopt.activation_memory.byte_counter import ByteCounter, Owner
from metaopt.activation_memory.codes import integers, mask
from metaopt.activation_memory.packs import Derived, Packed, Plain, half
from metaopt.activation_memory.precision import Precision
from metaopt.activation_memory.sparse import sparse
from metaopt.activation_memory.uniform import channels_of, coded
from metaopt.errors import ConfigError

SMALL = 1024  # tensors of fewer elements are kept as they are
VIEW_SHARE = 64  # a view of less than one part in so many of its storage is copied rather than kept

P = TypeVar("P", bound=Packed)


class Slot:
    """Stands in the graph for one saved tensor; holds it until the operator is done, and its pack from then on."""

    __slots__ = ("_counter", "_dtype", "_entries", "_owner", "packed", "tensor")

    def __init__(self, tensor: Tensor, counter: ByteCounter, owner: Owner) -> None:
        self.tensor: Tensor | None = tensor
        self.packed: Packed | None = None
        self._counter, self._owner, self._entries, self._dtype = counter, owner, tensor.numel(), tensor.dtype
        counter.waiting[owner] += self._entries

    def __del__(self) -> None:
        self._counter.waiting[self._owner] -= self._entries

    @property
    def saved(self) -> Tensor:
        """What autograd gave; only until the slot is filled."""
        assert self.tensor is not None
        return self.tensor

    def fill(self, packed: P) -> P:
        """Store the tensor as ``packed`` and let go of it."""
        self.packed, self.tensor = packed, None
        return packed

    def unpack(self) -> Tensor:
        """What backward gets, in the type that it saved.

        Raises:
            ConfigError: a second derivative is asked of codes.
        """
        assert self.packed is not None
        if self.packed.lossy and torch.is_grad_enabled():
            raise ConfigError(
                "second derivatives were asked of codes, which memory=compact and pruned keep; allowed are exact "
                "or dense: set one, or meta.gradient=first_order"
            )
        tensor = self.packed.unpack().to(self._dtype)  # under autocast, what it follows from may have another
        return tensor if isinstance(self.packed, Plain) else self._counter.lend(tensor, self._owner)


@dataclass
class Call:
    """One operator: what it was given, what it gave, and what it saved."""

    function: Callable | None
    arguments: tuple
    named: dict[str, Any]
    result: Any = None
    slots: list[Slot] = field(default_factory=list)
    source: Packed | None = None  # how the first argument is known to be stored

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.arguments[position] if len(self.arguments) > position else self.named.get(name, default)

    @property
    def open(self) -> list[Slot]:
        """Slots that are not filled yet."""
        return [slot for slot in self.slots if slot.packed is None]

    def slots_of(self, tensor: Any) -> list[Slot]:
        """The open slots that hold ``tensor``."""
        return [slot for slot in self.open if isinstance(tensor, Tensor) and same(slot.saved, tensor)]

    def slots_like(self, tensor: Tensor) -> list[Slot]:
        """The open slots that hold ``tensor``, or what autocast made of it."""
        return self.slots_of(tensor) or [
            slot for slot in self.open if slot.saved.shape == tensor.shape and slot.saved.is_floating_point()
        ]

    def again(self) -> Derived | None:
        """The result, computed again from the known first argument; None where that is not known."""
        source, function, rest, named = self.source, self.function, self.arguments[1:], dict(self.named)
        if source is None or function is None or not isinstance(self.result, Tensor):
            return None
        named.pop("input", None)
        dtype = self.result.dtype  # autocast, which is off by then, may have widened the argument
        return Derived(lambda: function(source.unpack().to(dtype), *rest, **named), source)

    def remember_result(self, store: "Store") -> None:
        """Where the first argument can be computed, so can the result."""
        again = self.again()
        if again is not None:
            store.remember(self.result, again)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, seen the same way."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata and _view(a) == _view(b)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of its storage a tensor shows."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


class Store:
    """Turns tensors into packs, each storage once.

    It remembers, for as long as the storage lives, how a tensor was stored, or from what it can be computed: so a ReLU
    needs no mask where the codes of the normalised activation before it tell the sign.
    """

    def __init__(self, counter: ByteCounter) -> None:
        self.counter = counter
        self.precision = Precision()
        self._excluded: dict[int, Tensor] = {}
        self._batch: dict[int, Tensor] = {}
        self._known: dict[int, tuple[StorageWeakRef, dict[tuple, Packed]]] = {}  # by view and version of the tensor
        self._seen: dict[int, StorageWeakRef] = {}

    def exclude(self, tensor: Tensor, *, batch: bool = False) -> None:
        """Never store or count this tensor's storage, which is alive anyway; of a ``batch``, until `forget`."""
        (self._batch if batch else self._excluded)[tensor.untyped_storage()._cdata] = tensor.detach()

    def forget(self) -> None:
        """Drop what was remembered about tensors, or it would outlive its use in backward; packs in the graph stay."""
        self._batch.clear()
        self._known.clear()
        self._seen.clear()

    def clear(self) -> None:
        """Forget everything, the excluded tensors included."""
        self.forget()
        self._excluded.clear()

    def alive_anyway(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter, a buffer, a leaf that stands in for one, or the batch."""
        key = tensor.untyped_storage()._cdata
        return key in self._excluded or key in self._batch or (tensor.is_leaf and tensor.requires_grad)

    def known(self, tensor: Tensor) -> Packed | None:
        """How this tensor is stored or can be computed, where that is known."""
        entry = self._known.get(tensor.untyped_storage()._cdata)
        return None if entry is None or entry[0].expired() else entry[1].get((tensor._version, *_view(tensor)))

    def remember(self, tensor: Tensor, packed: P) -> P:
        """Note how this tensor is stored or can be computed."""
        key = tensor.untyped_storage()._cdata
        entry = self._known.get(key)
        if entry is None or entry[0].expired():
            # The weak reference keeps the storage's address from being given to another one.
            entry = self._known[key] = (StorageWeakRef(tensor.untyped_storage()), {})
        entry[1][(tensor._version, *_view(tensor))] = packed
        return packed

    def keep(self, tensor: Tensor) -> Packed:
        """The tensor as it is; a copy where it is a small part of a large storage that it would keep alive."""
        if self.alive_anyway(tensor):
            return Plain(tensor, None)
        if VIEW_SHARE * tensor.nbytes > tensor.untyped_storage().nbytes():
            return Plain(tensor, self.counter)
        copy = Plain(tensor.detach().clone(), self.counter)
        # Whoever unpacks what is remembered may write to it.
        return self.remember(tensor, Derived(lambda: copy.unpack().clone(), copy))

    def any(self, tensor: Tensor) -> Packed:
        """A tensor of which nothing is known but that it is needed: floats as halves, masks and indices in few bits."""
        packed = self._as_it_is(tensor)
        if packed is not None:
            return packed
        if tensor.dtype == torch.bool:
            return self.remember(tensor, mask(tensor, self.counter))
        if tensor.is_floating_point():
            whole = self.precision.lossless or tensor.element_size() <= 2
            return self.keep(tensor) if whole else self.remember(tensor, half(tensor, self.counter))
        if tensor.is_complex() or tensor.element_size() == 1:
            return self.keep(tensor)
        low, high = (int(bound) for bound in torch.aminmax(tensor))
        return self.remember(tensor, integers(tensor, low, high, self.counter))

    def codes(self, tensor: Tensor, channels: tuple[int, ...] | None = None) -> Packed:
        """A tensor that backward multiplies with: codes, with a range for each index of the dimensions ``channels``."""
        packed = self._as_it_is(tensor)
        if packed is not None:
            return packed
        if not tensor.is_floating_point() or (self.precision.bits >= 16 and self.precision.keep == 1.0):
            return self.any(tensor)
        channels = channels or channels_of(tensor)
        if self.precision.keep == 1.0:
            return self.remember(tensor, coded(tensor, self.precision.bits, channels, self.counter))
        values, dtype = tensor.detach(), tensor.dtype
        centre = values.mean([dim for dim in range(tensor.ndim) if dim not in channels], keepdim=True)
        kept = sparse(values - centre, self.precision, self.counter)
        return self.remember(tensor, Derived(lambda: kept.unpack().add_(centre).to(dtype), kept))

    def _as_it_is(self, tensor: Tensor) -> Packed | None:
        """How a tensor is stored at any precision, if it is small or its storage is alive or stored already."""
        if self.alive_anyway(tensor):
            return self.keep(tensor)
        known = self.known(tensor)
        if known is not None:
            return known
        repeated = any(tensor.stride(dim) == 0 and tensor.shape[dim] > 1 for dim in range(tensor.ndim))
        return self.keep(tensor) if tensor.numel() < SMALL or repeated else None

    def dense_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages that plain torch would keep from here on."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._seen.get(storage._cdata)
            if self.alive_anyway(tensor) or (entry is not None and not entry.expired()):
                continue
            self._seen[storage._cdata] = StorageWeakRef(storage)
            total += storage.nbytes()
        return total
