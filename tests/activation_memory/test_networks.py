"""The engine on whole networks: outputs, gradients of first and second order, and what is left in memory."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.activation_memory import Precision, SavedActivations
from metaopt.errors import ConfigError
from metaopt.evaluation import MemoryMeter
from metaopt.parameters import flatten
from metaopt.types import Parameters

from .networks import NETWORKS, build


def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()


def logits_and_gradient(net: nn.Module, leaves: Parameters, images: Tensor, memory: str | None = None, **options):
    """Logits and the flat gradient of their entropy; ``memory`` None is plain torch."""
    if memory is None:
        logits = functional_call(net, leaves, (images,))
    else:
        with SavedActivations(net, memory=memory, **options):
            logits = functional_call(net, leaves, (images,))
    gradients = torch.autograd.grad(entropy(logits), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return logits.detach(), flatten(dict(zip(leaves, gradients, strict=True)))


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=0))


def peak(net: nn.Module, leaves: Parameters, images: Tensor, memory: str | None = None, **options) -> float:
    with MemoryMeter([*leaves.values(), images], model=net) as meter:
        logits_and_gradient(net, leaves, images, memory, **options)
    return meter.peak_mib


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_changes_nothing_but_memory(name: str) -> None:
    net, leaves, images = build(name)
    plain, truth = logits_and_gradient(net, leaves, images)
    logits, gradient = logits_and_gradient(net, leaves, images, "exact")
    assert torch.equal(logits, plain)
    torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))
    assert truth.abs().max() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_nearly_exact_and_two_are_not(name: str) -> None:
    net, leaves, images = build(name, dtype=torch.float32)
    plain, truth = logits_and_gradient(net, leaves, images)
    logits, gradient = logits_and_gradient(net, leaves, images, "compact")
    assert torch.equal(logits, plain)
    fine = cosine(gradient, truth)
    coarse = cosine(logits_and_gradient(net, leaves, images, "compact", default=Precision(bits=2))[1], truth)
    assert fine > 0.998  # random weights and four images are the hard case
    assert 0.2 < coarse < fine


@pytest.mark.parametrize(
    ("name", "exact", "compact"),
    [
        ("cifar_resnet20", 0.6, 0.2),
        ("resnet50", 0.65, 0.25),
        ("mobilenetv3_small_100", 0.9, 0.35),
        ("convnext_atto", 0.95, 0.35),
        # Of transformers plain torch keeps little that backward does not use.
        ("vit_tiny", 1.01, 0.45),
        ("swin_tiny", 1.01, 0.45),
    ],
)
def test_bytes_really_held_shrink(name: str, exact: float, compact: float) -> None:
    net, leaves, images = build(name, images=16, dtype=torch.float32)
    dense = peak(net, leaves, images)
    assert peak(net, leaves, images, "exact") < exact * dense
    assert peak(net, leaves, images, "compact") < compact * dense


@pytest.mark.parametrize("name", ["cifar_resnet20", "vit_tiny", "convnext_atto"])
def test_second_derivatives_are_exact_or_refused(name: str) -> None:
    net, leaves, images = build(name, images=2)

    def second(memory: str | None) -> Tensor:
        def loss() -> Tensor:
            return entropy(functional_call(net, leaves, (images,)))

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            if memory is None:
                value = loss()
            else:
                with SavedActivations(net, memory=memory):
                    value = loss()
            tensors = list(leaves.values())
            first = torch.autograd.grad(value, tensors, create_graph=True)
            total = torch.stack([gradient.square().sum() for gradient in first]).sum()
            return torch.cat([part.flatten() for part in torch.autograd.grad(total, tensors)])

    truth = second(None)
    torch.testing.assert_close(second("exact"), truth, rtol=1e-7, atol=1e-9 * float(truth.abs().max()))
    with pytest.raises(ConfigError, match=r"second derivatives were asked of codes.*meta.gradient=first_order"):
        second("compact")


def test_a_frozen_middle_keeps_what_goes_through_it_alone() -> None:
    net, leaves, images = build("cifar_resnet20", images=16, dtype=torch.float32)
    few = {name: leaf for name, leaf in leaves.items() if name.startswith(("bn1", "layer3"))}
    plain, truth = logits_and_gradient(net, few, images)
    logits, gradient = logits_and_gradient(net, few, images, "exact")
    assert torch.equal(logits, plain)
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-6)


def test_nothing_is_held_before_the_earliest_layer_that_learns() -> None:
    net, leaves, images = build("cifar_resnet20", images=16, dtype=torch.float32)
    late = {name: leaf for name, leaf in leaves.items() if name.startswith("layer3")}
    with SavedActivations(net, memory="exact") as saved:
        logits = functional_call(net, late, (images,))
    assert all(record.name.startswith("layer3") or not record.held_bytes for record in saved.layers[:-2])
    assert 0 < saved.held_bytes < 0.35 * peak(net, leaves, images) * 2**20
    del logits
    assert saved.held_bytes == 0


def test_two_passes_may_be_alive_at_once() -> None:
    net, leaves, images = build("cifar_resnet20")
    _, truth = logits_and_gradient(net, leaves, torch.cat([images]))
    saved = SavedActivations(net, memory="exact")
    with saved:
        first, second = (functional_call(net, leaves, (images,)) for _ in range(2))
    both = torch.autograd.grad(entropy(first) + entropy(second), list(leaves.values()))
    torch.testing.assert_close(torch.cat([part.flatten() for part in both]), 2 * truth, rtol=1e-9, atol=1e-12)


def test_a_tensor_changed_after_it_was_saved_is_noticed() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z = y * y
            y.add_(1)
            return z

    net = Careless()
    with SavedActivations(net, memory="exact"):
        out = net(torch.rand(32, 64))
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_under_autocast_and_in_channels_last() -> None:
    net, leaves, images = build("cifar_resnet20", images=8, dtype=torch.float32)
    net = net.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, truth = logits_and_gradient(net, leaves, images)
        logits, gradient = logits_and_gradient(net, leaves, images, "exact")
        _, coded = logits_and_gradient(net, leaves, images, "compact")
    assert torch.equal(logits, plain)
    assert cosine(gradient, truth) > 0.9999 and cosine(coded, truth) > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "none"}, "memory is 'none'; allowed are exact, compact, pruned"),
        ({"memory": "exact", "default": Precision(bits=8)}, "with memory=exact; allowed are 32 bits"),
        ({"memory": "compact", "default": Precision(keep=0.5)}, "keeps 0.5 with memory=compact; allowed is 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SavedActivations(nn.BatchNorm2d(3), **options)


@pytest.mark.parametrize("values", [{"bits": 9}, {"bits": 0}, {"keep": -0.1}, {"keep": 1.1}])
def test_rates_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match="a precision has"):
        Precision(**values)
