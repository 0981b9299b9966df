"""Settings of meta-training: every range, its message, and the growing unroll."""

import json

import pytest

from metaopt.errors import ConfigError
from metaopt.files import atomic_save, safe_load
from metaopt.meta import MetaTrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "labels"}, "meta.loss is 'labels'; allowed are clean_teacher, unsupervised"),
        ({"backend": "jax"}, "meta.backend is 'jax'; allowed are func, torchopt, higher"),
        ({"schedule": "step"}, "meta.schedule is 'step'; allowed are cosine, constant"),
        *(
            ({key: 0}, f"meta.{key} is 0; allowed are finite values of at least 1")
            for key in ("steps", "first_steps", "epochs", "unrolls", "selection_tasks", "update_every")
        ),
        *(
            ({key: value}, f"meta.{key} is {value}; it must be positive and finite")
            for key in ("lr", "clip_norm")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
        ({"selection_shifts": ()}, "meta.selection_shifts is empty; at least one shift is needed"),
        *(({"shrinkage": value}, "meta.shrinkage is") for value in (-0.1, float("nan"), float("inf"))),
        *(({"curriculum": value}, "meta.curriculum") for value in (-0.1, 1.1, float("nan"))),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetaTrainConfig(**change)  # type: ignore[arg-type]


def test_the_edges_of_the_ranges_are_allowed() -> None:
    least = MetaTrainConfig(steps=1, first_steps=1, epochs=1, unrolls=1, selection_tasks=1, update_every=1, shrinkage=0)
    assert least.steps_at(0) == 1
    assert MetaTrainConfig(curriculum=0.0, steps=4, first_steps=2, epochs=3).steps_at(2) == 4
    assert MetaTrainConfig(curriculum=1.0, steps=4, first_steps=2, epochs=3).steps_at(0) == 2


def test_the_unroll_grows_over_the_curriculum() -> None:
    config = MetaTrainConfig(steps=10, first_steps=2, epochs=8, curriculum=0.5)
    assert [config.steps_at(epoch) for epoch in range(8)] == [2, 4, 6, 8, 10, 10, 10, 10]
    whole = MetaTrainConfig(steps=6, first_steps=2, epochs=4, curriculum=1.0)
    assert [whole.steps_at(epoch) for epoch in range(4)] == [2, 3, 4, 5]
    none = MetaTrainConfig(steps=6, first_steps=6, epochs=3)
    assert [none.steps_at(epoch) for epoch in range(3)] == [6, 6, 6]
    short = MetaTrainConfig(steps=1, first_steps=2, epochs=3)
    assert [short.steps_at(epoch) for epoch in range(3)] == [1, 1, 1]


def test_settings_become_primitives_and_survive_a_file(tmp_path) -> None:
    values = MetaTrainConfig(update_every=2).to_dict()
    json.dumps(values)
    atomic_save(values, tmp_path / "config.pt")
    assert safe_load(tmp_path / "config.pt") == values
    assert MetaTrainConfig(seed=1).to_dict() != MetaTrainConfig().to_dict()
