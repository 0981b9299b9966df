"""The byte meter by layer, through checkpoints, within another meter and on sparse tensors."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from metaopt.evaluation import MemoryMeter
from metaopt.evaluation.meter import MIB

from .test_meter_hidden import HIDING_PLACES, N, held, hiding, peak


def layers(count: int = 4, width: int = 64) -> nn.Sequential:
    """Each activation saves its output, and no weight learns but the first layer's."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for index in range(count):
        net.add_module(f"linear{index}", nn.Linear(width, width).requires_grad_(index == 0))
        net.add_module(f"act{index}", nn.Tanh())
    return net


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_network_checkpointed_as_a_whole_reads_its_true_peak(reentrant: bool) -> None:
    net, batch = layers(), torch.randn(32, 64, requires_grad=reentrant)
    dense = torch.autograd.grad(net(batch).sum(), list(net[0].parameters()))
    with MemoryMeter([batch], model=net) as plain:
        net(batch).sum().backward()
    net.zero_grad()
    with MemoryMeter([batch], model=net) as meter:
        y = checkpoint(net, batch, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        loss = y.sum()
        random_state = torch.get_rng_state().nbytes if reentrant else 0  # kept as an attribute of ctx
        assert held(meter) == random_state
        loss.backward()
        assert held(meter) == random_state
        del loss, y
        assert held(meter) == 0
    assert peak(plain) == 4 * 32 * 64 * 4
    assert peak(meter) == peak(plain) + random_state
    assert {layer: size for layer, size in meter.layers_mib.items() if layer != "(outside)"} == plain.layers_mib
    for parameter, gradient in zip(net[0].parameters(), dense, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)


def test_checkpointed_segments_hold_their_inputs_and_one_segment_at_a_time() -> None:
    net, batch = layers(6), torch.randn(32, 64)
    block = 32 * 64 * 4
    with MemoryMeter([batch], model=net) as meter:
        x = batch
        for start in (0, 4, 8):
            x = checkpoint(net[start : start + 4], x, use_reentrant=False)
            assert isinstance(x, Tensor)
        loss = x.sum()
        del x
        assert held(meter) == 2 * block  # the inputs of the second and the third segment
        loss.backward()
    assert peak(meter) == 4 * block
    assert meter.held_mib == 0.0


def test_checkpoints_in_a_checkpoint_add_up() -> None:
    net, batch = layers(6), torch.randn(32, 64)
    block = 32 * 64 * 4

    def whole(x: Tensor) -> Tensor:
        for start in (0, 4, 8):
            x = checkpoint(net[start : start + 4], x, use_reentrant=False)  # type: ignore[assignment]
        return x

    with MemoryMeter([batch], model=net) as meter:
        loss = checkpoint(whole, batch, use_reentrant=False).sum()  # type: ignore[union-attr]
        assert held(meter) == 0
        loss.backward()
    assert peak(meter) == 4 * block


def test_each_layer_is_named_with_what_it_was_first_to_keep() -> None:
    net, batch = layers(2), torch.randn(32, 64)
    for module in net.modules():
        module.requires_grad_(True)
    block = 32 * 64 * 4 / MIB
    with MemoryMeter([batch], model=net) as meter:
        net(batch).exp().sum().backward()
    # The second linear layer's input is the first activation's output; the loss keeps its own.
    assert meter.layers_mib == {"act0": block, "act1": block, "(outside)": block}


def test_the_layer_of_a_hidden_attribute_is_the_one_that_hid_it() -> None:
    class Cheat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hiding(HIDING_PLACES["attribute"])(x)

    net = nn.Sequential(nn.Linear(10, 10), nn.Sequential(Cheat(), nn.Identity()))
    with MemoryMeter(model=net) as meter:
        net(torch.randn(5, 10)).sum().backward()
    assert meter.layers_mib == {"0": 5 * 10 * 4 / MIB, "1.0": 5 * 10 * 4 / MIB}  # the batch is not excluded here


def test_layers_at_the_peak_are_those_of_the_peak() -> None:
    first, second = nn.Tanh(), nn.Sigmoid()
    x = torch.randn(N, requires_grad=True)
    model = nn.ModuleDict({"first": first, "second": second})
    with MemoryMeter([x], model=model) as meter:
        first(x.expand(3, N)).sum().backward()
        second(x.expand(2, N)).sum().backward()
    assert meter.layers_mib == {"first": 3 * 4 * N / MIB}


def test_the_meter_leaves_model_and_hooks_as_they_were() -> None:
    net, entry = layers(), saved_tensors_hooks.__enter__
    with pytest.raises(RuntimeError, match="shapes"), MemoryMeter(model=net):
        net(torch.randn(3, 5))
    assert saved_tensors_hooks.__enter__ is entry
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with MemoryMeter(model=net) as meter:
        net(torch.randn(32, 64)).sum().backward()
    assert "(outside)" not in meter.layers_mib


def test_a_meter_in_a_meter_reads_the_same() -> None:
    net, batch = layers(), torch.randn(32, 64)
    with MemoryMeter([batch], model=net) as outer, MemoryMeter([batch], model=net) as inner:
        checkpoint(net, batch, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
        hiding(HIDING_PLACES["attribute"])(net(batch)).sum().backward()
    assert peak(outer) == peak(inner) == 5 * 32 * 64 * 4


def test_sparse_tensors_and_their_parts_count() -> None:
    dense = torch.eye(10)
    x = torch.randn(10, 3, requires_grad=True)
    with MemoryMeter([x]) as meter:
        y = torch.sparse.mm(dense.to_sparse(), x).sum()
        assert held(meter) == 10 * 4 + 2 * 10 * 8  # values and the two indices
        y.backward()
