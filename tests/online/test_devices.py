"""The adapter, the engine, the prior and the experts on each device: the CPU always, CUDA where there is one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.activation_memory import SavedActivations
from metaopt.catalogue import load_method
from metaopt.models import SourceModel
from metaopt.models.cifar_resnet import CifarResNet
from metaopt.online import OnlineAdapter
from metaopt.parameters import adapted_layout, detached, flatten, own_values
from metaopt.policy import AdaptationPolicy, build_method
from metaopt.policy.precision import run_network

from ..tiny import assert_goes_on, tiny_model
from .methods import BATCHES, METHODS, run

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
MEMORIES = ("dense", "exact", "compact", "pruned")


def images(device: str, count: int = 8) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)


def resnet(device: str, dtype: torch.dtype = torch.float32) -> SourceModel:
    torch.manual_seed(0)
    return SourceModel(CifarResNet(1).to(device, dtype))


def moase() -> AdaptationPolicy:
    return build_method(load_method("moase", lr=1e-3))


def all_weights() -> AdaptationPolicy:
    return build_method(load_method("tent", adapts="all"))


def tent() -> AdaptationPolicy:
    return build_method(load_method("tent"))


POLICIES: dict[str, Callable[[], AdaptationPolicy]] = {"tent": tent, "all weights": all_weights, "moase": moase}


def autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


@on_devices
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_do_as_on_the_cpu_in_float64(method: str, device: str) -> None:
    policy = METHODS[method]()
    policy.source = None  # of the float32 network on the CPU
    adapter = OnlineAdapter(SourceModel(tiny_model().module.to(device)), policy)
    truth = OnlineAdapter(tiny_model(dtype=torch.float64), policy)
    found = run(adapter, [batch.to(device) for batch in BATCHES])
    for logits, expected in zip(found, run(truth, [batch.double() for batch in BATCHES]), strict=True):
        assert logits.device.type == device
        torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-2, atol=1e-2)
    assert adapter.updates == truth.updates and adapter.events == truth.events
    tensors = [leaf for leaf in pytree.tree_leaves(adapter.state) if isinstance(leaf, Tensor)]
    assert {tensor.device.type for tensor in (*tensors, *adapter.parameters.values())} <= {device}


@on_devices
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "autocast bfloat16", "autocast float16"])
@pytest.mark.parametrize("method", POLICIES)
@pytest.mark.parametrize("memory", [*MEMORIES[:3], pytest.param("pruned", marks=pytest.mark.slow)])
def test_memories_methods_and_precisions(memory: str, method: str, kind: str, device: str) -> None:
    cast, _, name = kind.rpartition(" ")
    dtype = getattr(torch, name)
    adapter = OnlineAdapter(
        resnet(device, torch.float32 if cast else dtype),
        POLICIES[method](),
        memory=memory,
        budget_mib=8 if memory == "pruned" else None,
    )
    with autocast(device, dtype if cast else None):
        for count in (8, 1, 8):
            assert bool(adapter(images(device, count)).isfinite().all())
    assert adapter.updates == 3
    assert all(tensor.dtype == torch.float32 for tensor in adapter.parameters.values())
    moved = flatten(adapter.parameters) - flatten(adapter.start)
    assert bool(moved.isfinite().all()) and moved.abs().max() > 0


@on_devices
@pytest.mark.parametrize("memory", ["exact", "compact"])
def test_the_engines_gradient_is_that_of_plain_torch(memory: str, device: str) -> None:
    model, gradients = resnet(device), []
    for saved in (nullcontext(), SavedActivations(model, memory=memory)):
        leaves = detached(own_values(model, adapted_layout(model).names))
        with saved:
            logits = run_network(model, leaves, images(device), {"batch_statistics": True}).logits
        entropy = torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean()
        found = torch.autograd.grad(entropy, list(leaves.values()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    near = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert near > (0.9999 if memory == "exact" else 0.99)


@on_devices
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("prior", [None, 16.0])
def test_the_prior_and_single_images(prior: float | None, count: int, device: str) -> None:
    """As in float64 on the CPU, with a graph and without."""
    how = {"batch_statistics": True, "prior": None if prior is None else torch.tensor(prior)}
    truth = resnet("cpu", torch.float64)(images("cpu", count).double(), **how).logits
    model, tensors = resnet(device), how | {"prior": None if prior is None else torch.tensor(prior, device=device)}
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            logits = model(images(device, count), **tensors).logits
        torch.testing.assert_close(logits.detach().cpu().double(), truth.detach(), rtol=5e-3, atol=5e-3)


@on_devices
@pytest.mark.parametrize("method", ["tent", "default"])
def test_a_saved_stream_goes_on(method: str, device: str, tmp_path: Path) -> None:
    model = SourceModel(tiny_model().module.to(device))
    stream = [batch.to(device) for batch in BATCHES]
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        assert_goes_on(lambda: OnlineAdapter(model, METHODS[method]()), stream, 4, tmp_path / "online.pt")
    finally:
        torch.backends.cudnn.deterministic = deterministic
