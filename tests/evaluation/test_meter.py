"""The byte meter against bytes worked out by hand."""

import gc
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from metaopt.evaluation import MemoryMeter, state_mib
from metaopt.evaluation.meter import MIB
from metaopt.models import load_source_model


def held_bytes(meter: MemoryMeter) -> int:
    return round(meter.held_mib * MIB)


def peak_bytes(meter: MemoryMeter) -> int:
    return round(meter.peak_mib * MIB)


def two_layer_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def watch(net: nn.Module, *others: Tensor) -> MemoryMeter:
    return MemoryMeter([*net.parameters(), *net.buffers(), *others])


def test_a_storage_that_two_nodes_save_counts_once():
    net, batch = two_layer_net(), torch.randn(16, 4)
    with watch(net, batch) as meter:
        loss = net(batch).sum()
        # ReLU saves its output, the second layer saves the same tensor as its input: 16 x 8 floats in all.
        assert held_bytes(meter) == 16 * 8 * 4
        loss.backward()
    assert peak_bytes(meter) == 16 * 8 * 4
    assert held_bytes(meter) == 0


def test_the_batch_counts_unless_it_is_excluded():
    net, batch = two_layer_net(), torch.randn(16, 4)
    with MemoryMeter(net.parameters()) as meter:
        loss = net(batch).sum()
    assert held_bytes(meter) == 16 * 8 * 4 + 16 * 4 * 4
    del loss
    assert held_bytes(meter) == 0


def test_an_excluded_view_excludes_its_whole_storage():
    base = torch.randn(2, 50)
    scale = torch.ones(50, requires_grad=True)
    with MemoryMeter([scale, base[0]]) as meter:
        loss = (scale * base[1]).sum()
    assert loss.requires_grad
    assert peak_bytes(meter) == 0


def test_views_and_expanded_tensors_count_their_storage():
    base = torch.randn(10, 10)
    column = torch.ones(10, 1, requires_grad=True)
    with MemoryMeter([column]) as meter:
        product = column * base[:, :3]  # saves a view of 30 elements, which keeps 100 alive
        assert held_bytes(meter) == 100 * 4
        expanded = column * torch.randn(10, 1).expand(10, 1000)  # 10,000 elements in a storage of 10
        assert held_bytes(meter) == 100 * 4 + 10 * 4
        (product.sum() + expanded.sum()).backward()
    assert held_bytes(meter) == 0


def test_two_forwards_alive_at_once_add_up_and_freed_ones_do_not():
    net, first, second = two_layer_net(), torch.randn(16, 4), torch.randn(32, 4)
    with watch(net, first, second) as together:
        losses = [net(first).sum(), net(second).sum()]
        losses[0].backward()
        assert held_bytes(together) == 32 * 8 * 4
        losses[1].backward()
    with watch(net, first, second) as apart:
        net(first).sum().backward()
        net(second).sum().backward()
    assert peak_bytes(together) == (16 + 32) * 8 * 4
    assert peak_bytes(apart) == 32 * 8 * 4


def test_what_backward_saves_for_the_second_order_counts_too():
    x = torch.ones(100, requires_grad=True)
    with MemoryMeter([x]) as meter:
        y = x.exp().sum()  # saves its output
        assert held_bytes(meter) == 400
        (slope,) = torch.autograd.grad(y, x, create_graph=True)  # d = 1 * exp(x) saves the 1, expanded from a scalar
        assert held_bytes(meter) == 400 + 4
        (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curvature, x.detach().exp())
    assert peak_bytes(meter) == 400 + 4


def test_a_graph_that_is_dropped_without_backward_is_freed_at_once():
    x = torch.randn(100, requires_grad=True)
    gc.disable()  # reference counts alone must do it: a cycle through the graph might never be collected
    try:
        with MemoryMeter([x]) as meter:
            y = x.exp().sigmoid().tanh()
            assert held_bytes(meter) == 3 * 400
            del y
            assert held_bytes(meter) == 0
    finally:
        gc.enable()
    assert peak_bytes(meter) == 3 * 400


def test_a_graph_may_outlive_the_context_and_still_leaves_the_count():
    x = torch.randn(100, requires_grad=True)
    with MemoryMeter([x]) as meter:
        first, second = x.exp(), x.exp()
    assert held_bytes(meter) == 800
    first.sum().backward()
    assert held_bytes(meter) == 400
    del second
    assert held_bytes(meter) == 0


def test_what_is_saved_outside_the_context_does_not_count():
    x = torch.randn(100, requires_grad=True)
    meter = MemoryMeter([x])
    with meter:
        pass
    y = x.exp()
    assert y.requires_grad and peak_bytes(meter) == 0


