"""The byte meter: what autograd keeps alive during a step, measured as unique storages rather than counted from shapes.

Counted are

- the tensors that autograd saves, or what ``torch.autograd.graph.saved_tensors_hooks`` inside or around the meter make
  of them: everything that a packed object refers to counts, for as long as the graph keeps the object;
- what such hooks give back to backward, until it has been used;
- saved tensors that such hooks keep elsewhere, once backward runs: ``torch.utils.checkpoint`` does so with what it
  recomputes, and it is looked for in all that the unpacking function refers to;
- what a custom ``autograd.Function`` keeps as attributes of ``ctx`` instead of by ``save_for_backward``.

Not counted are gradients on their way, outputs that the caller holds but the graph does not, what hooks hide in global
variables and extensions in C++, and what selective checkpointing caches unless told to respect hooks.
``torch.func.grad`` and ``vjp`` refuse hooks; ``torch.autograd.grad`` works under them.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.autograd.graph import saved_tensors_hooks

from metaopt.evaluation.graph import LayerNames, NodeAttributes, ResultWatcher
from metaopt.evaluation.ledger import Claim, Ledger
from metaopt.evaluation.reachable import Bookkeeping, blocks_of, reachable_blocks

MIB = 2**20

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class _Saved:
    """Stands for one saved tensor in the graph; the tensor counts as held for as long as this object lives."""

    __slots__ = ("claim", "tensor", "version")

    def __init__(self, tensor: Tensor, claim: Claim) -> None:
        # Detached: a saved output that still carries its grad_fn would keep its own node, and so itself, alive.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.claim = claim


class _Packed:
    """Stands for what somebody else's hook made of a saved tensor; all that it refers to counts while this lives."""

    __slots__ = ("__weakref__", "_ledger", "claim", "layer", "value")

    def __init__(self, value: Any, layer: str, ledger: Ledger) -> None:
        self.value, self.layer, self._ledger = value, layer, ledger
        self.claim: Claim | None = None

    def count(self, but: Tensor | None = None) -> None:
        """Count what the object refers to now, apart from the memory of ``but``."""
        self.claim = None  # first, or what takes the place of something else would count beside it
        passed_over = set() if but is None else {block.key for block in blocks_of(but)}
        blocks = [block for block in reachable_blocks(self.value) if block.key not in passed_over]
        self.claim = self._ledger.claim(blocks, self.layer, loose=True)


class _MeteredPack:
    """A hook's pack function under the meter, with the attributes that it had."""

    def __init__(self, meter: "MemoryMeter", pack: Pack) -> None:
        self._meter, self._pack = meter, pack

    def __call__(self, tensor: Tensor) -> _Packed:
        return self._meter._pack_by(self._pack, tensor)

    def __getattr__(self, name: str) -> Any:
        # Looked up at each time: checkpointing takes attributes of its hooks away again when it leaves them.
        return getattr(self.__dict__["_pack"], name)


