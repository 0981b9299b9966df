"""Networks in half precision and under autocast: finite, adapted, and about as good as in float32."""

import copy
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.catalogue import load_method
from metaopt.data import load_digits
from metaopt.data.shifts import get_shift
from metaopt.data.stream import corrupt
from metaopt.models import SourceModel
from metaopt.models.cifar_resnet import CifarResNet
from metaopt.models.digits_vit import digits_vit
from metaopt.online import OnlineAdapter
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.parameters import flatten
from metaopt.policy import AdaptationPolicy, build_method

from ..tiny import assert_goes_on, random_images, small_digits, tiny_model, trained_model
from .methods import BATCHES, METHODS, UPDATING, run

# How the network runs: its own type, and the caller's autocast.
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}
MEMORIES = ("dense", "exact", "compact", "pruned")
SETTINGS: dict[str, dict[str, Any]] = {  # of methods by name
    "tent": {"parts": {"batch_statistics": 16, "restoration": True}},
    "all weights": {"adapts": "all", "parts": {"batch_statistics": True}},
    "moase": {"lr": 1e-3},  # experts and a teacher
    "cotta": {"parts": {"batch_statistics": True, "teacher": {"views": 2, "restore": 0.0, "predicts": True}}},
    "roid": {},
}

QUICK = {("autocast", memory, method, "resnet") for memory in MEMORIES[:3] for method in SETTINGS}
TOGETHER = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(("bfloat16", "float16", "autocast"), MEMORIES, SETTINGS, ("resnet", "vit"))
]


def within(kind: str) -> AbstractContextManager:
    autocast = KINDS[kind][1]
    return nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)


def cast(model: SourceModel, kind: str) -> SourceModel:
    return SourceModel(copy.deepcopy(model.module).to(KINDS[kind][0]), spec=model.spec)


def bare(policy: AdaptationPolicy) -> AdaptationPolicy:
    policy.source = None
    return policy


def network(name: str) -> SourceModel:
    torch.manual_seed(0)
    net = CifarResNet(1) if name == "resnet" else digits_vit()
    for tensor in net.parameters():  # timm's heads start at zero, where there is no gradient
        tensor.data.add_(0.02 * torch.randn_like(tensor))
    return SourceModel(net)


