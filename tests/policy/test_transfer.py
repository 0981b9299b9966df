"""Transfer to another model: what comes along, what starts anew, and that a mismatch is refused without it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from metaopt.errors import CheckpointError
from metaopt.meta import MetaTrainer
from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.objectives.discrepancy import source_statistics
from metaopt.online import OnlineAdapter
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.mgg import VARIANTS, GradientGenerator
from metaopt.policy import AdaptationPolicy, SourceRecord, transferred
from metaopt.policy.parts.restoration import Restoration
from metaopt.policy.untrained import DEFAULT_PARTS

from ..meta.cases import TinyResNet
from ..tiny import CLASSES, random_images, statistics_of, tiny_config, tiny_model, tiny_policy, with_parts


class Deeper(nn.Module):
    """Three normalisation layers where the tiny network has two, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
        )
        self.last, self.norm, self.head = nn.BatchNorm2d(6), nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.last(self.layers(x)).relu().mean(dim=(2, 3))))


def deeper() -> SourceModel:
    torch.manual_seed(0)
    return SourceModel(Deeper().eval())


def no_images() -> torch.Tensor:
    raise AssertionError("nobody needs images")


def slr_policy() -> AdaptationPolicy:
    policy = tiny_policy(tiny_model())
    policy.objective = WeightedObjective({"slr": 1.0, "diversity": 0.7}, learned=True)
    return policy


def test_step_sizes_travel_by_kind_and_depth() -> None:
    policy = slr_policy()
    assert isinstance(policy.rule, GradientGenerator) and policy.rule.log_step_sizes is not None
    policy.rule.log_step_sizes.data = torch.tensor([0.1, 0.2, 0.5, -0.4])  # weight and bias, first and last layer
    found, notes = transferred(policy, deeper())
    found.prepare(deeper(), no_images)
    assert isinstance(found.rule, GradientGenerator) and found.rule.log_step_sizes is not None
    # Depths of the four layers are 0, 1/3, 2/3 and 1; the last is a LayerNorm, of a kind that was not there.
    weights = [0.1, 0.1 + 0.4 / 3, 0.1 + 0.8 / 3, 0.0]
    biases = [0.2, 0.2 - 0.6 / 3, 0.2 - 1.2 / 3, 0.0]
    expected = torch.tensor([each for pair in zip(weights, biases, strict=True) for each in pair])
    torch.testing.assert_close(found.rule.log_step_sizes.detach(), expected)
    assert "step sizes: 6 of 8 tensors by kind and depth" in notes
    assert "step sizes of layer_norm.bias, layer_norm.weight: not learned, they start at 1" in notes


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_else_comes_along_and_it_adapts(variant: str) -> None:
    restoration = Restoration()
    restoration.log_width.data.add_(0.3)
    policy = with_parts(tiny_policy(tiny_model(), variant), restoration)
    model = deeper()
    found, notes = transferred(policy, model)
    assert statistics_of(found) is None
    found.prepare(model, lambda: random_images(32), 16)
    expected = source_statistics(model, random_images(32), 16)
    torch.testing.assert_close(statistics_of(found), expected, rtol=0, atol=0)
    assert isinstance(found.rule, GradientGenerator) and isinstance(policy.rule, GradientGenerator)
    for name, tensor in policy.state_dict().items():
        if name != "rule.log_step_sizes":
            assert torch.equal(found.state_dict()[name], tensor), name
    assert found.source == SourceRecord.of(model)
    assert {"objective weights: as learned", "restoration: as learned"} <= set(notes)
    adapter = OnlineAdapter(model, found)
    first = adapter(random_images(16))
    assert torch.isfinite(first).all() and not torch.equal(adapter(random_images(16)), first)


def resnet(width: int) -> SourceModel:
    """A model with a place for experts."""
    torch.manual_seed(0)
    return SourceModel(TinyResNet(width).eval())


def policy_with_experts() -> AdaptationPolicy:
    experts = {"experts": 2, "bottleneck": 4, "dropout": "straight_through"}
    teacher = {"restore": 0.0, "proximal": 0.01, "anchor": "initial"}
    config = tiny_config(parts={**DEFAULT_PARTS, "experts": experts, "teacher": teacher})
    policy = MetaTrainer(resnet(4), random_images(32), None, config).best_policy()
    for tensor in policy.part("experts").initial().values():
        tensor.data.add_(0.1)
    return policy


@pytest.mark.parametrize("make", [lambda: resnet(6), deeper], ids=["with a place for experts", "without"])
def test_experts_stay_behind_and_the_norm_layers_alone_adapt(make: Callable[[], SourceModel]) -> None:
    policy = policy_with_experts()
    found, notes = transferred(policy, make())
    assert "experts: left out, they belong to the other model's blocks" in notes
    assert found.part("experts") is None
    found.prepare(make(), lambda: random_images(32))
    adapter = OnlineAdapter(make(), found)
    assert list(adapter.model.state_dict()) == list(adapter.source.state_dict()) and adapter.export_experts() == {}
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    layers = {name for name, module in adapter.model.named_modules() if isinstance(module, norms)}
    assert {name.rpartition(".")[0] for name in adapter.parameters} == layers
    before = adapter(random_images(16))
    after = adapter(random_images(16))
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert policy.part("experts") is not None and policy.adapts == "experts_norm"  # as it was


def test_to_the_same_model_it_is_the_policy_itself() -> None:
    model, policy = tiny_model(), slr_policy()
    found, _ = transferred(policy, tiny_model())
    before, after = OnlineAdapter(model, policy), OnlineAdapter(model, found)
    for seed in range(3):
        assert torch.equal(before(random_images(16, seed)), after(random_images(16, seed)))


def test_it_is_the_only_way_past_a_mismatch() -> None:
    policy = slr_policy()
    with pytest.raises(CheckpointError, match="transfer=generator"):
        OnlineAdapter(deeper(), policy)
    with pytest.raises(CheckpointError, match="transfer=generator"):
        OnlineAdapter(tiny_model(seed=5), policy)
    with pytest.raises(CheckpointError, match="has no learned generator to transfer"):
        transferred(AdaptationPolicy("tent", WeightedObjective({"slr": 1}), Adam()), deeper())
