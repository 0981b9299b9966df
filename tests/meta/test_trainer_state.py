"""The price of updates, and a gate that meta-training brings to the share of updates asked for."""

import pytest

from metaopt.data import load_digits
from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainConfig, MetaTrainer
from metaopt.meta.trainer_state import MULTIPLIER_SPAN, next_multiplier
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import small_digits, tiny_config, trained_model


def test_price_rises_above_the_share_falls_below_it_and_is_never_negative() -> None:
    assert next_multiplier(0.01, 0.75, 0.5, 100) == pytest.approx(0.01 + 0.0025 * MULTIPLIER_SPAN)
    assert next_multiplier(0.01, 0.25, 0.5, 100) == pytest.approx(0.01 - 0.0025 * MULTIPLIER_SPAN)
    assert next_multiplier(0.0, 0.0, 0.5, 100) == 0.0


@pytest.mark.parametrize("unrolls", [10, 120])
def test_a_training_of_any_length_moves_the_price_alike(unrolls: int) -> None:
    price = 0.0
    for _ in range(unrolls):
        price = next_multiplier(price, 0.75, 0.5, unrolls)
    assert price == pytest.approx(0.25 * MULTIPLIER_SPAN)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_share_of_none_or_all_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=rf"update_gate.share is {rate}; allowed are 0 < share < 1"):
        MetaTrainConfig(parts={"update_gate": {"share": rate}})


def test_training_learns_the_gate_and_a_resumed_run_goes_on_alike() -> None:
    parts = {**DEFAULT_PARTS, "update_gate": {"share": 0.3}}
    config = tiny_config(parts=parts, unrolls=4, epochs=3, lr=0.1, select_best=False)
    images = small_digits(load_digits().unlabeled)
    whole, first, second = (MetaTrainer(trained_model(), images, None, config) for _ in range(3))
    before = {
        name: tensor.clone()
        for name, tensor in whole.policy.state_dict().items()
        if name.startswith("parts.update_gate.")
    }
    expected = whole.run().state_dict()
    assert before and all((expected[name] != tensor).any() for name, tensor in before.items())
    assert whole.progress.lagrange_multiplier > 0
    first.run(stop_after=1)
    second.load_state_dict(first.state_dict())
    found = second.run().state_dict()
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert second.progress.lagrange_multiplier == whole.progress.lagrange_multiplier
