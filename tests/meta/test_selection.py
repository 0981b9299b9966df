"""Model selection: which epoch's weights a training hands back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.meta import MetaTrainer
from metaopt.meta import trainer as module
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import random_images, tiny_config, tiny_model


def trainer_with(**changes: Any) -> MetaTrainer:
    return MetaTrainer(tiny_model(), random_images(32), None, tiny_config(**changes))


def flat(trainer: MetaTrainer) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in trainer.policy.parameters()])


def scripted_selection(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    rest = iter(losses)
    monkeypatch.setattr(module, "selection_loss", lambda *_: next(rest))


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([1.0, 0.9, 0.5, 0.7], 2),
        ([1.0, 1.1, 1.2, 1.3], 0),
        ([1.0, float("nan"), 0.9, float("nan")], 2),
        ([1.0, 0.9, 0.9, 0.8], 3),
    ],
)
def test_selection_keeps_the_best_epoch(losses: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_selection(monkeypatch, losses)
    trainer = trainer_with(epochs=3, unrolls=1, steps=1)
    weights = [flat(trainer)]
    policy = trainer.run(on_epoch=lambda: weights.append(flat(trainer)))
    assert len({float(row.sum()) for row in weights}) == 4
    assert torch.equal(torch.cat([tensor.detach().flatten() for tensor in policy.parameters()]), weights[best])
    assert policy.training["best_epoch"] == best
    assert policy.training["selection"] == pytest.approx(losses, nan_ok=True)
    assert torch.equal(flat(trainer), weights[3])  # training goes on from where it is, not from the best


@pytest.mark.parametrize(("bias", "price"), [(40.0, 0.35), (-40.0, 0.0)])
def test_updates_beyond_the_share_that_is_allowed_cost_as_much_as_the_share_beyond(bias: float, price: float) -> None:
    """A gate that is always open goes beyond any share, one that never is beyond none; frozen, they stay so."""

    def score(allowed: float) -> float:
        parts = {**DEFAULT_PARTS, "update_gate": {"share": allowed}}
        trainer = trainer_with(parts=parts, frozen=("update_gate",), selection_tasks=2)
        trainer.policy.part("update_gate").bias.data.fill_(bias)
        trainer.run(stop_after=0)
        return trainer.progress.selection[0]

    assert score(0.25) - score(0.6) == pytest.approx(price, abs=1e-5)


def test_without_selection_the_last_epoch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_selection(monkeypatch, [0.1, 0.2, 0.3])
    trainer = trainer_with(epochs=2, unrolls=1, steps=1, select_best=False)
    policy = trainer.run()
    assert torch.equal(torch.cat([tensor.detach().flatten() for tensor in policy.parameters()]), flat(trainer))


def test_selection_waits_for_unrolls_of_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_selection(monkeypatch, [1.0, 1.2, 0.8, 0.9])
    trainer = trainer_with(epochs=6, unrolls=1, steps=4, first_steps=2, curriculum=0.5)
    assert [epoch for epoch in range(7) if trainer.config.is_scored(epoch)] == [0, 4, 5, 6]
    weights = [flat(trainer)]

    def kept() -> tuple[int, Tensor]:
        policy = trainer.best_policy()
        found = torch.cat([tensor.detach().flatten() for tensor in policy.parameters()])
        return policy.training["best_epoch"], found

    latest: list[tuple[int, Tensor]] = []

    def note() -> None:
        weights.append(flat(trainer))
        latest.append(kept())

    trainer.run(on_epoch=note)
    # Nothing is scored yet: the latest. Then the best of what is, the start among it.
    assert [epoch for epoch, _ in latest] == [1, 2, 3, 0, 5, 5]
    assert all(torch.equal(found, weights[epoch]) for epoch, found in latest)
