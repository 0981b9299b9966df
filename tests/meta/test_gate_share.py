"""The share of batches that a learned gate opens at: what it sees, what it decides, and the bias that gives it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from metaopt.meta import MetaTrainer
from metaopt.meta.evaluate import deployed
from metaopt.meta.gate_share import Signals, as_in_a_stream, asked_share, gate_signals, set_share, share_opened
from metaopt.meta.loss import CleanTeacher
from metaopt.policy.parts.update_gate import UpdateGate
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import random_images, tiny_config, tiny_model

IMAGES = random_images(32, 3)
GATED = {**DEFAULT_PARTS, "update_gate": {"share": 0.4}}


def trainer_with(parts: Mapping[str, Any] = GATED, **changes: Any) -> MetaTrainer:
    values = {"steps": 5, "selection_tasks": 3, "epochs": 1, "continued": 0.0, **changes}
    trainer = MetaTrainer(tiny_model(), IMAGES, None, tiny_config(parts=parts, **values))
    gate = trainer.policy.part("update_gate")
    if gate is not None:
        gate.weights.data = torch.tensor([0.3, -0.9, 0.8, 0.0])
    return trainer


def gate_of(trainer: MetaTrainer) -> UpdateGate:
    gate = trainer.policy.part("update_gate")
    assert isinstance(gate, UpdateGate) and gate.learned
    return gate


def signals_of(trainer: MetaTrainer) -> list[Signals]:
    return gate_signals(trainer.policy, trainer.model, trainer.parameters, trainer.selection)


def within_share(trainer: MetaTrainer) -> AbstractContextManager[None]:
    return asked_share(trainer.policy, trainer.model, trainer.parameters, trainer.selection, trainer.config.gate_share)


def test_batches_of_few_images_count_as_far_apart_as_those_of_a_stream() -> None:
    """Batches of 16 from the same 32 images resemble each other; of new images the distance is about 1."""
    signals = signals_of(trainer_with())
    near = [each.distance.item() for each in signals]
    assert min(near) < 0.9
    assert [each.distance.item() for each in as_in_a_stream(signals)] == [max(1.0, distance) for distance in near]


@pytest.mark.parametrize("bias", [-0.5, 0.3, 1.5])
def test_replayed_decisions_are_those_of_deployment(bias: float) -> None:
    trainer = trainer_with({**GATED, "restoration": False})  # a restoration might begin a task anew
    gate = gate_of(trainer)
    gate.bias.data.fill_(bias)
    signals = signals_of(trainer)
    assert [int(each.age) for each in signals] == [0, 1, 2, 3, 4, 5] * 3
    updates = 0
    for task in trainer.selection:
        with torch.no_grad():
            state = trainer.policy.init(trainer.parameters)
        run = deployed(trainer.policy, trainer.model, trainer.parameters, state, task, CleanTeacher())
        updates += run.updates
    assert updates == round(share_opened(gate, signals) * len(signals))
    assert 0 < updates < len(signals) or bias != 0.3


def test_the_bias_gives_the_largest_share_that_is_allowed() -> None:
    trainer = trainer_with()
    gate, signals = gate_of(trainer), signals_of(trainer)
    shifts = torch.linspace(-8, 8, 3201).tolist()
    for share in (0.1, 0.4, 0.75):
        set_share(gate, signals, share)
        found = share_opened(gate, signals)
        assert share - 0.2 < found <= share
        # It lies in the middle of the biases with that share, above which it opens more often than is allowed.
        same = [shift for shift in shifts if share_opened(gate, signals, shift) == found]
        assert max(same) == pytest.approx(-min(same), abs=0.015)
        assert share_opened(gate, signals, max(same) + 0.02) > share
    gate.bias.data.fill_(40.0)
    set_share(gate, signals, 0.4)
    assert 0.2 < share_opened(gate, signals) <= 0.4


def test_training_keeps_its_own_bias_and_what_is_kept_has_the_share() -> None:
    trainer = trainer_with()
    gate = gate_of(trainer)
    gate.bias.data.fill_(5.0)
    with within_share(trainer):
        assert 0.2 < share_opened(gate, as_in_a_stream(signals_of(trainer))) <= 0.4
    assert float(gate.bias.detach()) == 5.0
    trainer.run()
    policy = trainer.best_policy()
    signals = gate_signals(policy, trainer.model, trainer.parameters, trainer.selection)
    assert 0.2 < share_opened(policy.part("update_gate"), as_in_a_stream(signals)) <= 0.4


def test_a_frozen_gate_and_a_policy_without_one_are_left_alone() -> None:
    frozen = trainer_with(frozen=("update_gate",))
    gate_of(frozen).bias.data.fill_(5.0)
    with within_share(frozen):
        assert float(gate_of(frozen).bias.detach()) == 5.0
    without = trainer_with(DEFAULT_PARTS)
    with within_share(without):
        assert without.policy.part("update_gate") is None
