"""The share of batches at which an update gate opens, set exactly once its weights are learned.

The price under which a gate learns brings its share near the one that is asked for, not to it. So whenever a policy is
scored, the gate's bias is moved until it opens at no more than that share of the held-out tasks' batches, each task a
domain of its own. What the gate sees there hardly depends on the updates, so that one run without any tells it. But
batches of a few images hold the same ones again and lie nearer to each other than those of a stream, whose distance is
1 in expectation: below that, theirs counts as 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.meta.tasks import Task
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.update_gate import GateState, UpdateGate
from metaopt.policy.step import StepContext, meet, predict
from metaopt.types import Parameters

FARTHEST = 50.0  # that a bias is moved
HALVINGS = 16  # down to 0.002, far above what rounding does to a decision


class Signals(NamedTuple):
    """What a gate sees of one batch, scalars; the batches since the last update follow from its decisions."""

    distance: Tensor
    age: Tensor
    entropy: Tensor


@torch.no_grad()
def gate_signals(
    policy: AdaptationPolicy, model: nn.Module, parameters: Parameters, tasks: Sequence[Task]
) -> list[Signals]:
    """Of all batches of all tasks in order, without an update; every task begins afresh, at age 0.

    Args:
        policy: with a learned gate.
        model: source model.
        parameters: the source's values of the adapted tensors.
        tasks: each a domain.
    """
    found = []
    for task in tasks:
        adapted = policy.start(parameters)
        state = policy.init(adapted)
        for position in range(len(task)):
            context = StepContext(policy, model, adapted, state, task[position].images)
            meet(context)
            remembered = context.state["update_gate"]
            found.append(Signals(context.signals["shift_distance"], remembered.age, remembered.entropy))
            output = predict(context)
            for part in context.acting("judge"):
                part.judge(context, output)
            adapted, state = context.parameters, context.state
    return found


def as_in_a_stream(signals: Sequence[Signals]) -> list[Signals]:
    """The same with distances of at least 1, as batches of new images have them in expectation."""
    return [each._replace(distance=each.distance.clamp_min(1.0)) for each in signals]


@torch.no_grad()
def share_opened(gate: UpdateGate, signals: Sequence[Signals], shift: float = 0.0) -> float:
    """Share of the batches at which the gate opens, its bias moved by ``shift``."""
    opened, rest = 0, torch.zeros(())
    for distance, age, entropy in signals:
        rest = torch.zeros_like(age) if age == 0 else rest
        opens = gate.z(GateState(age, rest, entropy), distance).item() + shift > 0
        rest = torch.zeros_like(rest) if opens else rest + 1
        opened += opens
    return opened / len(signals)


@torch.no_grad()
def set_share(gate: UpdateGate, signals: Sequence[Signals], share: float) -> None:
    """Move the gate's bias so that it opens at the largest share of the batches that is no more than ``share``.

    To the middle of the values that do so: other batches differ a little to either side.
    """
    most = _largest(lambda shift: share_opened(gate, signals, shift) <= share)
    reached = share_opened(gate, signals, most)
    least = _largest(lambda shift: share_opened(gate, signals, shift) < reached) if reached > 0 else most
    gate.bias.data += (least + most) / 2


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest shift of a bias at which something holds that holds for all smaller ones too, by bisection."""
    below, above = -FARTHEST, FARTHEST
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        below, above = (middle, above) if holds(middle) else (below, middle)
    return below


@contextmanager
def asked_share(
    policy: AdaptationPolicy, model: nn.Module, parameters: Parameters, tasks: Sequence[Task], share: float | None
) -> Iterator[None]:
    """Within it a gate that is being learned has the bias at which it opens as rarely as asked; then its own again."""
    gate = policy.part("update_gate")
    if gate is None or not gate.learned or share is None or not gate.bias.requires_grad:
        yield
        return
    before = gate.bias.detach().clone()
    set_share(gate, as_in_a_stream(gate_signals(policy, model, parameters, tasks)), share)
    try:
        yield
    finally:
        gate.bias.data.copy_(before)
