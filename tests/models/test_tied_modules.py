"""Networks that hold one module, or one tensor, under several names."""

import copy

import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.meta import MetaTrainConfig
from metaopt.models import SourceModel
from metaopt.parameters import adapted_layout, call_with, full_layout

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """One norm layer under two names, run twice, and a bias that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.n = nn.BatchNorm2d(6)
        self.m = self.n
        self.other = nn.BatchNorm2d(6)
        self.other.bias = self.n.bias
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.m(self.n(self.conv(x)).relu()).relu()).mean(dim=(2, 3)))


@pytest.fixture
def net() -> Tied:
    torch.manual_seed(0)
    return Tied()


def kinds(net: nn.Module) -> dict[str, type]:
    return {f"{name}.{role}": type(t) for name, each in net.named_modules() for role, t in each._parameters.items()}


@pytest.mark.parametrize("memory", ["dense", "exact", "compact", "pruned"])
@pytest.mark.parametrize("adapts", ["norm", "all"])
def test_adaptation_leaves_the_network_as_it_is(net: Tied, memory: str, adapts: str) -> None:
    before, types = copy.deepcopy(net.state_dict()), kinds(net)
    method = metaopt.build_method(metaopt.load_method("tent", lr=0.1, adapts=adapts))
    adapter = metaopt.OnlineAdapter(net, method, memory=memory)
    for _ in range(3):
        adapter(IMAGES)
    assert adapter.updates == 3
    assert kinds(net) == types
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    exported = adapter.export()
    assert torch.equal(exported["m.weight"], exported["n.weight"])
    assert torch.equal(exported["other.bias"], exported["n.bias"])
    assert not torch.equal(exported["n.weight"], before["n.weight"])
    fresh = Tied()
    fresh.load_state_dict(exported)
    with adapter.frozen(), torch.no_grad():
        used = SourceModel(fresh)(IMAGES, batch_statistics=True).logits
        torch.testing.assert_close(adapter(IMAGES), used)


def test_a_tied_module_adapts_once_and_has_the_gradient_of_both_uses(net: Tied) -> None:
    assert adapted_layout(net).names == ("n.weight", "n.bias", "other.weight")
    for layout in (adapted_layout(net), full_layout(net)):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in layout.take(net).items()}
        gradients = torch.autograd.grad(call_with(net, leaves, (IMAGES,)).square().sum(), list(leaves.values()))
        expected = torch.autograd.grad(net(IMAGES).square().sum(), list(layout.take(net).values()))
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_name_that_a_module_has_beside_its_first_one_is_taken(net: Tied) -> None:
    by_first, by_second = (call_with(net, {f"{name}.weight": 2 * net.n.weight}, (IMAGES,)) for name in "nm")
    assert torch.equal(by_first, by_second)
    assert not torch.equal(by_first, net(IMAGES))
    assert isinstance(net.n.weight, nn.Parameter)


def test_a_policy_of_it_is_accepted(net: Tied) -> None:
    config = MetaTrainConfig(epochs=1, unrolls=1, steps=2, first_steps=1, batch_size=6, selection_tasks=1)
    policy = metaopt.meta_train(net, IMAGES, ["gaussian_blur"], config, quiet=True)
    adapter = metaopt.OnlineAdapter(net, policy)
    assert adapter(IMAGES).shape == (12, 5)
    metaopt.OnlineAdapter(net, policy)


def test_a_name_of_no_parameter_and_no_buffer_is_refused_and_nothing_stays_swapped(net: Tied) -> None:
    net.scale = torch.ones(())  # plain, so that nothing could stand in for it
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stand_ins = {"n.weight": 2 * net.n.weight.detach(), "scale": torch.zeros(())}
    with pytest.raises(AttributeError, match="scale of Tied is no parameter or buffer"):
        call_with(net, stand_ins, (IMAGES,))
    with pytest.raises(AttributeError):
        call_with(net, {"absent.weight": net.n.weight}, (IMAGES,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
