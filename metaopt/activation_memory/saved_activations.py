"""What autograd keeps of a forward pass, kept small: for any model, without touching its modules.

Inside `SavedActivations` two things happen at once. Hooks on saved tensors (``torch.autograd.graph``) decide how each
tensor that a node wants for backward is stored; and a ``TorchFunctionMode`` tells them which operator is running, so
that they know what backward will do with it: a handler per operator (`metaopt.activation_memory.operators`) stores what
is needed and no more. The operators themselves, forward and backward, stay torch's own. So outputs do not change by a
bit, autocast, memory formats and every backend work as they did, and in ``exact`` second derivatives do as well.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from metaopt.activation_memory.byte_counter import OUTSIDE, ByteCounter, Owner
from metaopt.activation_memory.operators import FOLLOWERS, HANDLERS
from metaopt.activation_memory.packs import Precision
from metaopt.activation_memory.store import SMALL, Call, Slot, Store
from metaopt.errors import ConfigError

MEMORY = ("exact", "compact", "pruned")
COMPACT = Precision(bits=8)
"""What ``compact`` stores a layer with unless told otherwise."""


@dataclass
class LayerRecord:
    """What one layer's forward pass keeps for backward."""

    name: str  # qualified name of the module
    kind: str  # "batch_norm", "relu", "gelu", "attention", ...
    precision: Precision
    numel: int = 0  # entries of the tensors that the precision is for
    dense_bytes: int = 0  # what plain torch holds, shared storages counted where they are saved first
    held_bytes: int = 0
    small: int = 0  # tensors of too few entries to be coded


class SavedActivations:
    """Context within which a model's forward pass keeps small activations for backward.

    ``with SavedActivations(model, memory="compact"): loss = objective(model(images))``; backward may run inside or
    after. Only what is saved while ``model`` runs is touched; the loss, computed outside of it, keeps what torch keeps.
    Several forward passes may be alive at once. Not for use inside ``torch.func.grad`` or ``vjp``, which refuse hooks.
    What ``torch.utils.checkpoint`` recomputes inside the model stays as checkpointing has it.

    Args:
        model: its layers give their names; its parameters, its buffers and the batch that it is called with do not
            count.
        memory: ``exact``: gradients are those of plain torch up to rounding, of any order; ``compact``: codes, by
            default of 8 bits; ``pruned``: precisions may also drop entries.
        precisions: precision of a layer by its qualified name; others have the default.
        default: precision of all other layers.

    Raises:
        ConfigError: ``memory`` is unknown, or the precisions do not go with it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: str = "exact",
        precisions: Mapping[str, Precision] | None = None,
        default: Precision | None = None,
    ) -> None:
        if memory not in MEMORY:
            raise ConfigError(
                f"memory is {memory!r}; allowed are {', '.join(MEMORY)} here, or dense without this context: choose one"
            )
        precisions = dict(precisions or {})
        default = default or (Precision() if memory == "exact" else COMPACT)
        _check(memory, {**precisions, "default": default})
        self.model = model
        self.memory = memory
        self.counter = ByteCounter()
        self._records: dict[tuple[str, str], LayerRecord] = {}
        self._precisions, self._default = precisions, default
        self._store = Store(self.counter)
        self._active: _Active | None = None

    @property
    def layers(self) -> list[LayerRecord]:
        """What each layer kept in the forward passes since the context was last entered, in order of appearance."""
        return list(self._records.values())

    @property
    def held_bytes(self) -> int:
        """Bytes held at this moment, by the storages that the engine's packs own."""
        return self.counter.held

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were held at once, what backward unpacked included."""
        return self.counter.peak

    def precision(self, name: str) -> Precision:
        """Precision of a layer."""
        return self._precisions.get(name, self._default)

    def __enter__(self) -> "SavedActivations":
        """Start to store.

        Raises:
            RuntimeError: the context is active already.
        """
        if self._active is not None:
            raise RuntimeError("this context is active already: leave it first, or make another one")
        self._records.clear()
        self._active = _Active(self)
        self._active.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop; what was stored stays until backward has used it or the graph is dropped."""
        assert self._active is not None
        self._active.__exit__(*exception)
        self._active = None
        self._store.clear()

    def _record(self, name: str, kind: str) -> LayerRecord:
        return self._records.setdefault((name, kind), LayerRecord(name, kind, self.precision(name)))


