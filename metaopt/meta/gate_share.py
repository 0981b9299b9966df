"""The share of batches at which an update gate opens, set exactly once its weights are learned.

The price under which a gate learns brings its share near the one that is asked for, not to it. So whenever a policy is
scored, the gate's bias is moved until it opens at no more than that share of the held-out tasks' batches, each task a
domain of its own. What the gate sees there hardly depends on the updates, so that one run without any tells it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.meta.tasks import Task
from metaopt.policy import AdaptationPolicy
from metaopt.policy.gate import GateState, LearnedGate, stepped
from metaopt.policy.response import respond, sense
from metaopt.types import Parameters

if TYPE_CHECKING:
    from metaopt.meta.trainer import MetaTrainer

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
            images = task[position].images
            sensed = sense(policy, model, adapted, state, images)
            assert sensed is not None
            adapted, state = respond(policy, model, adapted, state, sensed)
            assert state.gate is not None
            found.append(Signals(sensed.distance, state.gate.age, state.gate.entropy))
            logits = policy.predict(model, adapted, images, teacher=state.teacher).logits
            state = replace(state, gate=stepped(state.gate, logits, updated=False))
    return found


@torch.no_grad()
def share_opened(gate: LearnedGate, signals: Sequence[Signals], shift: float = 0.0) -> float:
    """Share of the batches at which the gate opens, its bias moved by ``shift``."""
    opened, rest = 0, torch.zeros(())
    for distance, age, entropy in signals:
        rest = torch.zeros_like(age) if age == 0 else rest
        opens = gate(GateState(age, rest, entropy), distance).item() + shift > 0
        rest = torch.zeros_like(rest) if opens else rest + 1
        opened += opens
    return opened / len(signals)


@torch.no_grad()
def set_share(gate: LearnedGate, signals: Sequence[Signals], share: float) -> None:
    """Move the gate's bias to the largest at which it opens at no more than ``share`` of the batches."""
    below, above = -FARTHEST, FARTHEST
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        if share_opened(gate, signals, middle) > share:
            above = middle
        else:
            below = middle
    gate.bias.data += below


@contextmanager
def asked_share(trainer: "MetaTrainer") -> Iterator[None]:
    """Within it a gate that is being learned has the bias at which it opens as rarely as asked; then its own again."""
    gate, share = trainer.policy.gate, trainer.config.update_rate
    if not isinstance(gate, LearnedGate) or share is None or not gate.bias.requires_grad:
        yield
        return
    before = gate.bias.detach().clone()
    set_share(gate, gate_signals(trainer.policy, trainer.model, trainer.parameters, trainer.selection), share)
    try:
        yield
    finally:
        gate.bias.data.copy_(before)
