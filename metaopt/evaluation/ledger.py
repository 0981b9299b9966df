"""Who holds which memory block: bytes held now and at most, in total and by layer."""

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from metaopt.evaluation.reachable import Block, Bookkeeping, blocks_of, reachable_blocks


class _Entry:
    """A block that counts."""

    __slots__ = ("block", "claims", "counts", "layer")

    def __init__(self, block: Block, layer: str) -> None:
        self.block, self.layer, self.claims, self.counts = block, layer, 0, True


class Ledger(Bookkeeping):
    """Counts each block once, for as long as at least one claim on it lives; it belongs to the layer that came first.

    Blocks whose keys are ``excluded`` never count.
    """

    def __init__(self, excluded: Iterable[int] = ()) -> None:
        self.peak = 0  # bytes
        self._excluded = frozenset(excluded)
        self._held = 0  # bytes
        self._by_layer: Counter[str] = Counter()  # bytes
        self._peak_by_layer: Counter[str] | None = None  # None: as it is now
        self._entries: dict[int, _Entry] = {}
        self._loose: list[_Entry] = []  # may be freed without a word from whoever claimed them
        self._passing: list[tuple[Block, str]] = []  # given to somebody who may or may not have kept them
        self._lock = threading.RLock()  # backward on an accelerator frees saved tensors from a thread of its own

    @property
    def held(self) -> int:
        """Bytes held now."""
        with self._lock:
            self._forget_freed()
            return self._held

    @property
    def peak_by_layer(self) -> dict[str, int]:
        """Bytes by layer at the moment of the peak, in the order of first appearance."""
        with self._lock:
            found = self._by_layer if self._peak_by_layer is None else self._peak_by_layer
            return {layer: size for layer, size in found.items() if size}

    def claim(self, blocks: Iterable[Block], layer: str, *, loose: bool) -> "Claim":
        """Hold the blocks until the claim is dropped; ``loose`` ones only while they are alive, too."""
        found = {block.key: block for block in blocks if block.key not in self._excluded}
        with self._lock:
            return Claim(self, [self._acquire(block, layer, loose) for block in found.values()])

    def notice(self, blocks: Iterable[Block], layer: str) -> None:
        """Remember what somebody was given to keep."""
        with self._lock:
            self._passing.extend((block, layer) for block in blocks if block.key not in self._excluded)

    def surface(self, keeper: Any, unpacked: Tensor, layer: str) -> None:
        """Count until it is freed what ``keeper`` unpacked, and what it was noticed to get and keeps out of sight."""
        with self._lock:
            passing, self._passing = [item for item in self._passing if not item[0].freed], []
            kept = {block.key for block in reachable_blocks((keeper, unpacked))} if passing else set()
            found = [(block, layer) for block, layer in passing if block.key in kept]
            for block, where in [*found, *((block, layer) for block in blocks_of(unpacked))]:
                if block.key not in self._excluded:
                    self._acquire(block, where, loose=True)

    def release(self, entries: Iterable[_Entry]) -> None:
        """Drop one claim on each of the blocks."""
        with self._lock:
            for entry in entries:
                entry.claims -= 1
                if not entry.claims:
                    self._drop(entry)

    def _acquire(self, block: Block, layer: str, loose: bool) -> _Entry:
        entry = self._entries.get(block.key)
        if entry is not None and entry.block.freed:  # an object of the same identity, but another one
            self._drop(entry)
            entry = None
        if entry is None:
            if self._held + block.size > self.peak:
                self._forget_freed()
            entry = self._entries[block.key] = _Entry(block, layer)
            self._held += block.size
            self._by_layer[layer] += block.size
            if self._held > self.peak:
                self.peak, self._peak_by_layer = self._held, None
        if loose:
            self._loose.append(entry)
        entry.claims += 1
        return entry

    def _drop(self, entry: _Entry) -> None:
        if not entry.counts:
            return
        if self._held == self.peak and self._peak_by_layer is None:
            self._peak_by_layer = self._by_layer.copy()
        entry.counts = False
        self._held -= entry.block.size
        self._by_layer[entry.layer] -= entry.block.size
        del self._entries[entry.block.key]

    def _forget_freed(self) -> None:
        for entry in self._loose:
            if entry.block.freed:
                self._drop(entry)
        self._loose = [entry for entry in self._loose if entry.counts]


class Claim(Bookkeeping):
    """Holds blocks for as long as it lives."""

    __slots__ = ("_entries", "_ledger")

    def __init__(self, ledger: Ledger, entries: list[_Entry]) -> None:
        self._ledger, self._entries = ledger, entries

    def __del__(self) -> None:
        self._ledger.release(self._entries)
