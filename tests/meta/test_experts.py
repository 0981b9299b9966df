"""Meta-training of experts: what changes, what stays, what the file holds, and that it deploys by itself."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.errors import CheckpointError, ConfigError, DataError
from metaopt.evaluation import Monitor, read_scalars
from metaopt.meta import MetaTrainConfig, MetaTrainer
from metaopt.meta.unroll import learned_tensors
from metaopt.models import SourceModel
from metaopt.models.spec import ModelSpec
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.part import settings
from metaopt.policy.parts.experts import HANDING_ON, ExpertsPart, ExpertsPartConfig
from metaopt.policy.parts.teacher import TeacherConfig
from metaopt.policy.untrained import DEFAULT_PARTS

from ..tiny import random_images, tiny_config
from .cases import TinyResNet

EXPERTS = ExpertsPartConfig(experts=2, bottleneck=4, asg_range=0.3, dropout="straight_through")
TEACHER = TeacherConfig(restore=0.0, proximal=0.01, anchor="initial")


def source() -> SourceModel:
    """A small ResNet whose two blocks are its sites."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SourceModel(TinyResNet(), spec=ModelSpec("custom:tiny", 4, (3, 16, 16)))


def config_with(experts: dict[str, Any], **changes: Any) -> MetaTrainConfig:
    parts = {**DEFAULT_PARTS, "experts": replace(EXPERTS, **experts), "teacher": TEACHER}
    return tiny_config(parts=parts, **changes)


def trainer_with(**experts: Any) -> MetaTrainer:
    return MetaTrainer(source(), random_images(32), None, config_with(experts, select_best=False))


def experts_of(policy: AdaptationPolicy) -> ExpertsPart:
    part = policy.part("experts")
    assert isinstance(part, ExpertsPart)
    return part


def handed_on(part: ExpertsPart) -> float:
    """Sum of squares of the tensors by which experts add to the network."""
    named = part.initial().items()
    return sum(float(t.detach().double().square().sum()) for n, t in named if n.rpartition(".")[2] in HANDING_ON)


def test_learned_parts_move_frozen_ones_and_the_network_stay(tmp_path: Path) -> None:
    for parts, still in (({}, None), ({"gates": "frozen"}, "router"), ({"initial": "frozen"}, "_weight")):
        model = source()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with Monitor(tmp_path / str(still)) as monitor:
            trainer = MetaTrainer(model, random_images(32), None, config_with(parts), monitor)
            start = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
            trainer.run()
        weights = trainer.policy.state_dict()
        moved = {name for name in start if not torch.equal(weights[name], start[name])}
        # Nothing tells the scales of a part that finds no batch skewed.
        assert moved == set(learned_tensors(trainer.policy)) - {"parts.class_skew.log_scales"}
        assert not any(still in name for name in moved if still is not None and name.startswith("parts.experts."))
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        curves = {
            part for part in ("generator", "objective", "gates", "experts") if has_curve(tmp_path / str(still), part)
        }
        frozen = {None: set(), "router": {"gates"}, "_weight": {"experts"}}[still]
        assert curves == {"generator", "objective", "gates", "experts"} - frozen


def has_curve(folder: Path, part: str) -> bool:
    try:
        return len(read_scalars(folder, f"meta/grad_norm/{part}")) > 0
    except DataError:
        return False


