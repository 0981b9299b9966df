"""The byte meter: what autograd keeps alive, measured as unique storages rather than counted from shapes.

The meter watches everything that autograd saves through ``torch.autograd.graph.saved_tensors_hooks``. It does not see
tensors that a custom ``autograd.Function`` keeps as plain attributes instead of ``save_for_backward``, nor what hooks
pushed inside its own (as ``torch.utils.checkpoint`` does) save in its place. ``torch.func.grad`` and ``vjp`` refuse
such hooks; ``torch.autograd.grad`` works under them.
"""

import threading
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIB = 2**20

_StorageKey = tuple[torch.device, int]


def _storage_key(tensor: Tensor) -> _StorageKey:
    """Device and address of the tensor's memory: views and expanded tensors share it with their base."""
    return tensor.device, tensor.untyped_storage().data_ptr()


class _Holder:
    """Stands for one saved tensor in the graph; the tensor counts as held for as long as this object lives."""

    __slots__ = ("_key", "_meter", "tensor", "version")

    def __init__(self, meter: "MemoryMeter", tensor: Tensor) -> None:
        self._key: _StorageKey | None = None
        self._meter = meter
        # Detached: a saved output that still carries its grad_fn would keep its own node, and so itself, alive.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self._key = meter._acquire(self.tensor)

    def __del__(self) -> None:
        if self._key is not None:
            self._meter._release(self._key)


class MemoryMeter:
    """Measures the bytes that autograd holds, over every forward and backward pass inside the context.

    ``with MemoryMeter([*model.parameters(), *model.buffers(), images]) as meter: ...`` then ``meter.peak_mib``.
    Gradients of any order are the same as without the meter. Hooks switch off autograd's own check for tensors that
    were changed in place after they were saved, so the meter makes that check itself and raises ``RuntimeError``.
    A graph that outlives the context goes on counting in ``held_mib`` until it is freed. The context may be entered
    again, one at a time; the peak is then the one over all of them.

    Args:
        exclude: tensors that are alive anyway (parameters, module buffers, the batch), whose storages do not count. The
            meter keeps their storages alive until it is dropped, for a freed address would be given to something else.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage_key(tensor): tensor.detach() for tensor in exclude}
        self._cuda_devices = {device for device, _ in self._excluded if device.type == "cuda"}
        self._holders: dict[_StorageKey, tuple[int, int]] = {}  # storage -> (holders alive, bytes)
        self._lock = threading.RLock()  # backward on an accelerator frees saved tensors from a thread of its own
        self._held_bytes = 0
        self._peak_bytes = 0
        self._cuda_peak_bytes: int | None = None
        self._hooks: saved_tensors_hooks | None = None

    @property
    def held_mib(self) -> float:
        """MiB held at this moment."""
        return self._held_bytes / MIB

    @property
    def peak_mib(self) -> float:
        """The most MiB that were held at once."""
        return self._peak_bytes / MIB

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
        if self._hooks is not None:
            raise RuntimeError("this meter is already watching: leave its context first, or make another meter")
        for device in self._cuda_devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop to watch; what is still held stays counted until it is freed."""
        assert self._hooks is not None
        self._hooks.__exit__(*exception)
        self._hooks = None
        if self._cuda_devices:
            peak = sum(torch.cuda.max_memory_allocated(device) for device in self._cuda_devices)
            self._cuda_peak_bytes = max(peak, self._cuda_peak_bytes or 0)

    def _pack(self, tensor: Tensor) -> _Holder:
        return _Holder(self, tensor)

    def _unpack(self, holder: _Holder) -> Tensor:
        if holder.tensor._version != holder.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(holder.tensor.shape)} that backward needs was changed in place after it was "
                f"saved (version {holder.tensor._version}, saved at version {holder.version}): change a clone instead"
            )
        return holder.tensor

    def _acquire(self, tensor: Tensor) -> _StorageKey | None:
        """Count the tensor's storage once more; None where it does not count."""
        key = _storage_key(tensor)
        if key in self._excluded:
            return None
        with self._lock:
            holders, size = self._holders.get(key, (0, tensor.untyped_storage().nbytes()))
            self._holders[key] = (holders + 1, size)
            if holders == 0:
                self._held_bytes += size
                self._peak_bytes = max(self._peak_bytes, self._held_bytes)
        return key

    def _release(self, key: _StorageKey) -> None:
        with self._lock:
            holders, size = self._holders.pop(key)
            if holders > 1:
                self._holders[key] = (holders - 1, size)
            else:
                self._held_bytes -= size


def _tensors(state: Any) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, torch.nn.Module):
        yield from state.parameters()
        yield from state.buffers()
    elif is_dataclass(state) and not isinstance(state, type):
        for field in fields(state):
            yield from _tensors(getattr(state, field.name))
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (tuple, list)):
        for value in state:
            yield from _tensors(value)


def state_mib(state: Any) -> float:
    """MiB of the unique storages in a state: moments, gradient memory, teacher, anchors.

    Args:
        state: tensors, modules, and dataclasses, dicts, tuples and lists of such, nested at will; anything else counts
            nothing.
    """
    storages = {_storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    return sum(storages.values()) / MIB
