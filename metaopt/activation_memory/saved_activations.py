"""What autograd keeps of a forward pass, kept small: for any model, without touching its modules.

Inside `SavedActivations` two things happen at once. Hooks on saved tensors (``torch.autograd.graph``) decide how each
tensor that a node wants for backward is stored; and a ``TorchFunctionMode`` tells them which operator is running, so
that they know what backward will do with it: a handler per operator (`metaopt.activation_memory.operators`) stores what
is needed and no more. The operators themselves, forward and backward, stay torch's own. So outputs do not change by a
bit, autocast, memory formats and every backend work as they did, and in ``exact`` second derivatives do as well.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from metaopt.activation_memory.byte_counter import OUTSIDE, ByteCounter, Owner
from metaopt.activation_memory.operators import FOLLOWERS, HANDLERS
from metaopt.activation_memory.precision import Precision
from metaopt.activation_memory.store import SMALL, Call, Slot, Store
from metaopt.errors import ConfigError

MEMORY = ("exact", "compact", "pruned")
COMPACT = Precision(bits=8)  # of a layer in ``compact`` unless told otherwise


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
        self._default = default or (Precision() if memory == "exact" else COMPACT)
        self._precisions = dict(precisions or {})
        _check(memory, {**self._precisions, "default": self._default})
        self.model, self.counter = model, ByteCounter()
        self._store = Store(self.counter)
        self.records: dict[tuple[str, str], LayerRecord] = {}  # by name and kind
        self._active: _Active | None = None

    @property
    def layers(self) -> list[LayerRecord]:
        """What each layer kept in the forward passes since the context was last entered, in order of appearance."""
        return list(self.records.values())

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
        self.records.clear()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._store.exclude(tensor)
        self._active = _Active(self)
        self._hooks = self._active.hooked()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop; what was stored stays until backward has used it or the graph is dropped."""
        assert self._active is not None
        self._hooks.close()
        self._active = None
        self._store.clear()


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


class _Active(TorchFunctionMode):
    """The hooks and the mode while the context is entered; the model carries none otherwise."""

    def __init__(self, context: SavedActivations) -> None:
        super().__init__()
        self.running: list[Owner] = []  # calls of modules, innermost last
        self._context, self._store, self._counter = context, context._store, context.counter
        self._calls: Counter[str] = Counter()  # so far, of each module
        self._call: Call | None = None

    def hooked(self) -> ExitStack:
        """Put all hooks in their places; closing the result takes them away."""
        with ExitStack() as stack:
            for name, module in self._context.model.named_modules():
                before = module.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True)
                # Also after an error, so that a caller who catches it finds the names in order.
                after = module.register_forward_hook(lambda *_: self._end(), always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(saved_tensors_hooks(self._pack, Slot.unpack))
            stack.enter_context(self)
            return stack.pop_all()

    def _begin(self, name: str, _module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        if not self.running:
            for value in (*inputs, *named.values()):
                if isinstance(value, Tensor) and not value.requires_grad:
                    self._store.exclude(value, batch=True)
        self.running.append(Owner(name, self._calls[name]))
        self._calls[name] += 1
        self._counter.owner = self.running[-1]

    def _end(self) -> None:
        self.running.pop()
        self._counter.owner = self.running[-1] if self.running else OUTSIDE
        if not self.running:
            self._store.forget()

    def _pack(self, tensor: Tensor) -> Slot:
        """Called by autograd for each tensor that a node saves, before or after the operator has run."""
        slot = Slot(tensor, self._counter, self._counter.owner)
        if not self.running:
            slot.fill(self._store.keep(tensor))
        elif self._call is None:
            self._finish(Call(None, (), {}, slots=[slot]))
        else:
            self._call.slots.append(slot)
        return slot

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, then decide how what it saved is stored."""
        named = kwargs or {}
        if not self.running or self._call is not None:
            return func(*args, **named)
        call = Call(func, args, named)
        first = call.get(0, "input")
        if isinstance(first, Tensor):
            call.source = self._store.known(first)  # before the call, which may overwrite it
        self._call = call
        try:
            call.result = func(*args, **named)
        finally:
            self._call = None
        if call.slots:
            self._finish(call)
        if call.source is not None and func in FOLLOWERS:
            FOLLOWERS[func](self._store, call)
        return call.result

    def _finish(self, call: Call) -> None:
        store, name = self._store, self.running[-1].name
        store.precision = self._context.precision(name)
        saved = [slot.saved for slot in call.slots]
        dense, held, numels = store.dense_bytes(saved), self._counter.held, [tensor.numel() for tensor in saved]
        kind, handler = HANDLERS.get(call.function, ("other", None))
        with torch.no_grad(), torch.autocast(saved[0].device.type, enabled=False):
            del saved  # handlers free each tensor as they go
            if handler is not None:
                handler(store, call)
            for slot in call.open:
                slot.fill(store.any(slot.saved))
        record = self._context.records.setdefault((name, kind), LayerRecord(name, kind, store.precision))
        record.dense_bytes += dense
        record.numel += sum(numels)
        record.small += sum(numel < SMALL for numel in numels)
        record.held_bytes += self._counter.held - held
