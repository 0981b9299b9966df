"""Meta-training of experts: what changes, what stays, what the file holds, and that it deploys by itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metaopt.errors import CheckpointError, ConfigError, DataError
from metaopt.evaluation import Monitor, read_scalars
from metaopt.experts import ExpertsConfig, LearnedExpertsConfig, TeacherConfig
from metaopt.inner_loop import learned_tensors
from metaopt.meta import MetaTrainer
from metaopt.models import SourceModel
from metaopt.models.spec import ModelSpec
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method

from ..inner_loop.cases import TinyResNet
from ..tiny import random_images, tiny_config

MIXTURES = ExpertsConfig(experts=2, bottleneck=4, asg_range=0.3, dropout="straight_through")
TEACHER = TeacherConfig(restore=0.0, proximal=0.01, anchor="initial")


def source() -> SourceModel:
    """A small ResNet whose two blocks are its sites."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SourceModel(TinyResNet(), spec=ModelSpec("custom:tiny", 4, (3, 16, 16)))


def trainer_with(monitor: Monitor | None = None, **parts: str) -> MetaTrainer:
    config = tiny_config(experts=LearnedExpertsConfig(MIXTURES, **parts), teacher=TEACHER, select_best=False)
    return MetaTrainer(source(), random_images(32), None, config, monitor)


def test_learned_parts_move_frozen_ones_and_the_network_stay(tmp_path: Path) -> None:
    for parts, still in (({}, None), ({"gates": "frozen"}, "router"), ({"initial": "frozen"}, "_weight")):
        model = source()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with Monitor(tmp_path / str(still)) as monitor:
            config = tiny_config(experts=LearnedExpertsConfig(MIXTURES, **parts), teacher=TEACHER)
            trainer = MetaTrainer(model, random_images(32), None, config, monitor)
            start = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
            trainer.run()
        weights = trainer.policy.state_dict()
        moved = {name for name in start if not torch.equal(weights[name], start[name])}
        assert moved == set(learned_tensors(trainer.policy))
        assert not any(still in name for name in moved if still is not None and "learned_experts" in name)
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
    assert (values["experts"]["config"]["gates"], values["experts"]["config"]["initial"]) == ("learned", "learned")
    assert [site["name"] for site in values["experts"]["sites"]] == ["blocks.0", "blocks.1"]
    loaded = AdaptationPolicy.load(tmp_path / "ckpt.pt")
    assert loaded.learned_experts is not None and loaded.learned_experts.config.mixtures == MIXTURES
    assert (loaded.teacher, loaded.adapts) == (TEACHER, "experts_norm")
    assert set(learned_tensors(loaded)) == set(learned_tensors(policy))
    assert loaded.source is not None and any(name.startswith("experts.") for name in loaded.source.layout.names)
    section = MethodConfig(
        "policy",
        update="generator",
        objective_from_policy=True,
        pruning="learned",
        restoration=True,
        initialization=True,
    )
    first, second = OnlineAdapter(source(), policy), OnlineAdapter(source(), build_method(section, policy=loaded))
    for seed in range(3):
        assert torch.equal(first(random_images(8, seed)), second(random_images(8, seed)))
    start = first.model.get_parameter("experts.blocks/0.up_weight")
    assert start.any() and torch.equal(start, policy.learned_experts.initial()["experts.blocks/0.up_weight"])  # type: ignore[union-attr]
    assert not torch.equal(first.parameters["experts.blocks/0.up_weight"], start)
    del values["experts"]["sites"][0]
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
    with pytest.raises(CheckpointError, match="other settings of experts"):
        trainer_with(gates="frozen").load_state_dict(first.state_dict())


def test_experts_have_a_rate_and_a_decay_of_their_own() -> None:
    """Adam's first step is its rate: of the policy's numbers 0.03, of gates and first values the experts' own."""

    def after_a_step(**changes: float) -> tuple[float, float, float, float]:
        experts = LearnedExpertsConfig(MIXTURES)
        config = tiny_config(experts=experts, teacher=TEACHER, epochs=1, unrolls=1, select_best=False, **changes)
        trainer = MetaTrainer(source(), random_images(32), None, config)
        start = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
        learned = trainer.policy.learned_experts
        assert learned is not None and float(learned.penalty().detach()) == 0.0  # they add nothing at the start
        trainer.run()
        step = {name: (t - start[name]).abs().max().item() for name, t in trainer.policy.state_dict().items()}
        gate, first = (f"learned_experts.mixtures.blocks/0.{end}" for end in ("dag.router.weight", "up_weight"))
        return step["rule.log_step_sizes"], step[gate], step[first], float(learned.penalty().detach())

    number, gate, first, _ = after_a_step(experts_lr=1e-3)
    assert number == pytest.approx(3e-2, rel=1e-3)
    assert first == pytest.approx(1e-3, rel=1e-3) and 0 < gate < 1.001e-3

    def penalty(decay: float) -> float:
        experts = LearnedExpertsConfig(MIXTURES)
        config = tiny_config(experts=experts, teacher=TEACHER, experts_decay=decay, experts_lr=1e-2, epochs=4)
        trainer = MetaTrainer(source(), random_images(32), None, replace(config, select_best=False))
        trainer.run()
        assert trainer.policy.learned_experts is not None
        return float(trainer.policy.learned_experts.penalty().detach())

    assert penalty(100.0) < 0.5 * penalty(0.0)
    for name in ("experts_lr", "experts_decay"):
        with pytest.raises(ConfigError, match=rf"meta.{name} is -1.0"):
            tiny_config(**{name: -1.0})


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"experts.gates is 'slow'; allowed are learned, frozen"):
        LearnedExpertsConfig(gates="slow")
    with pytest.raises(ConfigError, match=r"experts.wide is unknown"):
        LearnedExpertsConfig.from_dict({"wide": 3})
    with pytest.raises(ConfigError, match=r"objective.teacher is set and there is no teacher"):
        tiny_config(objective={"teacher": 1.0})
    assert LearnedExpertsConfig.from_dict(replace(LearnedExpertsConfig(), gates="frozen").to_dict()).gates == "frozen"
