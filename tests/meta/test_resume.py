"""Going on where a run was left: bit for bit, from any unroll, or not at all."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.errors import CheckpointError
from metaopt.files import atomic_save, safe_load
from metaopt.meta import MetaTrainer
from metaopt.optimizers.mgg import GeneratorConfig

from ..tiny import random_images, tiny_config, tiny_model

IMAGES = random_images(32)


def new_trainer(seed: int = 0, shifts: list[str] | None = None, **changes: Any) -> MetaTrainer:
    return MetaTrainer(tiny_model(seed), IMAGES, shifts, tiny_config(**{"epochs": 6, **changes}))


def bit_equal(first: Any, second: Any) -> bool:
    """Whether two trees of primitives and tensors are the same, types and bits."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(bit_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(bit_equal(a, b) for a, b in zip(first, second, strict=True))
    return type(first) is type(second) and first == second


def through_file(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    atomic_save(state, folder / "last.pt")
    return safe_load(folder / "last.pt")


@pytest.fixture(scope="module")
def unbroken() -> tuple[dict[str, Any], dict[str, Tensor]]:
    trainer = new_trainer()
    policy = trainer.run()
    return trainer.state_dict(), policy.state_dict()


def test_stopped_and_resumed_is_unbroken(unbroken: Any, tmp_path: Path) -> None:
    first = new_trainer()
    first.run(stop_after=3)
    assert first.progress.epoch == 3
    second = new_trainer()
    second.load_state_dict(through_file(first.state_dict(), tmp_path))
    policy = second.run()
    assert second.progress.epoch == 6
    assert bit_equal(second.state_dict(), unbroken[0])
    assert bit_equal(dict(policy.state_dict()), dict(unbroken[1]))


def test_stopped_and_called_again_is_unbroken(unbroken: Any) -> None:
    trainer = new_trainer()
    for stop_after in (1, 2, 100):
        trainer.run(stop_after=stop_after)
    assert bit_equal(trainer.state_dict(), unbroken[0])
    trainer.run()  # nothing is left to do
    assert bit_equal(trainer.state_dict(), unbroken[0])


@pytest.mark.parametrize("at", [1, 5, 6, 12])
def test_resumed_from_the_middle_of_an_epoch(at: int, unbroken: Any, tmp_path: Path) -> None:
    snapshots: list[dict[str, Any]] = []
    first = new_trainer()
    first.run(on_unroll=lambda loss: snapshots.append(first.state_dict()))
    assert len(snapshots) == 12
    second = new_trainer()
    second.load_state_dict(through_file(snapshots[at - 1], tmp_path))
    assert second.progress.updates == at
    second.run()
    assert bit_equal(second.state_dict(), unbroken[0])


def test_a_running_unroll_and_learned_statistics_resume_too(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "epochs": 2,
        "update_every": 2,
        "objective": {"entropy": 1.0, "discrepancy": 0.2},
        "generator": GeneratorConfig(variant="published"),
    }
    whole, first, second = (new_trainer(**changes) for _ in range(3))
    whole.run()
    first.run(stop_after=1)
    second.load_state_dict(through_file(first.state_dict(), tmp_path))
    second.run()
    assert bit_equal(second.state_dict(), whole.state_dict())


def test_a_state_is_a_copy(unbroken: Any) -> None:
    first = new_trainer()
    first.run(stop_after=2)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    first.run(stop_after=1)
    assert bit_equal(state, kept)
    for _ in range(2):  # the first of the two must not train on the state's own tensors
        second = new_trainer()
        second.load_state_dict(state)
        second.run()
        assert bit_equal(state, kept)
        assert bit_equal(second.state_dict(), unbroken[0])


def test_the_best_policy_is_a_copy(unbroken: Any) -> None:
    trainer = new_trainer()
    policy = trainer.run(stop_after=3)
    with torch.no_grad():
        for tensor in policy.parameters():
            tensor.fill_(9.0)
    policy.double()
    trainer.run()
    assert bit_equal(trainer.state_dict(), unbroken[0])


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def put(value: Any, *keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


DAMAGE: list[Callable[[dict[str, Any]], None]] = [
    *(drop(key) for key in ("config", "source", "shifts", "weights", "optimizer", "randomness", "progress", "best")),
    *(put(None, key) for key in ("config", "weights", "optimizer", "randomness", "progress", "best")),
    drop("weights", "rule.log_step_sizes"),
    drop("best", "rule.log_step_sizes"),
    put(torch.zeros(3), "weights", "rule.log_step_sizes"),
    put(torch.zeros(3), "best", "rule.memory.key"),
    put([], "optimizer", "param_groups"),
    put(torch.zeros(5, dtype=torch.uint8), "randomness"),
    put(3, "progress", "speed"),
    put(None, "progress", "selection"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_state_is_refused_and_changes_nothing(number: int, half_way: dict[str, Any]) -> None:
    state = copy.deepcopy(half_way)
    DAMAGE[number](state)
    trainer = new_trainer()
    trainer.run(stop_after=1)
    before = trainer.state_dict()
    with pytest.raises(CheckpointError, match="is damaged"):
        trainer.load_state_dict(state)
    assert bit_equal(trainer.state_dict(), before)


@pytest.fixture(scope="module")
def half_way() -> dict[str, Any]:
    trainer = new_trainer()
    trainer.run(stop_after=2)
    return trainer.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "other settings of lr; allowed are the same ones"),
        ({"epochs": 7, "unrolls": 3}, "other settings of epochs, unrolls"),
        ({"generator": GeneratorConfig(lr=1.0)}, "other settings of generator"),
        ({"shifts": ["gaussian_blur"]}, "other settings of shifts"),
        ({"seed": 1}, "another source model"),
    ],
)
def test_another_run_is_refused_and_changes_nothing(changes: Any, message: str, half_way: dict[str, Any]) -> None:
    trainer = new_trainer(**changes)
    before = trainer.state_dict()
    with pytest.raises(CheckpointError, match=message):
        trainer.load_state_dict(half_way)
    assert bit_equal(trainer.state_dict(), before)
