"""Batches of one image: layers with one value a channel take the source's statistics, all others the batch's."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from metaopt.errors import DataError
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.parameters import adapted_layout
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.batch_statistics import BatchStatistics, BatchStatisticsConfig

from ..meta.cases import ALL_TERMS, GRADIENTS, mean_loss, policy_for, take, task, tiny_resnet
from ..tiny import BARE, SIDE, random_images

PRIORS = {"batch": None, "prior": torch.tensor(16.0)}
MEMORIES = ("dense", "exact", "compact", "pruned")
# Networks with normalised vectors behind the pooling, or with maps of one pixel, and the side of their images.
NETWORKS = {
    "levit_128s": 224,
    "levit_conv_128s": 224,
    "efficientvit_m0": 224,
    "repvit_m0_9": 32,
    "shvit_s1": 64,
    "mobilenetv4_conv_small_035": 32,
}
QUICK = "mobilenetv4_conv_small_035"


class Headed(nn.Module):
    """A map of many values a channel, maps of one pixel, and a normalised vector before the classes."""

    def __init__(self, tracks: bool = True, width: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 1, bias=False)
        self.pixel = nn.BatchNorm2d(width, track_running_stats=tracks)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return self.head(self.pixel(self.mix(pooled)).relu().flatten(1))


def headed(tracks: bool = True, dtype: torch.dtype = torch.float32) -> SourceModel:
    """With statistics that are not the neutral ones."""
    torch.manual_seed(0)
    net = Headed(tracks)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                if tensor is not None:
                    tensor.data.add_(0.3 * torch.rand_like(tensor))
    return SourceModel(net.to(dtype).eval()).requires_grad_(False)


def bare(name: str = "tent") -> AdaptationPolicy:
    return build_method(MethodConfig(name, update="adam", lr=1e-2, objective={"entropy": 1.0}, parts=dict(BARE)))


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
def test_one_value_takes_the_sources_statistics(prior: str, gradient: bool) -> None:
    model, images = headed(dtype=torch.float64), random_images(1, dtype=torch.float64)
    images = images.requires_grad_(gradient)
    counts = PRIORS[prior]
    found = model(images, batch_statistics=True, prior=counts).logits
    net = model.module
    assert isinstance(net, Headed) and net.bn.running_mean is not None and net.bn.running_var is not None
    x = net.conv((images - model.mean) / model.std)
    mean, variance = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
    if counts is not None:
        mean, variance = (16 * net.bn.running_mean + mean) / 17, (16 * net.bn.running_var + variance) / 17
    x = functional.batch_norm(x, mean, variance, net.bn.weight, net.bn.bias, False, 0.0, net.bn.eps).relu()
    expected = net.head(net.pixel(net.mix(functional.adaptive_avg_pool2d(x, 1))).relu().flatten(1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert net.bn.running_mean is not None and net.pixel.running_mean is not None


@pytest.mark.parametrize("prior", PRIORS)
def test_layers_of_many_values_do_as_in_larger_batches(prior: str) -> None:
    """The network of which no layer has a single value, on a batch of one: as by torch's own batch statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, 3)).eval()
    model, images = SourceModel(net), random_images(1)
    counts = None if PRIORS[prior] is None else torch.tensor(0.0)
    found = model(images, batch_statistics=True, prior=counts).logits
    plain = net.train()((images - model.mean) / model.std)
    tolerance = 0.0 if counts is None else 1e-5
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("statistics", [True, False])
def test_without_statistics_of_the_source_it_is_refused_in_one_line(prior: str, statistics: bool) -> None:
    model = headed(tracks=False)
    counts = PRIORS[prior] if statistics else None
    with pytest.raises(DataError, match=r"1 image.*one value.*allowed are 2 images or more") as told:
        model(random_images(1), batch_statistics=statistics, prior=counts)
    assert "\n" not in str(told.value)
    assert bool(model(random_images(2), batch_statistics=statistics, prior=counts).logits.isfinite().all())


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("prior", [None, 16])
@pytest.mark.parametrize("adapts", ["norm", "all"])
def test_a_stream_goes_on_over_a_single_image(memory: str, prior: int | None, adapts: str) -> None:
    policy = build_method(
        MethodConfig(
            "tent",
            update="adam",
            lr=1e-2,
            objective={"entropy": 1.0},
            adapts=adapts,
            parts={"batch_statistics": True if prior is None else prior},
        )
    )
    adapter = OnlineAdapter(headed(), policy, memory=memory, budget_mib=4 if memory == "pruned" else None)
    for count in (1, 8, 1, 1):
        before = {name: tensor.clone() for name, tensor in adapter.parameters.items()}
        assert bool(adapter(random_images(count)).isfinite().all())
        for name in ("module.bn.weight", "module.head.0.weight"):
            assert not torch.equal(before[name], adapter.parameters[name])
    assert adapter.updates == 4 and adapter.events["nonfinite"] == 0


@pytest.mark.parametrize("memory", MEMORIES[1:3])
def test_gradients_are_those_of_the_dense_step(memory: str) -> None:
    model, images = headed(), random_images(1)
    adapters = [OnlineAdapter(model, bare(), memory=kind) for kind in ("dense", memory)]
    for adapter in adapters:
        adapter(images)
    first, second = (adapter.parameters for adapter in adapters)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("prior", [None, 16.0])
def test_meta_training_goes_through_single_images(gradient: str, prior: float | None) -> None:
    """The full meta-gradient is the difference quotient of the unrolled loss; first order goes through as well."""
    network = tiny_resnet()  # whose last maps have one pixel
    policy = policy_for(network, "step_sizes")
    policy.parts["batch_statistics"] = BatchStatistics(BatchStatisticsConfig(prior)).double()
    batches = task(2, batch=1, size=2)
    found = take(policy, network, batches, gradient=gradient, **ALL_TERMS).gradients["rule.log_step_sizes"]
    assert bool(found.isfinite().all()) and bool(found.abs().sum() > 0)
    if gradient == "full" and prior is None:  # a prior's factors are constants to backward
        sizes, eps = dict(policy.named_parameters())["rule.log_step_sizes"], 1e-5
        quotients = []
        for place in range(3):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    sizes[place] += sign * eps
                losses.append(mean_loss(policy, network, batches))
                with torch.no_grad():
                    sizes[place] -= sign * eps
            quotients.append((losses[0] - losses[1]) / (2 * eps))
        torch.testing.assert_close(found[:3], torch.tensor(quotients, dtype=torch.float64), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == QUICK else pytest.mark.slow) for n in NETWORKS])
@pytest.mark.parametrize("prior", [None, 16])
def test_networks_in_wide_use_adapt_on_single_images(name: str, prior: int | None) -> None:
    torch.manual_seed(0)
    side, parts = NETWORKS[name], {"batch_statistics": True if prior is None else prior}
    policy = build_method(MethodConfig("tent", update="adam", lr=1e-3, objective={"entropy": 1.0}, parts=parts))
    adapter = OnlineAdapter(timm.create_model(name, num_classes=5), policy, memory="exact")
    images = torch.rand(3, 3, side, side)
    for batch in (images[:1], images[1:], images[:1]):
        assert bool(adapter(batch).isfinite().all())
    assert adapter.updates == 3


def test_under_functional_call() -> None:
    model, images = headed(), random_images(1)
    tensors = {
        name: tensor.detach().clone().requires_grad_() for name, tensor in adapted_layout(model).take(model).items()
    }
    logits = functional_call(model, tensors, (images,), {"batch_statistics": True}).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(tensors.values()))
    assert all(bool(gradient.isfinite().all()) and bool(gradient.abs().sum() > 0) for gradient in gradients)
