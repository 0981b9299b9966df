"""What the library computes is what it computed when the golden file was recorded."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from .build import MODELS, RESNET, VIT, build_model, weights_of
from .cases import CASES, FILE, POLICIES, RESNET_ONLY, moved_policy, packed

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # times 1 + |expected|
LOOSER = {f"{RESNET}/training rates": 1e-6}  # layers' importance is float32: rounding of inputs alone moves it by 3e-9
QUICK = {  # the others are for `make test-slow`
    *(f"{model}/{name}" for model in MODELS for name in ("tent", "policy default", "policy gate")),
    *(f"{VIT}/{name}" for name in ("model", "adam, all parts", "cotta", "policy experts", "training gate")),
    f"{RESNET}/policy default, float32",
}


@cache
def golden() -> dict[str, Any]:
    return torch.load(FILE, weights_only=True)


def check(found: Any, expected: Any, tolerance: float, where: str) -> None:
    """Same structure, same numbers to ``tolerance * (1 + |expected|)``; all else equal."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            check(found[key], value, tolerance, f"{where}/{key}")
    elif isinstance(expected, Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), where
        assert torch.isfinite(found).all(), where
        excess = ((found - expected).abs() / (1 + expected.abs())).max().item()
        assert excess <= tolerance, f"{where}: differs by {excess:.2g} of 1 + |expected|, allowed is {tolerance:g}"
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_outputs_are_the_recorded_ones(name: str) -> None:
    case = CASES[name]
    tolerance = LOOSER.get(name, TOLERANCE[case.dtype])
    check(case.run(golden()["policies"]), golden()["outputs"][name], tolerance, name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", POLICIES)
def test_policies_before_training_are_the_recorded_ones(model: str, name: str) -> None:
    """Fresh parts start at the same values: those of the file are these, moved by seeded noise in the old order."""
    if model != RESNET and name in RESNET_ONLY:
        pytest.skip("not recorded on this model")
    found = packed(weights_of(moved_policy(build_model(model), name)))
    check(found, golden()["policies"][f"{model}/{name}"]["weights"], TOLERANCE[torch.float64], f"{model}/{name}")


def test_every_case_was_recorded() -> None:
    assert list(golden()["outputs"]) == list(CASES)
