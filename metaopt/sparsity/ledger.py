"""The engine's own counter: bytes of the unique storages that it keeps alive for backward."""

import threading
import weakref

from torch import Tensor


class Hold:
    """Counts one tensor's storage for as long as this object lives."""

    __slots__ = ("_key", "_ledger")

    def __init__(self, ledger: "Ledger", key: int) -> None:
        self._ledger, self._key = ledger, key

    def __del__(self) -> None:
        self._ledger._release(self._key)


class Ledger:
    """Bytes held now and the most that were held at once; a storage that several packs share counts once."""

    def __init__(self) -> None:
        self.held = 0
        self.peak = 0
        self.lent = 0  # of what is held, unpacked for backward
        self.trace: list[tuple[int, int]] | None = None  # where it is a list: packed and lent bytes at each lending
        self._storages: dict[int, tuple[int, int]] = {}  # storage -> (holds alive, bytes)
        self._lock = threading.RLock()  # backward on an accelerator frees saved tensors from a thread of its own

    def hold(self, tensor: Tensor) -> Hold:
        """Count the storage of ``tensor`` until the result is dropped, which must not outlive the tensor."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            holds, size = self._storages.get(key, (0, storage.nbytes()))
            self._storages[key] = (holds + 1, size)
            if holds == 0:
                self._grow(size)
        return Hold(self, key)

    def lend(self, tensor: Tensor) -> Tensor:
        """Count what was unpacked for backward, until autograd has dropped it."""
        with self._lock:
            before = self.held
            hold = self.hold(tensor)
            size = self.held - before
            self.lent += size
            if self.trace is not None:
                self.trace.append((self.held - self.lent, self.lent))
        weakref.finalize(tensor, self._give_back, [hold], size).atexit = False
        return tensor

    def _give_back(self, holds: list[Hold], size: int) -> None:
        with self._lock:
            holds.clear()
            self.lent -= size

    def _grow(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def _release(self, key: int) -> None:
        with self._lock:
            holds, size = self._storages.pop(key)
            if holds > 1:
                self._storages[key] = (holds - 1, size)
            else:
                self.held -= size