def test_the_file_holds_experts_and_deploys_by_itself(tmp_path: Path) -> None:
    trainer = trainer_with()
    trainer.run()
    policy = trainer.best_policy()
    policy.save(tmp_path / "ckpt.pt")
    values = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    experts = values["parts"]["experts"]
    assert (experts["config"]["gates"], experts["config"]["initial"]) == ("learned", "learned")
    assert [site["name"] for site in experts["sites"]] == ["blocks.0", "blocks.1"]
    loaded = AdaptationPolicy.load(tmp_path / "ckpt.pt")
    assert experts_of(loaded).config == EXPERTS
    assert (loaded.part("teacher").config, loaded.adapts) == (TEACHER, "experts_norm")
    assert set(learned_tensors(loaded)) == set(learned_tensors(policy))
    assert loaded.source is not None and any(name.startswith("experts.") for name in loaded.source.layout.names)
    section = MethodConfig("policy", update="generator", objective_from_policy=True, inherit=True)
    first, second = OnlineAdapter(source(), policy), OnlineAdapter(source(), build_method(section, policy=loaded))
    for seed in range(3):
        assert torch.equal(first(random_images(8, seed)), second(random_images(8, seed)))
    start = first.model.get_parameter("experts.blocks/0.up_weight")
    assert start.any() and torch.equal(start, experts_of(policy).initial()["experts.blocks/0.up_weight"])
    assert not torch.equal(first.parameters["experts.blocks/0.up_weight"], start)
    del experts["sites"][0]
    torch.save(values, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        AdaptationPolicy.load(tmp_path / "bad.pt")


def test_a_run_goes_on_bit_identically() -> None:
    whole, first, second = trainer_with(), trainer_with(), trainer_with()
    whole.run()
    first.run(stop_after=1)
    second.load_state_dict(first.state_dict())
    second.run()
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="other settings of parts"):
        trainer_with(gates="frozen").load_state_dict(first.state_dict())


def test_experts_have_a_rate_and_a_decay_of_their_own() -> None:
    """Adam's first step is its rate: of the policy's numbers 0.03, of gates and first values the experts' own."""

    def after_a_step(lr: float) -> tuple[float, float, float]:
        config = config_with({"lr": lr}, epochs=1, unrolls=1, select_best=False)
        trainer = MetaTrainer(source(), random_images(32), None, config)
        start = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
        assert handed_on(experts_of(trainer.policy)) == 0.0  # they add nothing at the start
        trainer.run()
        step = {name: (t - start[name]).abs().max().item() for name, t in trainer.policy.state_dict().items()}
        gate, first = (f"parts.experts.mixtures.blocks/0.{end}" for end in ("dag.router.weight", "up_weight"))
        return step["rule.log_step_sizes"], step[gate], step[first]

    number, gate, first = after_a_step(lr=1e-3)
    assert number == pytest.approx(3e-2, rel=1e-3)
    assert first == pytest.approx(1e-3, rel=1e-3) and 0 < gate < 1.001e-3

    def after_four_epochs(decay: float) -> float:
        config = config_with({"decay": decay, "lr": 1e-2}, epochs=4, select_best=False)
        trainer = MetaTrainer(source(), random_images(32), None, config)
        trainer.run()
        return handed_on(experts_of(trainer.policy))

    assert after_four_epochs(100.0) < 0.5 * after_four_epochs(0.0)
    for name in ("lr", "decay"):
        with pytest.raises(ConfigError, match=rf"experts.{name} is -1.0"):
            tiny_config(parts={"experts": {name: -1.0}})


def test_the_decay_is_of_all_that_experts_hand_on() -> None:
    learned = experts_of(trainer_with(decay=0.25).policy)
    generator, expected = torch.Generator().manual_seed(0), {"up_weight": 0.0, "up_bias": 0.0}
    for name, tensor in learned.initial().items():
        tensor.data = torch.randn(tensor.shape, generator=generator)
        role = name.rpartition(".")[2]
        if role in expected:
            expected[role] += float(tensor.data.double().square().sum())
    assert min(expected.values()) > 1.0
    penalty = learned.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.25 * sum(expected.values()), rel=1e-5)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"experts.gates is 'slow'; allowed are learned, frozen"):
        ExpertsPartConfig(gates="slow")
    with pytest.raises(ConfigError, match=r"experts.wide is an unknown setting"):
        settings(ExpertsPartConfig, {"wide": 3}, "experts")
    with pytest.raises(ConfigError, match=r"objective.teacher is set and there is no teacher"):
        tiny_config(objective={"teacher": 1.0})
    frozen = replace(ExpertsPartConfig(), gates="frozen")
    assert settings(ExpertsPartConfig, asdict(frozen), "experts") == frozen