def _check(memory: str, precisions: Mapping[str, Precision]) -> None:
    for name, precision in precisions.items():
        if memory == "exact" and not precision.lossless:
            raise ConfigError(
                f"precision of {name} is {precision} with memory=exact; allowed are 32 bits: "
                "set memory=compact or pruned"
            )
        if memory == "compact" and precision.keep < 1.0:
            raise ConfigError(
                f"precision of {name} keeps {precision.keep} with memory=compact; allowed is 1: set memory=pruned"
            )


@dataclass
class _Active:
    """The hooks and the mode while the context is entered; the model carries none otherwise."""

    owner: SavedActivations
    running: list[Owner] = field(default_factory=list)  # calls of modules, innermost last
    calls: Counter[str] = field(default_factory=Counter)  # so far, of each module
    call: Call | None = None
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> None:
        for tensor in (*self.owner.model.parameters(), *self.owner.model.buffers()):
            self.owner._store.exclude(tensor)
        for name, module in self.owner.model.named_modules():
            enter = partial(self._enter, name)
            self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            # Also after an error, so that a caller who catches it finds the names in order.
            self.handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        self.hooks = saved_tensors_hooks(self._pack, _unpack)
        self.mode = _Mode(self)
        self.hooks.__enter__()
        self.mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)
        self.hooks.__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str, _module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        if not self.running:
            for value in (*inputs, *named.values()):
                if isinstance(value, Tensor) and not value.requires_grad:
                    self.owner._store.exclude_batch(value)
        self.running.append(Owner(name, self.calls[name]))
        self.calls[name] += 1
        self.owner.counter.owner = self.running[-1]

    def _leave(self) -> None:
        self.running.pop()
        self.owner.counter.owner = self.running[-1] if self.running else OUTSIDE
        if not self.running:
            self.owner._store.forget()

    def _pack(self, tensor: Tensor) -> Slot:
        """Called by autograd for each tensor that a node saves, before or after the operator has run."""
        slot = Slot(tensor, self.owner.counter, self.owner.counter.owner)
        if not self.running:
            slot.fill(self.owner._store.keep(tensor))
        elif self.call is None:
            self._finish(Call(None, (), {}, slots=[slot]))
        else:
            self.call.slots.append(slot)
        return slot

    def run(self, function: Callable, arguments: tuple, named: dict[str, Any]) -> Any:
        """Run an operator, then decide how what it saved is stored."""
        if not self.running or self.call is not None:
            return function(*arguments, **named)
        call = Call(function, arguments, named)
        call.look_up(self.owner._store)
        self.call = call
        try:
            call.result = function(*arguments, **named)
        finally:
            self.call = None
        if call.slots:
            self._finish(call)
        if call.source is not None and function in FOLLOWERS:
            FOLLOWERS[function](self.owner._store, call)
        return call.result

    def _finish(self, call: Call) -> None:
        store, name = self.owner._store, self.running[-1].name
        store.precision = self.owner.precision(name)
        dense = store.dense_bytes([slot.tensor for slot in call.slots if slot.tensor is not None])
        before = self.owner.counter.held
        numels = [slot.tensor.numel() for slot in call.slots if slot.tensor is not None]
        handler = HANDLERS.get(call.function)
        kind = "other"
        with torch.no_grad(), torch.autocast(_device_type(call), enabled=False):
            if handler is not None:
                kind = handler(store, call) or "other"
            for slot in call.slots:
                if slot.packed is None:
                    slot.fill(store.any(slot.saved))
        record = self.owner._record(name, kind)
        record.dense_bytes += dense
        record.numel += sum(numels)
        record.small += sum(numel < SMALL for numel in numels)
        record.held_bytes += self.owner.counter.held - before


def _device_type(call: Call) -> str:
    return next((slot.tensor.device.type for slot in call.slots if slot.tensor is not None), "cpu")


def _unpack(slot: Slot) -> Tensor:
    return slot.unpack()


class _Mode(TorchFunctionMode):
    def __init__(self, active: _Active) -> None:
        super().__init__()
        self._active = active

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._active.run(func, args, kwargs or {})
