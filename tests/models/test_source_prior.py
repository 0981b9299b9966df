"""The source's statistics as a prior: the mixture by its formula, its ends, its derivatives, and what stays."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from metaopt.activation_memory import SavedActivations
from metaopt.errors import ModelError
from metaopt.models import SourceModel, SourcePrior, prior_layers
from metaopt.models.source_prior import moments_about

from ..meta.cases import images, tiny_resnet, tiny_vit


def with_statistics(model: SourceModel) -> SourceModel:
    """The same network with running statistics of its own, far from those of its batches."""
    torch.manual_seed(1)
    for name in prior_layers(model.module):
        mean, var = statistics_of(model.module.get_submodule(name))
        mean.normal_()
        var.uniform_(0.5, 3.0)
    return model


def statistics_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The running mean and variance of a BatchNorm layer."""
    assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


class Reference(nn.Module):
    """A BatchNorm layer that computes the mixture as the formula has it, whose statistics have no gradient."""

    def __init__(self, layer: nn.BatchNorm2d, count: float) -> None:
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, x: Tensor) -> Tensor:
        layer, n = self.layer, len(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        source_mean, source_var = statistics_of(layer)
        mixed_mean = (self.count * source_mean + n * mean) / (self.count + n)
        mixed_var = (self.count * source_var + n * var) / (self.count + n)
        return functional.batch_norm(x, mixed_mean, mixed_var, layer.weight, layer.bias, False, 0.0, layer.eps)


@pytest.mark.parametrize("count", [0.5, 6.0, 1e4])
def test_it_is_the_mixture_of_both_statistics(count: float) -> None:
    model = with_statistics(tiny_resnet())
    found = model(images(0), batch_statistics=True, prior=torch.tensor(count)).logits
    for name in prior_layers(model.module):
        owner, _, own = name.rpartition(".")
        layer = model.module.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm2d)
        setattr(model.module.get_submodule(owner), own, Reference(layer, count))
    torch.testing.assert_close(found, model(images(0)).logits, rtol=1e-12, atol=1e-12)


def test_its_ends_are_the_batch_and_the_source() -> None:
    model, batch = with_statistics(tiny_resnet()), images(0)
    none = model(batch, batch_statistics=True, prior=torch.tensor(0.0)).logits
    assert torch.equal(none, model(batch, batch_statistics=True).logits)
    all_of_it = model(batch, batch_statistics=True, prior=torch.tensor(1e12)).logits
    torch.testing.assert_close(all_of_it, model(batch).logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(batch, prior=torch.tensor(5.0)).logits, model(batch).logits)  # without batch statistics


def test_each_layer_has_its_own_count() -> None:
    model, batch = with_statistics(tiny_resnet()), images(0)
    names = prior_layers(model.module)
    seen: dict[str, Tensor] = {}
    for name in names:
        layer = model.module.get_submodule(name)
        layer.register_forward_hook(lambda *arguments, name=name: seen.__setitem__(name, arguments[2]))
    model(batch, batch_statistics=True)
    plain = dict(seen)
    model(batch, batch_statistics=True, prior=torch.tensor([0.0] * (len(names) - 1) + [3.0], dtype=torch.float64))
    assert [name for name in names if not torch.equal(seen[name], plain[name])] == names[-1:]
    with pytest.raises(ModelError, match=rf"has 2 counts and TinyResNet has {len(names)} BatchNorm"):
        model(batch, batch_statistics=True, prior=torch.ones(2))


