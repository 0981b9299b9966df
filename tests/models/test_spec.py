"""The model's identity in primitives."""

from pathlib import Path

import pytest

from metaopt.errors import CheckpointError, ModelError
from metaopt.files import atomic_save, safe_load
from metaopt.models.spec import ModelSpec


def test_round_trip_through_a_checkpoint(tmp_path: Path):
    spec = ModelSpec("resnet50", 1000, (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    atomic_save(spec.to_dict(), tmp_path / "a.pt")
    assert ModelSpec.from_dict(safe_load(tmp_path / "a.pt")) == spec
    assert ModelSpec.from_dict(ModelSpec("custom:Net", 2).to_dict()) == ModelSpec("custom:Net", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"input_size": (3, 0, 32)}, "input_size="),
    ],
)
def test_values_out_of_range_are_refused(change: dict, message: str):
    with pytest.raises(ModelError, match=message):
        ModelSpec(**{"name": "net", "num_classes": 10, **change})


@pytest.mark.parametrize("change", [{"extra": 1}, {"mean": (0.5, 0.5)}, {"num_classes": "many"}, {"input_size": (3,)}])
def test_a_foreign_dict_is_a_checkpoint_error(change: dict):
    with pytest.raises(CheckpointError, match="model spec"):
        ModelSpec.from_dict({**ModelSpec("net", 10).to_dict(), **change})