def named_method(name: str) -> AdaptationPolicy:
    return build_method(load_method("tent" if name == "all weights" else name, **SETTINGS[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_do_as_in_float32(method: str, kind: str) -> None:
    """State, tensors and logits in float32; the tensors move, and to about where they move in float32."""
    adapter, whole = (
        OnlineAdapter(cast(tiny_model(), kind), METHODS[method]()),
        OnlineAdapter(tiny_model(), METHODS[method]()),
    )
    with within(kind):
        logits = run(adapter)
    expected = run(whole)
    assert adapter.events == whole.events and adapter.updates == whole.updates
    floats = [
        leaf for leaf in pytree.tree_leaves(adapter.state) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    assert {t.dtype for t in (*floats, *logits, *adapter.parameters.values(), *adapter.start.values())} == {
        torch.float32
    }
    assert all(bool(t.isfinite().all()) for t in (*floats, *logits, *adapter.parameters.values()))
    for found, true in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=0.1, atol=0.1)
    moved, truly = (flatten(a.parameters).detach() - flatten(a.start) for a in (adapter, whole))
    assert (moved.norm() > 0) == (method in UPDATING)
    if method in UPDATING:
        assert torch.nn.functional.cosine_similarity(moved, truly, dim=0) > 0.9


@pytest.mark.parametrize(("kind", "memory", "method", "name"), TOGETHER)
def test_memory_methods_and_precisions_go_together(kind: str, memory: str, method: str, name: str) -> None:
    adapter = OnlineAdapter(
        cast(network(name), kind),
        named_method(method),
        memory=memory,
        budget_mib=12 if memory == "pruned" else None,
    )
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with within(kind):
        for batch in (images, images[:1], images):
            assert bool(adapter(batch).isfinite().all())
    assert adapter.updates == 3 and adapter.events["nonfinite"] == 0
    assert all(
        tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in adapter.parameters.values()
    )
    assert (flatten(adapter.parameters) - flatten(adapter.start)).abs().max() > 0


def error_on_digits(kind: str | None, method: str) -> float:
    """Percent, on 300 held-out digits of little contrast."""
    part = corrupt(load_digits().stream, get_shift("contrast"), 5)
    images, labels = small_digits(part)[:300], part.labels
    assert labels is not None
    model = trained_model()
    adapter = OnlineAdapter(model if kind is None else cast(model, kind), bare(METHODS[method]()))
    with within(kind) if kind else nullcontext():
        predicted = torch.cat([adapter(batch).argmax(dim=1) for batch in images.split(50)])
    return 100 * float((predicted != labels[:300]).float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_within_a_few_points_of_float32s(kind: str) -> None:
    source, whole = error_on_digits(None, "source"), error_on_digits(None, "tent")
    assert whole < source - 5  # there is something to gain
    assert abs(error_on_digits(kind, "tent") - whole) < 3
    assert abs(error_on_digits(kind, "source") - source) < 3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_no_loss_is_too_small_or_too_large_for_float16(scale: float) -> None:
    moved = []
    for dtype in (torch.float16, torch.float32):
        adapter = OnlineAdapter(SourceModel(copy.deepcopy(tiny_model().module).to(dtype)), METHODS["tent"]())
        assert adapter.policy.objective is not None
        adapter.policy.objective.log_weights.data += torch.tensor(scale).log()
        run(adapter, BATCHES[:3])
        assert adapter.updates == 3
        moved.append(flatten(adapter.parameters).detach() - flatten(adapter.start))
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["tent", "default"])
def test_the_export_is_in_the_networks_types(method: str, dtype: torch.dtype) -> None:
    model = SourceModel(copy.deepcopy(tiny_model().module).to(dtype))
    adapter = OnlineAdapter(model, bare(METHODS[method]()))
    run(adapter)
    exported = adapter.export()
    for name, tensor in model.module.state_dict().items():
        assert exported[name].dtype == tensor.dtype
    assert not torch.equal(exported["bn1.weight"], model.module.state_dict()["bn1.weight"])
    assert {t.dtype for t in adapter.parameters.values()} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["tent", "residual", "default"])
def test_a_saved_stream_goes_on_bit_for_bit(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = SourceModel(copy.deepcopy(tiny_model().module).to(dtype))
    assert_goes_on(lambda: OnlineAdapter(model, METHODS[method]()), BATCHES, 4, tmp_path / "online.pt")


def test_norm_layers_of_another_type_than_the_rest() -> None:
    net = copy.deepcopy(tiny_model().module).bfloat16()
    net.bn1.float()
    net.bn2.float()
    adapter = OnlineAdapter(SourceModel(net), METHODS["tent"]())
    run(adapter)
    assert adapter.updates == 8 and adapter.export()["bn1.weight"].dtype == torch.float32
    assert adapter.export()["conv1.weight"].dtype == torch.bfloat16


def test_autocast_reaches_the_network_alone() -> None:
    seen: dict[str, bool] = {}
    adapter = OnlineAdapter(tiny_model(), METHODS["residual"]())
    rule = adapter.policy.rule
    assert isinstance(rule, GradientGenerator) and rule.memory is not None
    for name, module in (("network", adapter.model.module), ("rule", rule.memory)):
        module.register_forward_hook(lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(adapter)
        assert torch.is_autocast_enabled("cpu")
    assert seen == {"network": True, "rule": False}


def test_images_of_another_type_are_brought_to_the_networks() -> None:
    images = random_images(4)
    for own in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        model = SourceModel(copy.deepcopy(tiny_model().module).to(own))
        logits = [model(images.to(given)).logits for given in (torch.float32, torch.float64, torch.float16)]
        assert {each.dtype for each in logits} == {own}
        torch.testing.assert_close(logits[0], logits[1], rtol=0.05, atol=0.05)