def test_the_context_may_be_entered_again_but_not_twice_at_once():
    x = torch.randn(100, requires_grad=True)
    meter = MemoryMeter([x])
    for _ in range(2):
        with meter:
            x.exp().sum().backward()
    assert peak_bytes(meter) == 400
    with meter, pytest.raises(RuntimeError, match="already watching"):
        meter.__enter__()


def small_convolution(images: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    hidden = functional.conv2d(images, weight, padding=1)
    hidden = functional.batch_norm(hidden, None, None, scale, training=True)
    return (hidden.sigmoid() * hidden.exp()).mean(dim=(2, 3)).softmax(dim=1)


def test_gradients_of_both_orders_are_right_under_the_meter():
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True),
        torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True),
        torch.rand(2, dtype=torch.float64, generator=generator, requires_grad=True),
    ]
    with MemoryMeter() as meter:
        assert gradcheck(small_convolution, inputs)
        assert gradgradcheck(small_convolution, inputs)
    assert meter.peak_mib > 0


def test_gradients_are_bit_equal_with_and_without_the_meter():
    net, batch = two_layer_net(), torch.randn(16, 4)
    plain = torch.autograd.grad(net(batch).square().sum(), list(net.parameters()))
    with watch(net, batch):
        metered = torch.autograd.grad(net(batch).square().sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, metered, strict=True))


@pytest.mark.parametrize("change_output", [True, False], ids=["saved output", "saved input"])
def test_a_change_in_place_after_saving_is_refused(change_output: bool):
    x = torch.randn(5, requires_grad=True)
    with MemoryMeter([x]):
        hidden = x * 1.0
        result = hidden.exp() if change_output else hidden * hidden
        with torch.no_grad():
            (result if change_output else hidden).add_(1.0)
        with pytest.raises(RuntimeError, match="changed in place after it was saved"):
            result.sum().backward()


def test_an_excluded_parameter_that_changed_in_place_is_refused_too():
    net, batch = two_layer_net(), torch.randn(16, 4, requires_grad=True)
    with watch(net, batch):
        loss = net(batch).sum()
        with torch.no_grad():
            net.get_parameter("2.weight").mul_(2.0)
        with pytest.raises(RuntimeError, match=r"shape \(8, 2\)|shape \(2, 8\)"):
            loss.backward()


def test_no_cuda_peak_on_the_cpu():
    with MemoryMeter([torch.ones(3)]) as meter:
        pass
    assert meter.cuda_peak_mib is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_meter_on_cuda_counts_the_same_and_reads_the_allocator():
    net, batch = two_layer_net().to("cuda"), torch.randn(16, 4, device="cuda")
    with watch(net, batch) as meter:
        net(batch).sum().backward()
    assert peak_bytes(meter) == 16 * 8 * 4
    assert held_bytes(meter) == 0
    assert meter.cuda_peak_mib is not None and meter.cuda_peak_mib * MIB >= 16 * 8 * 4


class Moments(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class State:
    moments: Moments
    by_name: dict[str, Tensor]
    views: list[Tensor]
    steps: int = 3
    name: str | None = None


def test_state_bytes_are_those_of_the_unique_storages():
    flat = torch.zeros(1000)
    state = State(
        moments=Moments(torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)),
        by_name={"again": flat, "module": torch.zeros(1).expand(500)},
        views=[flat[:10], flat[10:]],
    )
    assert state_mib(state) * MIB == 4000 + 8000 + 4000 + 4
    assert state_mib({"net": nn.BatchNorm1d(10)}) * MIB == 4 * 10 * 4 + 8  # two parameters, two buffers, the counter
    assert state_mib(()) == 0.0


@pytest.mark.slow
def test_resnet56_tent_step_holds_what_its_layers_keep():
    """Per stage, a block keeps four maps (two convolution outputs, two ReLU outputs) and the stem two.

    Batch 200, float32: (2 + 36) maps of 12.5 MiB, 36 of 6.25 and 36 of 3.125 make 812.5 MiB.
    """
    model = load_source_model("cifar_resnet56", channels_last=False)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, nn.BatchNorm2d))
    images = torch.rand(200, 3, 32, 32)
    with MemoryMeter([*model.parameters(), *model.buffers(), images]) as meter:
        logits = model(images, batch_statistics=True).logits
        torch.special.entr(logits.softmax(dim=1)).sum(dim=1).mean().backward()
    assert meter.peak_mib == pytest.approx(812.5, rel=0.02)
    assert meter.held_mib == 0.0
