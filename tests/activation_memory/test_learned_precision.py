"""Learned precisions: where they start, what they listen to, and derivatives through the soft allocation."""

import numpy
import pytest
import torch

from metaopt.activation_memory import AllocationState, LearnedPrecision, Precision, build_allocation
from metaopt.activation_memory.layer_table import Layer, LayerTable
from metaopt.activation_memory.learned_precision import soft_allocation

NUMELS = (4096, 4096, 1024, 65536, 2048, 512)
NAMES = tuple(f"n{index}" for index in range(len(NUMELS)))
MENU = tuple(Precision(bits) for bits in (32, 16, 8, 4, 3, 2))
ERRORS = (0.0, 1e-7, 2e-4, 0.013, 0.038, 0.12)
STATE = AllocationState(torch.tensor([0.1, 2.0, 0.7, 0.5, 1e-2, 3.0]), torch.tensor(3))
DENSE = 4 * sum(NUMELS)
BUDGETS = [int(share * DENSE) for share in (0.07, 0.1, 0.15, 0.2, 0.4)]


def table() -> LayerTable:
    layers = [
        Layer(name, "batch_norm", 4 * n, lambda precision, n=n: n * precision.bits // 8)
        for name, n in zip(NAMES, NUMELS, strict=True)
    ]
    return LayerTable(layers, MENU, ERRORS)


def trained(seed: int = 0) -> LearnedPrecision:
    head = LearnedPrecision().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in head.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return head


@pytest.mark.parametrize("budget", BUDGETS)
def test_it_starts_as_rate_distortion(budget: int) -> None:
    fresh, plain = LearnedPrecision().double(), build_allocation("rate_distortion")
    assert fresh.precisions(table(), NAMES, STATE, budget) == plain.precisions(table(), NAMES, STATE, budget)


def test_without_a_budget_it_keeps_all() -> None:
    assert set(trained().precisions(table(), NAMES, STATE, None).values()) == {Precision()}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_is_kept(budget: int) -> None:
    precisions = trained().precisions(table(), NAMES, STATE, budget)
    assert sum(layer.cost(precisions[layer.name]) for layer in table().layers) <= budget


def test_it_listens_to_gradients_sizes_depth_kind_and_budget() -> None:
    head = trained()
    base = head.importance(table(), NAMES, STATE, BUDGETS[0])
    others = {
        "gradient": head.importance(table(), NAMES, STATE._replace(importance=STATE.importance.flip(0)), BUDGETS[0]),
        "budget": head.importance(table(), NAMES, STATE, BUDGETS[-1]),
    }
    layers = table().layers
    kinds = LayerTable(
        [Layer(x.name, "layer_norm" if i % 2 else x.kind, x.dense_bytes, x.cost) for i, x in enumerate(layers)],
        MENU,
        ERRORS,
    )
    sizes = LayerTable(
        [Layer(x.name, x.kind, 1 + x.dense_bytes // (i + 1), x.cost) for i, x in enumerate(layers)], MENU, ERRORS
    )
    others["kind"] = head.importance(kinds, NAMES, STATE, BUDGETS[0])
    others["size"] = head.importance(sizes, NAMES, STATE, BUDGETS[0])
    for name, other in others.items():
        assert float((other - base).detach().abs().max()) > 1e-3, name
    alike = AllocationState(torch.ones(6), torch.tensor(1))
    same = LayerTable([Layer(x.name, x.kind, 4096, x.cost) for x in layers], MENU, ERRORS)
    assert len(set(head.importance(same, NAMES, alike, BUDGETS[0]).tolist())) == 6  # the depth alone differs


@pytest.mark.parametrize("budget", BUDGETS)
def test_soft_choices_cost_the_budget(budget: int) -> None:
    choices = trained().soft_choices(table(), NAMES, STATE, budget)
    assert torch.allclose(choices.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert float((choices * torch.as_tensor(table().costs)).sum().detach()) == pytest.approx(budget, rel=1e-6)


def test_the_soft_allocations_derivative_is_that_of_its_values() -> None:
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(6, generator=generator, dtype=torch.float64).requires_grad_()
    errors = torch.tensor(ERRORS, dtype=torch.float64)
    costs = torch.as_tensor(table().costs / DENSE)
    probe = torch.randn(6, len(MENU), generator=generator, dtype=torch.float64)

    def value(importance: torch.Tensor) -> torch.Tensor:
        return (probe * soft_allocation(importance.unsqueeze(1) * errors, costs, 0.12, 0.02)).sum()

    assert torch.autograd.gradcheck(value, (importance,), eps=1e-6, atol=1e-6)


def test_gradients_reach_all_of_the_head() -> None:
    head = trained()
    choices = head.soft_choices(table(), NAMES, STATE, BUDGETS[1])
    (choices * torch.as_tensor(numpy.array(ERRORS))).sum().backward()
    assert all(tensor.grad is not None and bool((tensor.grad != 0).any()) for tensor in head.parameters())
