"""A budget bounds what is held, as the meter sees it, on networks of every kind and over more than one step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.activation_memory import ActivationMemory, AllocationState, MemoryConfig, Profiles, build_allocation
from metaopt.errors import BudgetError
from metaopt.evaluation import MemoryMeter
from metaopt.types import Parameters

from .networks import NETWORKS, build
from .test_networks import entropy, peak

NAMES = ("rate_distortion", "single_pass", "uniform", "random")
SHARES = (0.0, 0.1, 0.4, 1.0)  # of the way from the smallest possible budget to what the dense step holds
Loss = Callable[[nn.Module, Parameters, Tensor], Tensor]


def one_view(net: nn.Module, leaves: Parameters, images: Tensor) -> Tensor:
    return entropy(functional_call(net, leaves, (images,)))


def two_views(net: nn.Module, leaves: Parameters, images: Tensor) -> Tensor:
    """Both graphs are alive until backward comes to each."""
    first, second = (functional_call(net, leaves, (some,)) for some in (images, images.flip(-1)))
    return entropy(first) - (first.softmax(dim=1) * second.log_softmax(dim=1)).sum(dim=1).mean()


class Steps:
    """Steps of one network with a allocation under a budget."""

    def __init__(
        self, net: nn.Module, leaves: Parameters, allocation: str, budget: float, loss: Loss, profiles: Profiles
    ) -> None:
        self.net, self.leaves, self.loss = net, leaves, loss
        self.memory = ActivationMemory(MemoryConfig("pruned", budget), build_allocation(allocation), profiles)
        assert self.memory.allocation is not None
        self.state: AllocationState | None = self.memory.allocation.init(leaves)

    def __call__(self, images: Tensor) -> float:
        """One step; gives the MiB held."""

        def loss_of(some: Tensor) -> Tensor:
            return self.loss(self.net, self.leaves, some)

        self.memory.prepare(self.net, loss_of, self.leaves, images)
        with (
            MemoryMeter([*self.leaves.values(), images], model=self.net) as meter,
            self.memory.step(self.net, loss_of, self.leaves, self.state, images) as kept,
        ):
            torch.autograd.grad(loss_of(images), list(self.leaves.values()), allow_unused=True)
        self.state = kept.state
        return meter.peak_mib


def check(net: nn.Module, leaves: Parameters, images: Tensor, loss: Loss = one_view) -> list[float]:
    """Every budget is kept, by every allocation; gives the shares of the smallest budgets that are used."""
    dense, profiles, used = peak(net, leaves, images), Profiles(), []
    for allocation in NAMES:
        with pytest.raises(BudgetError, match="is too small") as caught:
            Steps(net, leaves, allocation, 1e-3, loss, profiles)(images)
        least = float(str(caught.value).rpartition("budget_mib=")[2].split()[0])
        for share in SHARES:
            budget = least + share * max(0.0, dense - least)
            step = Steps(net, leaves, allocation, budget, loss, profiles)
            held = [step(batch) for batch in (images, images.roll(1, dims=1) ** 2)]
            assert max(held) <= budget, (allocation, share, held)
            used += [max(held) / budget] if share == 0.0 else []
    return used


QUICK = ("gru", "pooled", "excited", "shared", "checkpointed")


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NETWORKS])
def test_no_step_holds_more_than_its_budget(name: str) -> None:
    net, leaves, images = build(name, images=8, dtype=torch.float32)
    used = check(net, leaves, images)
    assert max(used) > 0.85  # the smallest budget that is named is not much more than is needed


@pytest.mark.parametrize("name", ["shared", *(pytest.param(n, marks=pytest.mark.slow) for n in ("pooled", "rooted"))])
def test_nor_with_two_views_whose_graphs_are_both_alive(name: str) -> None:
    net, leaves, images = build(name, images=8, dtype=torch.float32)
    assert max(check(net, leaves, images, two_views)) > 0.85


@pytest.mark.slow
def test_nor_with_a_frozen_middle() -> None:
    net, leaves, images = build("pooled", images=8, dtype=torch.float32)
    check(net, {name: leaf for name, leaf in leaves.items() if name.startswith("body.1")}, images)
    net, leaves, images = build("grouped", images=8, dtype=torch.float32)
    check(net, {name: leaf for name, leaf in leaves.items() if not name.startswith("blocks.1")}, images)


def test_dry_runs_are_shared_by_those_that_run_the_same() -> None:
    net, leaves, images = build("shared", images=8, dtype=torch.float32)
    counted: list[int] = []
    handle = net.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    profiles = Profiles()
    for allocation in NAMES:
        Steps(net, leaves, allocation, 1.0, one_view, profiles)(images)
        counted.append(0)
    handle.remove()
    first = counted.index(0)
    assert first > 10 and counted[first + 1 :] == [8, 0] * 3
