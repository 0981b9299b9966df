"""Which layers of a user's network adapt: norms of any class, those that run, and those that are asked for."""

from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.mlp_mixer import Affine
from torch import Tensor, nn

import metaopt
from metaopt.errors import CheckpointError, ConfigError, DataError, MetaoptError, ModelError
from metaopt.meta import MetaTrainConfig
from metaopt.models import SourceModel, load_source_model
from metaopt.parameters import adapted_layout, norm_kind
from metaopt.policy.parts.shift_distance import distance, image_statistics, init_reference, merged

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"epochs": 1, "unrolls": 1, "steps": 2, "first_steps": 1, "batch_size": 6, "selection_tasks": 1}


class ChannelNorm(nn.Module):
    """A user's own: over the channels of maps."""

    def __init__(self, width: int, names: Sequence[str] = ("weight", "bias")) -> None:
        super().__init__()
        self.names = names
        for name, value in zip(names, (torch.ones(width, 1, 1), torch.zeros(width, 1, 1)), strict=False):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (getattr(self, name) for name in self.names)
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return weight * (x - mean) * (variance + 1e-5).rsqrt() + bias


class Net(nn.Module):
    """A norm that never runs is registered first, and the one that runs first last."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, channels: int = 3) -> None:
        super().__init__()
        self.unused, self.late = norm(4), norm(8)
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 3), nn.Conv2d(6, 8, 3)
        self.head, self.drop = nn.Linear(8, 5), nn.Dropout(0.5)
        self.early = norm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.conv2(self.early(self.conv1(x)).relu())).relu()
        return self.head(self.drop(x.mean(dim=(2, 3))))


def affine_instance_norm(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, affine=True)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def tent(**settings: object) -> metaopt.AdaptationPolicy:
    return metaopt.build_method(metaopt.load_method("tent", lr=0.05, **settings))


def changed(adapter: metaopt.OnlineAdapter, batches: int = 2) -> set[str]:
    """Names of the parameters that adaptation has changed."""
    before = adapter.export()
    for _ in range(batches):
        adapter(IMAGES)
    after = {name: tensor for name, tensor in adapter.export().items() if "running" not in name}
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


class TestKinds:
    """Norm layers are known whoever has written them."""

    @pytest.mark.parametrize("names", [("weight", "bias"), ("gamma", "beta"), ("g", "b")])
    @pytest.mark.parametrize("memory", ["dense", "pruned"])
    def test_a_class_of_ones_own_adapts(self, names: tuple[str, ...], memory: str):
        torch.manual_seed(0)
        network = Net(lambda width: ChannelNorm(width, names))  # type: ignore[arg-type]
        adapter = metaopt.OnlineAdapter(network, tent(parts={"restoration": True}), memory=memory)
        assert changed(adapter) == {f"{layer}.{name}" for layer in ("early", "late") for name in names}
        assert SourceModel(network).blocks == ("unused", "late", "early")

    def test_of_instances_and_affine_layers_too(self):
        assert norm_kind(affine_instance_norm(4)) == "instance_norm"
        torch.manual_seed(0)
        assert changed(metaopt.OnlineAdapter(Net(affine_instance_norm), tent())) == {  # type: ignore[arg-type]
            f"{layer}.{name}" for layer in ("early", "late") for name in ("weight", "bias")
        }
        assert norm_kind(Affine(4)) == "affine"
        mixer = timm.create_model("resmlp_12_224", img_size=32, num_classes=5)
        assert len(adapted_layout(mixer).tensors) == 2 * (2 * 12 + 1)

    def test_what_is_no_norm_stays(self):
        class LinearNorm(nn.Linear):
            """A linear layer, whatever it is called."""

        class LayerScale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(4))

        class PreNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.LayerNorm(4)

        kinds = [norm_kind(m) for m in (LinearNorm(4, 4), LayerScale(), PreNorm(), GlobalResponseNorm(4))]
        assert kinds == [None] * 4


class TestFrozen:
    """What the user has frozen stays."""

    def test_some_of_the_layers_stay_and_all_frozen_mean_nothing(self, net: Net):
        net.early.requires_grad_(False)
        net.late.bias.requires_grad_(False)
        flags = [tensor.requires_grad for tensor in net.parameters()]
        for _ in range(2):  # the first adapter leaves the flags, so that the second sees them
            assert changed(metaopt.OnlineAdapter(net, tent())) == {"late.weight"}
        assert [tensor.requires_grad for tensor in net.parameters()] == flags
        net.requires_grad_(False)
        assert len(changed(metaopt.OnlineAdapter(net, tent()))) == 4

    def test_a_policy_is_refused_where_others_are_frozen(self, net: Net):
        net.early.requires_grad_(False)
        policy = metaopt.meta_train(net, IMAGES, ["gaussian_blur"], MetaTrainConfig(**QUICK), quiet=True)
        found = {name for name in changed(metaopt.OnlineAdapter(net, policy)) if "unused" not in name}
        assert found == {"late.weight", "late.bias"}
        net.requires_grad_(True)
        with pytest.raises(CheckpointError, match=r"adapts 4 tensors .* this model 6 would"):
            metaopt.OnlineAdapter(net, policy)


class TestLayers:
    """``method.layers`` and ``layers`` of meta-training."""

    def test_of_a_hand_made_method(self, net: Net):
        assert changed(metaopt.OnlineAdapter(net, tent(layers=["ea*"]))) == {"early.weight", "early.bias"}
        two = tent(layers=["early", "lat?"], parts={"batch_statistics": 16, "fisher": True})
        two.prepare(SourceModel(net), lambda: IMAGES)
        assert len(changed(metaopt.OnlineAdapter(net, two))) == 4

    def test_of_a_policy_from_training_to_its_file(self, net: Net, tmp_path):
        config = MetaTrainConfig(**QUICK, layers=("late",))
        metaopt.meta_train(net, IMAGES, ["gaussian_blur"], config, quiet=True).save(tmp_path / "ckpt.pt")
        policy = metaopt.AdaptationPolicy.load(tmp_path / "ckpt.pt")
        assert policy.layers == ("late",)
        assert policy.part("initialization").sizes == {"module.late.weight": 8, "module.late.bias": 8}
        built = metaopt.build_method(metaopt.load_method("policy"), policy=policy)
        for method in (
            policy,
            built,
            metaopt.build_method(metaopt.load_method("policy", layers=["late"]), policy=policy),
        ):
            assert changed(metaopt.OnlineAdapter(net, method)) == {"late.weight", "late.bias"}
        with pytest.raises(ConfigError, match="the policy has learned for"):
            metaopt.build_method(metaopt.load_method("policy", layers=["early"]), policy=policy)

    def test_what_names_nothing_or_does_not_go_together_is_refused(self, net: Net):
        with pytest.raises(ModelError, match=r"layers has 'erly', which names no .*allowed are unused, late, early"):
            metaopt.OnlineAdapter(net, tent(layers=["late", "erly"]))
        for layers in ("early", [], [3]):
            with pytest.raises(ConfigError, match="allowed are patterns"):
                metaopt.MethodConfig("tent", layers=layers)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="does not go with adapts=all"):
            metaopt.MethodConfig("tent", layers=("early",), adapts="all")


class TestShift:
    """The shift distance watches the first norm layer that runs."""

    def test_the_first_that_runs_is_watched(self, net: Net):
        model = SourceModel(net)
        names = ["module.unused", "module.late", "module.early"]
        found = image_statistics(model, names, IMAGES)
        assert torch.equal(found, image_statistics(model, "module.early", IMAGES))
        adapter = metaopt.OnlineAdapter(net, tent(parts={"restoration": True}))
        told = [adapter.step(batch).signals["shift_distance"] for batch in (IMAGES, IMAGES, 1 - IMAGES.square())]
        assert float(told[1]) < 2 < float(told[2])

    def test_an_adapter_with_it_goes_on_from_its_file(self, net: Net, tmp_path):
        method = tent(parts={"restoration": True})
        adapter, other = metaopt.OnlineAdapter(net, method), metaopt.OnlineAdapter(net, method)
        adapter(IMAGES)
        adapter.save(tmp_path / "state.pt")
        other.load(tmp_path / "state.pt")
        assert torch.equal(adapter(IMAGES.flip(3)), other(IMAGES.flip(3)))

    def test_where_none_runs_it_is_refused(self, net: Net):
        adapter = metaopt.OnlineAdapter(net, tent(layers=["unused"], parts={"restoration": True}))
        with pytest.raises(ModelError, match="no adapted normalisation layer runs"):
            adapter(IMAGES)

    @pytest.mark.parametrize("constant", [0.0, 3.3, 1e6])
    def test_dead_channels_do_not_count(self, constant: float):
        generator = torch.Generator().manual_seed(0)
        live, later = (torch.randn(64, 6, generator=generator) for _ in range(2))

        def told(*columns: Tensor) -> float:
            first, second = columns if len(columns) == 2 else (live, later)
            return float(distance(merged(init_reference(first.shape[1] // 2, first), first), second))

        dead = torch.full((64, 2), constant)
        near = dead * (1 + 1e-7)  # another order of summation
        alone = told(live, later)
        assert told(torch.cat([live, dead], 1), torch.cat([later, near], 1)) == pytest.approx(alone, rel=1e-5)
        broken = torch.full((64, 2), float("nan"))
        assert told(torch.cat([live, dead], 1), torch.cat([later, broken], 1)) == pytest.approx(alone, rel=1e-5)
        assert told(dead, near) == 1.0


class TestInputs:
    """Sizes and channels that are not those of the name."""

    def test_a_transformer_of_another_size_takes_that(self):
        network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5)
        model = SourceModel(network)
        assert model.spec.input_size == (3, 64, 64)
        assert metaopt.OnlineAdapter(network, tent())(torch.rand(4, 3, 64, 64)).shape == (4, 5)
        with pytest.raises(DataError, match="takes 64x64"):
            model(torch.rand(4, 3, 224, 224))

    @pytest.mark.parametrize("channels", [1, 4, 13])
    @pytest.mark.parametrize("make", [list, tuple, torch.tensor, numpy.array])
    def test_images_of_other_channels(self, channels: int, make):
        torch.manual_seed(0)
        network, mean, std = Net(channels=channels), [0.3] * channels, [0.5] * channels
        model = SourceModel(network, mean=make(mean), std=make(std))
        images = torch.rand(6, channels, 16, 16)
        assert model.spec.mean == pytest.approx(tuple(mean)) and model.spec.channels == channels
        torch.testing.assert_close(model(images).logits, network((images - 0.3) / 0.5))
        assert metaopt.OnlineAdapter(model, tent(parts={"restoration": True}))(images).shape == (6, 5)
        with pytest.raises(DataError, match=rf"allowed is \(B, {channels}, H, W\)"):
            model(torch.rand(6, channels + 1, 16, 16))

    def test_timms_numbers_are_for_rgb(self):
        network = timm.create_model("resnet10t", in_chans=1, num_classes=5)
        with pytest.raises(ModelError, match="takes 1 channels and timm knows its mean"):
            SourceModel(network)
        assert SourceModel(network, mean=[0.5], std=[0.2]).spec.input_size == (1, 176, 176)
        with pytest.raises(ModelError, match="give mean and std of 1"):
            SourceModel(network, mean=[0.5] * 3, std=[0.2] * 3)
        halves = load_source_model("digits_vit").module
        assert SourceModel(halves).spec.mean == (0.5, 0.5, 0.5)

    @pytest.mark.parametrize("mean", [0.5, "abc", [float("nan")] * 3, [], [0.1, 0.2]])
    def test_values_of_no_use_are_refused_in_one_line(self, net: Net, mean: object):
        with pytest.raises(MetaoptError, match="mean=") as refusal:
            SourceModel(net, mean=mean, std=(1, 1, 1))  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.train(),
        lambda net: net.half(),
        lambda net: net.double(),
        lambda net: net.to("meta"),
        lambda net: net.requires_grad_(True),
        lambda net: net.to(memory_format=torch.channels_last),
    ],
)
@pytest.mark.parametrize("memory", ["dense", "exact"])
def test_what_becomes_of_the_network_later_does_not_touch_an_adapter(net: Net, change, memory: str) -> None:
    expected = metaopt.OnlineAdapter(net, tent(), memory=memory)
    answers = [expected(IMAGES) for _ in range(3)]
    adapter = metaopt.OnlineAdapter(net, tent(), memory=memory)
    found = [adapter(IMAGES)]
    change(net)
    found += [adapter(IMAGES), adapter(IMAGES)]
    assert all(map(torch.equal, found, answers))
    adapter.reset()
    assert torch.equal(adapter(IMAGES), answers[0])
    assert not any(module.training for module in adapter.model.modules())


def test_a_source_model_whose_network_was_set_to_train_gives_an_adapter_in_eval(net: Net) -> None:
    source = SourceModel(net)
    expected = metaopt.OnlineAdapter(source, tent())(IMAGES)
    net.train()
    assert torch.equal(metaopt.OnlineAdapter(source, tent())(IMAGES), expected)
