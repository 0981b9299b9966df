"""The source model: normalisation, batch statistics, features, and what may be done to it."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from metaopt.errors import DataError, ModelError
from metaopt.models.registry import load_source_model
from metaopt.models.source_model import SourceModel
from metaopt.models.spec import ModelSpec


def images(count: int = 4, size: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def randomised(model: SourceModel) -> SourceModel:
    """Running statistics and affine parameters that differ from their trivial initial values."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.module.named_parameters(), *model.module.named_buffers()]:
        if tensor.is_floating_point() and ("bn" in name or "norm" in name or "running" in name):
            tensor.data.add_(torch.rand(tensor.shape, generator=generator).to(tensor) * 0.5)
    return model


@pytest.fixture
def resnet() -> SourceModel:
    torch.manual_seed(0)
    return randomised(load_source_model("cifar_resnet20")).double()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def assert_same_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


class SyncNet(nn.Module):
    """SyncBatchNorm, and a layer that keeps no running statistics at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn1 = nn.SyncBatchNorm(6)
        self.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.bn2(self.bn1(self.conv(x)))).mean(dim=(2, 3)))


class TestBatchStatistics:
    """`forward(batch_statistics=True)`."""

    @pytest.mark.parametrize("name", ["cifar_resnet20", "lcnet_035", "resnet10t"])
    def test_equals_the_network_in_train_mode(self, name: str):
        torch.manual_seed(0)
        model = randomised(load_source_model(name, num_classes=10)).double()
        batch = images(3, 64)
        reference = copy.deepcopy(model.module).train()
        for layer in reference.modules():
            if isinstance(layer, nn.Dropout) or type(layer).__name__ == "DropPath":
                layer.eval()
        before = buffers(model)
        output = model(batch, batch_statistics=True).logits
        expected = reference((batch - model.mean) / model.std)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        assert (output - model(batch).logits).abs().max() > 1e-3
        assert_same_buffers(model, before)

    def test_takes_sync_batchnorm_and_layers_without_buffers(self):
        model = SourceModel(SyncNet().double())
        batch, before = images(), buffers(model)
        output = model(batch, batch_statistics=True).logits
        net = model.module
        plain = nn.functional.batch_norm(net.conv(batch), None, None, net.bn1.weight, net.bn1.bias, training=True)  # pyright: ignore
        torch.testing.assert_close(output, net.head(net.bn2(plain).mean(dim=(2, 3))))  # pyright: ignore
        assert_same_buffers(model, before)

    def test_nan_images_leave_the_buffers_alone(self, resnet: SourceModel):
        before = buffers(resnet)
        batch = images()
        batch[0, 0, 0, 0] = torch.nan
        assert resnet(batch, batch_statistics=True, features=True).logits.isnan().any()
        assert_same_buffers(resnet, before)
        assert resnet(images(), batch_statistics=True).logits.isfinite().all()

    def test_an_error_inside_leaves_the_buffers_and_hooks_alone(self, resnet: SourceModel, monkeypatch):
        before = buffers(resnet)

        def fail(_: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(resnet.module.linear, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            resnet(images(), batch_statistics=True, features=True)
        assert_same_buffers(resnet, before)
        assert not any(layer._forward_hooks for layer in resnet.modules())

    def test_a_recomputing_network_is_refused(self):
        model = load_source_model("resnet10t", num_classes=10)
        model.module.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        with pytest.raises(ModelError, match="set_grad_checkpointing"):
            model(images(2, 32, torch.float32), batch_statistics=True)
        assert model(images(2, 32, torch.float32)).logits.shape == (2, 10)


class TestFeatures:
    """`forward(features=True)`."""

    def test_are_the_blocks_outputs_averaged_over_space(self, resnet: SourceModel):
        batch = images()
        output = resnet(batch, features=True)
        assert [feature.shape for feature in output.features] == [(4, d) for d in [16] * 3 + [32] * 3 + [64] * 3]
        # The last one is what the classifier sees; the first one is recomputed by hand.
        torch.testing.assert_close(resnet.module.linear(output.features[-1]), output.logits)  # pyright: ignore
        net = resnet.module
        first = net.layer1[0](net.bn1(net.conv1((batch - resnet.mean) / resnet.std)).relu())  # pyright: ignore
        torch.testing.assert_close(output.features[0], first.mean(dim=(2, 3)))

    def test_do_not_change_the_logits_and_come_only_on_request(self, resnet: SourceModel):
        with_features, without = resnet(images(), features=True), resnet(images())
        assert torch.equal(with_features.logits, without.logits)
        assert without.features == ()

    def test_of_a_vision_transformer_are_class_tokens(self):
        torch.manual_seed(0)
        model = load_source_model("digits_vit").double()
        output = model(images(), features=True)
        assert [feature.shape for feature in output.features] == [(4, 96)] * len(model.module.blocks)  # pyright: ignore
        net = model.module
        torch.testing.assert_close(net.head(net.norm(output.features[-1])), output.logits)  # pyright: ignore

    def test_carry_gradients(self, resnet: SourceModel):
        output = resnet(images(), batch_statistics=True, features=True)
        weight = resnet.module.get_parameter("bn1.weight")
        for feature in output.features:
            (gradient,) = torch.autograd.grad(feature.square().sum(), weight, retain_graph=True)
            assert gradient.abs().sum() > 0

    def test_of_named_blocks(self):
        net = SyncNet()
        model = SourceModel(net, blocks=["bn2", "conv"])
        output = model(images(dtype=torch.float32), features=True)
        torch.testing.assert_close(output.features[1], net.conv(images(dtype=torch.float32)).mean(dim=(2, 3)))

    def test_blocks_that_do_not_exist_or_run_are_refused(self):
        with pytest.raises(ModelError, match="no module 'stage9'"):
            SourceModel(SyncNet(), blocks=["stage9"])
        net = SyncNet()
        net.add_module("spare", nn.BatchNorm1d(3))
        with pytest.raises(ModelError, match="no features from spare"):
            SourceModel(net)(images(dtype=torch.float32), features=True)


class TestFunctionalCall:
    """Parameters from outside."""

    @pytest.mark.parametrize("name", ["cifar_resnet20", "digits_vit"])
    def test_uses_and_differentiates_the_given_tensors(self, name: str):
        torch.manual_seed(0)
        model = load_source_model(name).double()
        if name == "digits_vit":
            model.module.get_parameter("head.weight").data.normal_()  # it starts at zero, and blocks all gradients
        affine = {n: p.detach() for n, p in model.named_parameters() if "bn" in n or "norm" in n}
        assert affine and all(n.startswith("module.") for n in affine)
        moved = {n: (p + 0.1).requires_grad_() for n, p in affine.items()}
        call = {"batch_statistics": True, "features": True}
        before = buffers(model)
        output = torch.func.functional_call(model, moved, (images(),), call)
        gradients = torch.autograd.grad(output.logits.square().sum() + output.features[0].sum(), list(moved.values()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        assert_same_buffers(model, before)
        in_place = copy.deepcopy(model)
        with torch.no_grad():
            for n, p in in_place.named_parameters():
                p.copy_(moved.get(n, p))
        torch.testing.assert_close(in_place(images(), **call).logits, output.logits)
        assert (model(images(), **call).logits - output.logits).abs().max() > 1e-3

    def test_gradient_agrees_with_finite_differences(self, resnet: SourceModel):
        name, step = "module.layer2.0.bn1.bias", 1e-6
        value = dict(resnet.named_parameters())[name].detach()

        def loss(bias: Tensor) -> Tensor:
            output = torch.func.functional_call(resnet, {name: bias}, (images(),), {"batch_statistics": True})
            return output.logits.square().sum()

        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        direction = torch.eye(len(value), dtype=torch.float64)[3] * step
        numeric = (loss(value + direction) - loss(value - direction)) / (2 * step)
        assert numeric.item() == pytest.approx(gradient[3].item(), rel=1e-5)


class TestModule:
    """What holds for any module that is wrapped."""

    def test_stays_in_eval(self, resnet: SourceModel):
        resnet.train()
        assert not any(layer.training for layer in resnet.modules())
        model, batch = SourceModel(SyncNet().train()), images(dtype=torch.float32)
        assert torch.equal(model(batch).logits, model(batch).logits)  # no dropout

    def test_copies_are_independent_and_pickles_are_clean(self, resnet: SourceModel):
        resnet(images(), features=True)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(resnet)))
        assert torch.equal(twin(images()).logits, resnet(images()).logits)
        with torch.no_grad():
            twin.module.bn1.weight.add_(1)
        assert not torch.equal(twin(images()).logits, resnet(images()).logits)
        assert twin.spec == resnet.spec and twin.blocks == resnet.blocks

    def test_state_dict_holds_the_networks_own_tensors_alone(self, resnet: SourceModel):
        assert list(resnet.state_dict()) == [f"module.{name}" for name in resnet.module.state_dict()]

    def test_memory_format_changes_nothing_but_the_speed(self):
        plain, fast = (load_source_model("cifar_resnet20", channels_last=last).double() for last in (False, True))
        plain.module.load_state_dict(fast.module.state_dict())
        assert fast.module.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore
        assert plain.module.layer1[0].conv1.weight.is_contiguous()  # pyright: ignore
        first = plain(images(), batch_statistics=True, features=True)
        second = fast(images(), batch_statistics=True, features=True)
        torch.testing.assert_close(first.logits, second.logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(first.features, second.features, rtol=1e-10, atol=1e-10)
        assert plain.weights_sha256() == fast.weights_sha256()

    def test_normalisation_is_inside(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2), nn.LayerNorm(2))
        model = SourceModel(net, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
        batch = images(2, 4, torch.float32)
        by_hand = torch.stack([(batch[:, 0] - 0.1) / 0.5, (batch[:, 1] - 0.2) / 0.25, (batch[:, 2] - 0.3) / 0.125], 1)
        torch.testing.assert_close(model(batch).logits, net(by_hand))

    def test_a_users_module_gets_a_spec_of_its_own(self):
        model = SourceModel(SyncNet())
        assert model.spec == ModelSpec("custom:SyncNet", 5)
        assert model.num_classes == 5

    def test_without_any_sign_of_the_class_count_a_spec_is_asked_for(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        with pytest.raises(ModelError, match="spec=ModelSpec"):
            SourceModel(net)
        assert SourceModel(net, spec=ModelSpec("segmenter", 4)).num_classes == 4

    def test_images_that_do_not_fit_are_refused(self, resnet: SourceModel):
        with pytest.raises(DataError, match=r"\(B, 3, H, W\) RGB is needed"):
            resnet(torch.rand(2, 32, 32, 3, dtype=torch.float64))
        with pytest.raises(DataError, match="takes 32x32"):
            load_source_model("digits_vit")(images(2, 40, torch.float32))

    def test_other_outputs_than_logits(self):
        class Outputs:
            def __init__(self, logits: Tensor) -> None:
                self.logits = logits

        class Named(SyncNet):
            def forward(self, x: Tensor):
                return Outputs(super().forward(x))

        class Dictionary(SyncNet):
            def forward(self, x: Tensor):
                return {"out": super().forward(x)}

        assert SourceModel(Named())(images(dtype=torch.float32)).logits.shape == (4, 5)
        with pytest.raises(ModelError, match="the model returns dict"):
            SourceModel(Dictionary())(images(dtype=torch.float32))
