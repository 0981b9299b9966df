"""What a step holds at each moment of its backward pass, seen in a dry run at the cheapest precision.

At a moment some layers still keep all that they kept, some a part, and some nothing; beside them there is what backward
has unpacked, what is computed again, and what the loss keeps. The latter is the same at all precisions, or less at
finer ones; so with the bytes h_l that the layers hold at any precisions, a step holds at most

    max_e Σ_l a_el · h_l + b_e

with the share a_el of layer l that is kept at moment e, and the bytes b_e beside. Moments are those at which something
is unpacked. What grows between two of them counts where it is more than all that was held before: layers only let go as
backward goes on, so what is less then cannot be more at finer precisions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from metaopt.activation_memory.byte_counter import OUTSIDE, Owner
from metaopt.activation_memory.precision import Precision
from metaopt.activation_memory.saved_activations import LayerRecord, SavedActivations
from metaopt.evaluation import MemoryMeter
from metaopt.evaluation.meter import MIB
from metaopt.types import Parameters

CHEAPEST = Precision(1)


@dataclass
class BackwardTrace:
    """One step; moments go by whose tensor is unpacked, the end of the forward pass by `OUTSIDE`."""

    records: list[LayerRecord]
    entries: dict[Owner, int]  # of what each call of a module kept
    alive: dict[Owner, set[Owner]] = field(default_factory=dict)  # calls that still keep something
    beside: dict[Owner, int] = field(default_factory=dict)  # bytes

    def note(self, moment: Owner, alive: set[Owner], beside: int) -> None:
        """The most of what was seen at a moment counts."""
        self.alive[moment] = self.alive.get(moment, set()) | alive
        self.beside[moment] = max(self.beside.get(moment, 0), beside)

    def shares(self, moment: Owner, groups: Sequence[Sequence[str]]) -> list[float]:
        """The share that each group of modules still keeps: that of the module that keeps most of its own, (L,)."""
        whole: Counter[str] = Counter()
        left: Counter[str] = Counter()
        for owner, entries in self.entries.items():
            whole[owner.name] += entries
            left[owner.name] += entries * (owner in self.alive.get(moment, ()))
        return [max(left[name] / max(1, whole[name]) for name in names) for names in groups]


def trace_backward(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], parameters: Parameters, images: Tensor
) -> BackwardTrace:
    """Run one step at the cheapest precision under the meter, and see what it holds when."""
    with (
        torch.enable_grad(),
        MemoryMeter([*parameters.values(), images], model=model) as meter,
        SavedActivations(model, memory="pruned", default=CHEAPEST) as saved,
    ):
        loss, counter = loss_of(images), saved.counter

        def alive() -> set[Owner]:
            kept = {owner for table in (counter.waiting, counter.packed) for owner, number in table.items() if number}
            return kept - {OUTSIDE}

        def packed() -> int:
            return sum(counter.packed.values()) - counter.packed[OUTSIDE]

        trace = BackwardTrace(saved.layers, {owner: counter.waiting[owner] for owner in alive()})
        trace.note(OUTSIDE, alive(), round(meter.held_mib * MIB) - packed())
        before, most = OUTSIDE, round(meter.peak_mib * MIB)

        def watch(owner: Owner, lent: int) -> None:
            nonlocal before, most
            peak = round(meter.peak_mib * MIB)
            if peak > most:  # since the moment before
                trace.note(before, set(), peak - packed())
            held = round(meter.held_mib * MIB) + lent  # the meter counts what is lent once this returns
            trace.note(owner, alive(), held - packed())
            before, most = owner, max(most, peak, held)

        counter.on_lend = watch
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        watch(before, 0)
        counter.on_lend = None
    return trace
