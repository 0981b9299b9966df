"""Training that begins with another policy, and parts that it leaves alone."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.errors import CheckpointError, ConfigError
from metaopt.meta import MetaTrainConfig, MetaTrainer, meta_train
from metaopt.meta.unroll import learned_groups
from metaopt.optimizers.mgg import GeneratorConfig
from metaopt.policy import AdaptationPolicy
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import random_images, tiny_config, tiny_model

IMAGES = random_images(32, 3)
FROZEN = ("generator", "objective", "restoration", "batch_statistics", "initialization")
UNTOLD = ("class_skew",)  # learned where a batch is skewed, which none of these is
LISTED = ("objective", "generator", "batch_statistics", "initialization", "restoration", "class_skew")  # as messages do
GATED = {**DEFAULT_PARTS, "update_gate": {"share": 0.5}}


def trained(**changes: Any) -> AdaptationPolicy:
    return trainer_with(**changes).run()


def trainer_with(start: AdaptationPolicy | None = None, seed: int = 0, **changes: Any) -> MetaTrainer:
    config = tiny_config(**{"epochs": 1, "select_best": False, **changes})
    return MetaTrainer(tiny_model(seed), IMAGES, None, config, start=start)


def weights_of(policy: AdaptationPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def group_of(policy: AdaptationPolicy) -> dict[str, str]:
    """The group of each tensor that learns."""
    return {name: group for group, names in learned_groups(policy).items() for name in names}


def test_a_gate_is_learned_on_top_of_a_policy_that_stays_bit_for_bit() -> None:
    start = trained()
    before = weights_of(start)
    policy = trained(start=start, parts=GATED, frozen=FROZEN)
    after = weights_of(policy)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert sorted(set(after) - set(before)) == ["parts.update_gate.bias", "parts.update_gate.weights"]
    fresh = weights_of(trainer_with(parts=GATED).policy)
    assert not torch.equal(after["parts.update_gate.weights"], fresh["parts.update_gate.weights"])
    assert policy.training["config"]["frozen"] == FROZEN


def test_a_policy_knows_the_shifts_of_all_trainings_before_it(tmp_path: Path) -> None:
    first = MetaTrainer(tiny_model(), IMAGES, ["fog"], tiny_config(epochs=1, selection_shifts=("frost",))).run()
    first.save(tmp_path / "first.pt")
    loaded = AdaptationPolicy.load(tmp_path / "first.pt")
    second = MetaTrainer(tiny_model(), IMAGES, ["spatter"], tiny_config(epochs=1), start=loaded).run()
    third = trained(start=second, parts=GATED, only=("update_gate",))
    assert first.known_shifts == {"fog", "frost"}
    assert second.known_shifts == {"fog", "frost", "spatter", "gamma", "posterise"}
    assert third.known_shifts > second.known_shifts and third.training["shifts"] != second.training["shifts"]


def test_a_training_that_goes_on_without_its_start_still_knows_its_shifts() -> None:
    start = MetaTrainer(tiny_model(), IMAGES, ["fog"], tiny_config(epochs=1)).run()
    stopped = trainer_with(start, epochs=2)
    stopped.run(stop_after=1)
    resumed = trainer_with(None, epochs=2)
    resumed.load_state_dict(stopped.state_dict())
    assert "fog" in resumed.run().known_shifts
    older = {key: value for key, value in stopped.state_dict().items() if key != "start_shifts"}
    resumed = trainer_with(start, epochs=2)
    resumed.load_state_dict(older)
    assert "fog" in resumed.best_policy().known_shifts


def test_only_the_gate_learns_as_where_all_else_is_frozen() -> None:
    start = trained()
    frozen = weights_of(trained(start=start, parts=GATED, frozen=FROZEN))
    only = weights_of(trained(start=start, parts=GATED, only=("update_gate",)))
    assert all(torch.equal(only[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize(
    ("only", "with_start", "message"),
    [
        (
            ("update_gate",),
            False,
            r"meta.only=\[update_gate\] leaves the generator untrained; .* set start=start.pt, that policy.*, or add",
        ),
        (
            ("pruning",),
            True,
            r"meta.only names 'pruning'; allowed are the parts that this policy learns, .*generator, .*gate",
        ),
        ((), True, r"meta.frozen=\[.*generator,.*gate.*\] leaves nothing to learn"),
    ],
)
def test_what_alone_learns_is_checked(only: tuple[str, ...], with_start: bool, message: str) -> None:
    start = trained() if with_start else None
    with pytest.raises(ConfigError, match=message):
        trainer_with(start=start, parts=GATED, only=only)


def test_without_frozen_parts_training_goes_on_from_the_start() -> None:
    start = trained()
    trainer = trainer_with(start=start)
    begun = weights_of(trainer.policy)
    assert all(torch.equal(begun[name], tensor) for name, tensor in start.state_dict().items())
    moved = weights_of(trainer.run())
    group = group_of(trainer.policy)
    assert {group[name] for name in begun if not torch.equal(moved[name], begun[name])} == set(FROZEN)
    assert all(torch.equal(begun[name], tensor) for name, tensor in start.state_dict().items()), "start is only read"


@pytest.mark.parametrize("part", FROZEN)
def test_one_frozen_part_stays_and_the_others_move(part: str) -> None:
    trainer, group = trainer_with(frozen=(part,)), group_of(trainer_with().policy)
    before = weights_of(trainer.policy)
    after = weights_of(trainer.run())
    still = {name for name, tensor in trainer.policy.named_parameters() if torch.equal(after[name], before[name])}
    own = {name for name, _ in trainer.policy.named_parameters() if group[name] == part}
    assert own and own <= still
    assert {group[name] for name in before if not torch.equal(after[name], before[name])} == {
        other for other in FROZEN if other != part
    }


def test_every_learned_tensor_belongs_to_one_part() -> None:
    policy = trainer_with(parts={**GATED, "pruning": "learned"}).policy
    names = [name for name, tensor in policy.named_parameters() if tensor.requires_grad]
    groups = learned_groups(policy)
    assert set(groups) == {*FROZEN, *UNTOLD, "update_gate", "pruning"}
    assert sorted(name for found in groups.values() for name in found) == sorted(names)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (
            ("update_gate",),
            rf"meta.frozen names 'update_gate'; allowed are .*{', '.join(LISTED)}: choose",
        ),
        (("nothing",), r"meta.frozen names 'nothing'; allowed are"),
        (
            (*FROZEN, *UNTOLD),
            rf"meta.frozen=\[{','.join(LISTED)}\] leaves nothing to learn",
        ),
    ],
)
def test_frozen_parts_are_checked(frozen: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_with(frozen=frozen)


def test_a_start_that_does_not_fit_is_refused() -> None:
    start = trained()
    with pytest.raises(CheckpointError, match=r"trained on weights .* set model.checkpoint to their file"):
        trainer_with(start=start, seed=1)
    other = GeneratorConfig(**{**start.training["config"]["generator"], "hidden": 4})
    with pytest.raises(CheckpointError, match=re.escape("other settings of generator.hidden; allowed are the same")):
        trainer_with(start=start, generator=other)


def test_step_sizes_are_handed_back_scaled_and_go_on_unscaled() -> None:
    plain, long = (weights_of(trained(deploy_step_scale=scale)) for scale in (1.0, 1.5))
    for name, tensor in plain.items():
        longer = math.log(1.5) if name == "rule.log_step_sizes" else 0.0
        torch.testing.assert_close(long[name], tensor + longer, rtol=0.0, atol=1e-6)
    start = trained(deploy_step_scale=1.5)
    begun = weights_of(trainer_with(start=start, deploy_step_scale=1.5).policy)
    torch.testing.assert_close(begun["rule.log_step_sizes"], plain["rule.log_step_sizes"], rtol=0.0, atol=1e-6)
    on_top = trained(start=start, parts=GATED, frozen=FROZEN, deploy_step_scale=1.5)
    assert torch.equal(weights_of(on_top)["rule.log_step_sizes"], long["rule.log_step_sizes"])
    with pytest.raises(ConfigError, match=r"meta.deploy_step_scale is 0.0; it must be positive"):
        tiny_config(deploy_step_scale=0.0)


def test_the_library_call_takes_a_start() -> None:
    start = trained()
    config = MetaTrainConfig(**{**vars(tiny_config(epochs=1, select_best=False)), "frozen": FROZEN, "parts": GATED})
    policy = meta_train(tiny_model(), IMAGES, config=config, start=start, quiet=True)
    assert torch.equal(policy.state_dict()["rule.log_step_sizes"], start.state_dict()["rule.log_step_sizes"])
    assert policy.part("update_gate") is not None