class MemoryMeter(Bookkeeping):
    """Measures the bytes that autograd holds, over every forward and backward pass inside the context.

    ``with MemoryMeter([images], model=model) as meter: ...`` then ``meter.peak_mib``. Gradients of any order are the
    same as without the meter. Hooks switch off autograd's own check for tensors that were changed in place after they
    were saved, so the meter makes that check itself and raises ``RuntimeError``. A graph that outlives the context goes
    on counting in ``held_mib`` until it is freed. The context may be entered again, one at a time; the peak is then the
    one over all of them. A meter belongs to one thread, and the backward threads of an accelerator.

    Args:
        exclude: tensors that are alive anyway (parameters, module buffers, the batch), whose storages do not count. The
            meter keeps their storages alive until it is dropped, for a freed address would be given to something else.
        model: its parameters and buffers are excluded too, and its layers give ``layers_mib`` their names.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), *, model: nn.Module | None = None) -> None:
        own = [] if model is None else [*model.parameters(), *model.buffers()]
        self._excluded = [tensor.detach() for tensor in [*exclude, *own]]
        self._cuda_devices = {tensor.device for tensor in self._excluded if tensor.is_cuda}
        self._cuda_peak_bytes: int | None = None
        self._ledger = Ledger(block.key for tensor in self._excluded for block in blocks_of(tensor))
        self._attributes = NodeAttributes(self._ledger, lambda: self._names.current)
        self._names = LayerNames(model, self._attributes.find)
        self._results: ResultWatcher | None = None
        self._unsettled: list[weakref.ref[_Packed]] = []

    @property
    def held_mib(self) -> float:
        """MiB held at this moment."""
        self._settle()
        return self._ledger.held / MIB

    @property
    def peak_mib(self) -> float:
        """The most MiB that were held at once."""
        self._settle()
        return self._ledger.peak / MIB

    @property
    def layers_mib(self) -> dict[str, float]:
        """MiB of ``peak_mib`` by the layer that was the first to keep them, by qualified name, in order of appearance.

        SURGEON's layer activation memory (arXiv 2503.20354), measured. ``(outside)`` stands for what no layer of the
        model keeps; everything does where the meter was made without a model.
        """
        self._settle()
        return {layer: size / MIB for layer, size in self._ledger.peak_by_layer.items()}

    @property
    def cuda_peak_mib(self) -> float | None:
        """Peak MiB of the CUDA allocator inside the context, parameters and all; None where nothing runs on CUDA.

        Entering the context resets the allocator's own peak statistics of those devices.
        """
        return None if self._cuda_peak_bytes is None else self._cuda_peak_bytes / MIB

    def __enter__(self) -> "MemoryMeter":
        """Start to watch.

        Raises:
            RuntimeError: the meter is already watching.
        """
        if self._results is not None:
            raise RuntimeError("this meter is already watching: leave its context first, or make another meter")
        for device in self._cuda_devices:
            torch.cuda.reset_peak_memory_stats(device)
        around = _autograd._top_saved_tensors_default_hooks(True)
        _autograd._push_saved_tensors_default_hooks(
            *((self._pack, self._unpack) if around is None else self._metered(*around))
        )
        _watching.append(self)
        saved_tensors_hooks.__enter__ = _enter_watched
        self._names.__enter__()
        self._results = ResultWatcher(self._attributes.find, lambda: len(self._unsettled), self._settle)
        self._results.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop to watch; what is still held stays counted until it is freed."""
        assert self._results is not None
        self._results.__exit__(*exception)
        self._results = None
        self._names.__exit__(*exception)
        _watching.remove(self)
        if not _watching:
            saved_tensors_hooks.__enter__ = _enter_unwatched
        _autograd._pop_saved_tensors_default_hooks()
        if self._cuda_devices:
            peak = sum(torch.cuda.max_memory_allocated(device) for device in self._cuda_devices)
            self._cuda_peak_bytes = max(peak, self._cuda_peak_bytes or 0)

    def _pack(self, tensor: Tensor) -> _Saved:
        self._attributes.find(tensor)
        return _Saved(tensor, self._ledger.claim(blocks_of(tensor), self._names.current, loose=False))

    def _unpack(self, saved: _Saved) -> Tensor:
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(saved.tensor.shape)} that backward needs was changed in place after it was "
                f"saved (version {saved.tensor._version}, saved at version {saved.version}): change a clone instead"
            )
        return saved.tensor

    def _metered(self, pack: Pack, unpack: Unpack) -> tuple[Pack, Unpack]:
        """Somebody else's hooks, and the meter sees what they keep."""
        return _MeteredPack(self, pack), lambda packed: self._unpack_by(unpack, packed)

    def _pack_by(self, pack: Pack, tensor: Tensor) -> _Packed:
        layer = self._names.current
        self._attributes.find(tensor)
        self._ledger.notice(blocks_of(tensor), layer)
        try:
            value = pack(tensor)
        except Exception:
            # Checkpointing ends its recomputation so, and has kept this tensor as well: a peak before it unwinds.
            self._ledger.claim(blocks_of(tensor), layer, loose=False)
            raise
        packed = _Packed(value, layer, self._ledger)
        if isinstance(value, Tensor):
            packed.count()
        else:
            # A hook may decide what to store when the operator is done, and hold the tensor itself until then. So the
            # object is looked at again after the next operator.
            packed.count(but=tensor)
            self._unsettled.append(weakref.ref(packed))
        return packed

    def _settle(self, count: int | None = None) -> None:
        """Count what the first ``count`` of the objects that were packed lately, or all of them, have come to hold."""
        settled, self._unsettled = self._unsettled[:count], [] if count is None else self._unsettled[count:]
        for reference in settled:
            packed = reference()
            if packed is not None:
                packed.count()

    def _unpack_by(self, unpack: Unpack, packed: _Packed) -> Tensor:
        self._settle()
        tensor = unpack(packed.value)
        self._ledger.surface(unpack, tensor, packed.layer)
        packed.count()
        return tensor


_watching: list[MemoryMeter] = []


def _enter_watched(self: saved_tensors_hooks) -> None:
    """What entering ``saved_tensors_hooks`` does while a meter is there: autograd calls the innermost hooks alone."""
    pack, unpack = self.pack_hook, self.unpack_hook
    for meter in _watching:
        pack, unpack = meter._metered(pack, unpack)
    _autograd._push_saved_tensors_default_hooks(pack, unpack)


_enter_unwatched = saved_tensors_hooks.__enter__
