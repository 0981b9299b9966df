"""The hand-made rules against torch's own optimizers."""

import math

import pytest
import torch

from metaopt.errors import ConfigError
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.sgd import SGD
from metaopt.types import UpdateRule

from .test_mgg import drawn


@pytest.mark.parametrize(
    ("rule", "build"),
    [
        (Adam(lr=0.02), lambda tensors: torch.optim.Adam(tensors, lr=0.02)),
        (Adam(0.1, (0.8, 0.95), 1e-4), lambda tensors: torch.optim.Adam(tensors, 0.1, (0.8, 0.95), 1e-4)),
        (SGD(lr=0.02), lambda tensors: torch.optim.SGD(tensors, lr=0.02, momentum=0.9)),
        (SGD(lr=0.02, momentum=0.0), lambda tensors: torch.optim.SGD(tensors, lr=0.02)),
    ],
)
def test_twenty_steps_are_torchs(rule: UpdateRule, build) -> None:  # type: ignore[no-untyped-def]
    gradients = drawn(20)
    ours = {name: torch.ones_like(tensor) for name, tensor in gradients[0].items()}
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in ours.items()}
    optimizer, state = build(list(theirs.values())), rule.init(ours)
    for given in gradients:
        updates, state = rule.update(given, state)
        ours = {name: tensor - updates[name] for name, tensor in ours.items()}
        for name, tensor in theirs.items():
            tensor.grad = given[name].clone()
        optimizer.step()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.inf, math.nan])
def test_rates_out_of_range_are_refused(lr: float) -> None:
    with pytest.raises(ConfigError, match=r"method.lr of adam is .*; it must be positive and finite"):
        Adam(lr)
    with pytest.raises(ConfigError, match=r"method.lr of sgd is .*; it must be positive and finite"):
        SGD(lr)


def test_a_momentum_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.rule.momentum is 1.0; it must lie in \[0, 1\)"):
        SGD(momentum=1.0)
