"""The engine's own counter: bytes of the unique storages that it keeps alive for backward."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from metaopt.evaluation.reachable import Bookkeeping


class Owner(NamedTuple):
    """One call of one module of the model."""

    name: str  # qualified
    call: int  # how many calls of it came before, since the context was entered


OUTSIDE = Owner("", -1)
"""Of what is kept while no module of the model runs, and of what backward has borrowed."""


class Hold(Bookkeeping):
    """Counts one tensor's storage for as long as this object lives."""

    __slots__ = ("_counter", "_key")

    def __init__(self, counter: "ByteCounter", key: int) -> None:
        self._counter, self._key = counter, key

    def __del__(self) -> None:
        self._counter._release(self._key)


class ByteCounter(Bookkeeping):
    """Bytes held now and the most that were held at once; a storage that several packs share counts once."""

    def __init__(self) -> None:
        self.peak = 0
        self.owner = OUTSIDE  # whose call keeps what is held from here on
        self.packed: Counter[Owner] = Counter()  # bytes now, by the call that was the first to keep them
        self.waiting: Counter[Owner] = Counter()  # entries of the tensors that backward has yet to ask for, by call
        self.on_lend: Callable[[Owner, int], None] | None = None  # told whose tensor was unpacked, and its bytes
        self._held = 0
        self._storages: dict[int, tuple[int, int, Owner]] = {}  # storage -> (holds alive, bytes, owner)
        self._lent: list[tuple[StorageWeakRef, Hold]] = []
        self._lock = threading.RLock()  # backward on an accelerator frees saved tensors from a thread of its own

    @property
    def held(self) -> int:
        """Bytes held now."""
        with self._lock:
            self._take_back()
            return self._held

    def hold(self, tensor: Tensor) -> Hold:
        """Count the storage of ``tensor`` until the result is dropped, which must not outlive the tensor."""
        return self._hold(tensor, self.owner)

    def lend(self, tensor: Tensor, owner: Owner) -> Tensor:
        """Count what was unpacked for backward, until its storage is freed.

        Autograd makes tensors of its own of what it is given, so the life of ``tensor`` itself tells nothing.
        """
        with self._lock:
            before = self.held
            hold = self._hold(tensor, OUTSIDE)
            self._lent.append((StorageWeakRef(tensor.untyped_storage()), hold))
            if self.on_lend is not None:
                self.on_lend(owner, self._held - before)
        return tensor

    def _hold(self, tensor: Tensor, owner: Owner) -> Hold:
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            holds, size, owner = self._storages.get(key, (0, storage.nbytes(), owner))
            self._storages[key] = (holds + 1, size, owner)
            if holds == 0:
                self._take_back()
                self._held += size
                self.packed[owner] += size
                self.peak = max(self.peak, self._held)
        return Hold(self, key)

    def _take_back(self) -> None:
        if self._lent:
            self._lent = [item for item in self._lent if not item[0].expired()]

    def _release(self, key: int) -> None:
        with self._lock:
            holds, size, owner = self._storages.pop(key)
            if holds > 1:
                self._storages[key] = (holds - 1, size, owner)
            else:
                self._held -= size
                self.packed[owner] -= size
