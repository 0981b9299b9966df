"""What every registered allocation promises. Registering one in ``ALLOCATIONS`` enrols it here."""

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.activation_memory import ALLOCATIONS, Allocation, AllocationState, Precision
from metaopt.activation_memory.layer_table import Layer, LayerTable
from metaopt.errors import BudgetError, ConfigError
from metaopt.policy.state import state_from_dict, state_to_dict

NUMELS = (4096, 4096, 1024, 65536, 2048, 512)
NAMES = tuple(f"block{index}.norm" for index in range(len(NUMELS)))
MENU = (*(Precision(bits) for bits in (32, 16, 8, 4, 3, 2)), Precision(4, 0.5), Precision(3, 0.25), Precision(3, 0.05))
ERRORS = (0.0, 1e-7, 2e-4, 0.013, 0.038, 0.12, 0.2, 0.4, 0.8)
PARAMETERS = {f"{name}.{role}": torch.ones(4) for name in NAMES for role in ("weight", "bias")}
GRADIENTS = torch.tensor([0.1, 2.0, 0.0, 0.5, 1e-3, 30.0])


def cost_of(numel: int) -> Callable[[Precision], int]:
    def cost(precision: Precision) -> int:
        mask = numel // 8 if precision.keep < 1 else 0
        return math.ceil(numel * precision.keep) * precision.bits // 8 + mask + (64 if precision.bits <= 8 else 0)

    return cost


def table(fixed: int = 1000, alive: numpy.ndarray | None = None, beside: numpy.ndarray | None = None) -> LayerTable:
    layers = [Layer(name, "batch_norm", 4 * n, cost_of(n)) for name, n in zip(NAMES, NUMELS, strict=True)]
    return LayerTable(layers, MENU, ERRORS, fixed, alive, beside)


def held(allocation: Allocation, tables: LayerTable, state: AllocationState, budget: int | None) -> numpy.ndarray:
    precisions = allocation.precisions(tables, NAMES, state, budget)
    assert set(precisions) == set(NAMES)
    return numpy.array([layer.cost(precisions[layer.name]) for layer in tables.layers])


@pytest.fixture(params=ALLOCATIONS)
def allocation(request: pytest.FixtureRequest) -> Allocation:
    return ALLOCATIONS[request.param]()


@pytest.fixture(params=["fresh", "seen", "no gradient"])
def state(request: pytest.FixtureRequest, allocation: Allocation) -> AllocationState:
    start = allocation.init(PARAMETERS)
    if request.param == "fresh":
        return start
    return allocation.observe(GRADIENTS if request.param == "seen" else torch.zeros(6), start)


def smallest(allocation: Allocation, tables: LayerTable, state: AllocationState) -> int:
    with pytest.raises(BudgetError) as caught:
        allocation.precisions(tables, NAMES, state, 1)
    message = str(caught.value)
    assert "\n" not in message
    return int(float(message.rpartition("budget_mib=")[2].split()[0]) * 2**20)


@pytest.mark.parametrize(
    ("alive", "beside"),
    [
        (None, None),
        (numpy.tril(numpy.ones((6, 6))), 4.0 * numpy.array(NUMELS)),
        (numpy.ones((6, 6)), numpy.full(6, 9999.0)),
    ],
)
def test_every_budget_is_kept_and_more_takes_nothing_from_a_layer(
    allocation: Allocation, state: AllocationState, alive: numpy.ndarray | None, beside: numpy.ndarray | None
) -> None:
    tables = table(1000, alive, beside)
    least = smallest(allocation, tables, state)
    before = numpy.zeros(len(NUMELS))
    for budget in numpy.linspace(least, 2 * sum(4 * n for n in NUMELS), 60).astype(int):
        bytes_held = held(allocation, tables, state, int(budget))
        assert tables.peak(bytes_held) <= budget
        assert (bytes_held >= before).all()
        before = bytes_held
    with pytest.raises(BudgetError):
        allocation.precisions(tables, NAMES, state, least - 12_000)


def test_a_smallest_budget_that_is_named_is_enough(allocation: Allocation, state: AllocationState) -> None:
    least = smallest(allocation, table(), state)
    assert table().peak(held(allocation, table(), state, least)) <= least


def test_its_inputs_stay_as_they_are(allocation: Allocation, state: AllocationState) -> None:
    gradient, kept = GRADIENTS.clone(), [tensor.clone() for tensor in state]
    first = allocation.observe(gradient, state)
    again = allocation.observe(gradient, state)
    allocation.precisions(table(), NAMES, state, 50_000)
    assert torch.equal(gradient, GRADIENTS)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert allocation.precisions(table(), NAMES, first, 50_000) == allocation.precisions(table(), NAMES, again, 50_000)


def test_its_state_goes_to_a_file_and_back(allocation: Allocation) -> None:
    state = allocation.observe(GRADIENTS, allocation.observe(2 * GRADIENTS, allocation.init(PARAMETERS)))
    leaves = pytree.tree_leaves(state)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    fresh = {"pruning": allocation.init(PARAMETERS)}
    back = state_from_dict(state_to_dict({"pruning": state}), fresh)["pruning"]
    assert isinstance(back, AllocationState)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(state, back, strict=True))
    assert int(back.steps) == 2


def test_rules_that_say_so_listen_to_gradients() -> None:
    for name, build in ALLOCATIONS.items():
        allocation = build()
        one, other = (
            allocation.observe(gradient, allocation.init(PARAMETERS)) for gradient in (GRADIENTS, GRADIENTS.flip(0))
        )
        same = allocation.precisions(table(), NAMES, one, 60_000) == allocation.precisions(
            table(), NAMES, other, 60_000
        )
        assert same == (name in ("uniform", "random")), name


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_is_refused_where_a_rule_is_made(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"decay of the running importance is .*; allowed is \[0, 1\): set 0.9"):
        ALLOCATIONS["single_pass"](decay=decay)  # type: ignore[call-arg]