def test_one_layers_derivatives_are_those_of_the_mixture() -> None:
    """In the weight, the bias and the count; the batch's statistics have no derivative in any of them."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).double().eval()
    statistics_of(layer)[1].uniform_(0.5, 3.0)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def mixed(weight: Tensor, bias: Tensor, count: Tensor) -> Tensor:
        with SourcePrior(layer, count):
            return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    count = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixed, (*inputs, count))
    assert torch.autograd.gradgradcheck(mixed, (*inputs, count))


def test_statistics_about_a_large_mean_keep_their_digits() -> None:
    layer = nn.BatchNorm2d(2, affine=False).eval()
    statistics_of(layer)[0].fill_(1000.0)
    x = 1000.0 + 0.1 * torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with SourcePrior(layer, torch.tensor(16.0)):
        found = layer(x)
    layer.double()
    with SourcePrior(layer, torch.tensor(16.0, dtype=torch.float64)):
        torch.testing.assert_close(found.double(), layer(x.double()), rtol=0, atol=1e-3)


def test_without_a_graph_it_predicts_the_same() -> None:
    model, batch = with_statistics(tiny_resnet()), images(0)
    for count in (0.0, 3.0, 1e6):
        expected = model(batch, batch_statistics=True, prior=torch.tensor(count)).logits.detach()
        with torch.no_grad():
            found = model(batch, batch_statistics=True, prior=torch.tensor(count)).logits
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_devices_without_that_kernel_have_the_same_statistics() -> None:
    x = 50.0 + torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = moments_about(x, torch.tensor([50.0, 0.0, 40.0], dtype=torch.float64))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))


def test_it_works_under_autocast() -> None:
    model, batch = with_statistics(tiny_resnet(dtype=torch.float32)), images(0).float()
    expected = model(batch, batch_statistics=True, prior=torch.tensor(3.0)).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch, batch_statistics=True, prior=torch.tensor(3.0)).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("memory", ["exact", "compact"])
def test_the_engine_keeps_no_more_than_without_it(memory: str) -> None:
    model, batch = with_statistics(tiny_resnet(width=16)).requires_grad_(True), images(0, batch=32)
    held, gradients = [], []
    for arguments in ({}, {"prior": torch.tensor(0.0)}, {"prior": torch.tensor(9.0)}):
        saved = SavedActivations(model, memory=memory)
        with saved:
            loss = model(batch, batch_statistics=True, **arguments).logits.square().sum()
            held.append(saved.held_bytes)
            gradients.append(torch.autograd.grad(loss, [model.get_parameter("module.bn1.weight")])[0])
    vectors = sum(8 * tensor.numel() for name, tensor in model.named_parameters() if "bn" in name)
    assert held[0] <= held[1] == held[2] <= held[0] + 4 * vectors
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(gradients[1], gradients[2])


def test_buffers_stay_and_an_error_leaves_nothing_behind() -> None:
    model = with_statistics(tiny_resnet())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(images(0), batch_statistics=True, prior=torch.tensor(9.0))
    with pytest.raises(RuntimeError):
        model.module(torch.rand(2, 5, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layer = model.module.bn1
    assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None


def test_layers_without_source_statistics_are_left_alone() -> None:
    assert prior_layers(tiny_vit().module) == []
    bare = SourceModel(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 4)))
    batch = torch.rand(5, 3, 2, 2)
    assert prior_layers(bare.module) == []
    found = bare(batch, batch_statistics=True, prior=torch.tensor(16.0)).logits
    assert torch.equal(found, bare(batch, batch_statistics=True).logits)


def test_it_acts_on_layers_that_activate_too() -> None:
    torch.manual_seed(0)
    model = SourceModel(timm.create_model("mobilenetv3_small_050", num_classes=4))
    batch = torch.rand(4, 3, 32, 32)
    source = model(batch).logits
    torch.testing.assert_close(
        model(batch, batch_statistics=True, prior=torch.tensor(1e9)).logits, source, rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(model(batch, batch_statistics=True).logits, source, atol=1e-2)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("count", [None, 6.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_keep_their_digits(dtype: torch.dtype, count: float | None, graph: bool) -> None:
    """Maps far from zero, whose means half precision would round by a good part of their spread."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 64, 2)).requires_grad_(False)
    conv, norm = net[0], net[1]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None and isinstance(norm, nn.BatchNorm2d)
    conv.bias.copy_(torch.tensor([-37.3, 41.7, 53.1]))
    statistics_of(norm)[0].copy_(conv.bias)
    model, seen = SourceModel(net.to(dtype).eval()), {}
    norm.register_forward_hook(lambda _layer, inputs, output: seen.update(x=inputs[0], y=output))
    prior = None if count is None else torch.tensor(count)
    with torch.set_grad_enabled(graph):
        model(torch.rand(16, 3, 8, 8), batch_statistics=True, prior=prior)
    x, (mean, var) = seen["x"].double(), (tensor.double() for tensor in statistics_of(norm))
    own, spread = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    share = 1.0 if count is None else 16 / (16 + count)
    expected = functional.batch_norm(x, torch.lerp(mean, own, share), torch.lerp(var, spread, share), eps=norm.eps)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
