"""What every registered pruning rule promises. Registering a rule in ``PRUNING_RULES`` enrols it here."""

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.errors import BudgetError, ConfigError
from metaopt.policy import PolicyState
from metaopt.policy.state import state_from_list, state_to_list
from metaopt.sparsity import PRUNING_RULES, PruningRule, PruningState, Rate
from metaopt.sparsity.ratios import Layer, LayerTable

NUMELS = (4096, 4096, 1024, 65536, 2048, 512)
NAMES = tuple(f"block{index}.norm" for index in range(len(NUMELS)))
MENU = (*(Rate(bits) for bits in (32, 16, 8, 4, 3, 2)), Rate(4, 0.5), Rate(3, 0.25), Rate(3, 0.05))
ERRORS = (0.0, 1e-7, 2e-4, 0.013, 0.038, 0.12, 0.2, 0.4, 0.8)
PARAMETERS = {f"{name}.{role}": torch.ones(4) for name in NAMES for role in ("weight", "bias")}
GRADIENTS = torch.tensor([0.1, 2.0, 0.0, 0.5, 1e-3, 30.0])


def cost_of(numel: int) -> Callable[[Rate], int]:
    def cost(rate: Rate) -> int:
        mask = numel // 8 if rate.keep < 1 else 0
        return math.ceil(numel * rate.keep) * rate.bits // 8 + mask + (64 if rate.bits <= 8 else 0)

    return cost


def table(fixed: int = 1000, alive: numpy.ndarray | None = None, beside: numpy.ndarray | None = None) -> LayerTable:
    layers = [Layer(name, "batch_norm", 4 * n, cost_of(n)) for name, n in zip(NAMES, NUMELS, strict=True)]
    return LayerTable(layers, MENU, ERRORS, fixed, alive, beside)


def held(rule: PruningRule, tables: LayerTable, state: PruningState, budget: int | None) -> numpy.ndarray:
    rates = rule.rates(tables, NAMES, state, budget)
    assert set(rates) == set(NAMES)
    return numpy.array([layer.cost(rates[layer.name]) for layer in tables.layers])


@pytest.fixture(params=PRUNING_RULES)
def rule(request: pytest.FixtureRequest) -> PruningRule:
    return PRUNING_RULES[request.param]()


@pytest.fixture(params=["fresh", "seen", "no gradient"])
def state(request: pytest.FixtureRequest, rule: PruningRule) -> PruningState:
    start = rule.init(PARAMETERS)
    if request.param == "fresh":
        return start
    return rule.observe(GRADIENTS if request.param == "seen" else torch.zeros(6), start)


def smallest(rule: PruningRule, tables: LayerTable, state: PruningState) -> int:
    with pytest.raises(BudgetError) as caught:
        rule.rates(tables, NAMES, state, 1)
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
    rule: PruningRule, state: PruningState, alive: numpy.ndarray | None, beside: numpy.ndarray | None
) -> None:
    tables = table(1000, alive, beside)
    least = smallest(rule, tables, state)
    before = numpy.zeros(len(NUMELS))
    for budget in numpy.linspace(least, 2 * sum(4 * n for n in NUMELS), 60).astype(int):
        bytes_held = held(rule, tables, state, int(budget))
        assert tables.peak(bytes_held) <= budget
        assert (bytes_held >= before).all()
        before = bytes_held
    with pytest.raises(BudgetError):
        rule.rates(tables, NAMES, state, least - 12_000)


def test_a_smallest_budget_that_is_named_is_enough(rule: PruningRule, state: PruningState) -> None:
    least = smallest(rule, table(), state)
    assert table().peak(held(rule, table(), state, least)) <= least


def test_its_inputs_stay_as_they_are(rule: PruningRule, state: PruningState) -> None:
    gradient, kept = GRADIENTS.clone(), [tensor.clone() for tensor in state]
    first = rule.observe(gradient, state)
    again = rule.observe(gradient, state)
    rule.rates(table(), NAMES, state, 50_000)
    assert torch.equal(gradient, GRADIENTS)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert rule.rates(table(), NAMES, first, 50_000) == rule.rates(table(), NAMES, again, 50_000)


def test_its_state_goes_to_a_file_and_back(rule: PruningRule) -> None:
    state = rule.observe(GRADIENTS, rule.observe(2 * GRADIENTS, rule.init(PARAMETERS)))
    leaves = pytree.tree_leaves(state)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    fresh = PolicyState(pruning=rule.init(PARAMETERS))
    back = state_from_list(state_to_list(PolicyState(pruning=state)), fresh).pruning
    assert isinstance(back, PruningState)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(state, back, strict=True))
    assert int(back.steps) == 2


def test_rules_that_say_so_listen_to_gradients() -> None:
    for name, build in PRUNING_RULES.items():
        rule = build()
        one, other = (rule.observe(gradient, rule.init(PARAMETERS)) for gradient in (GRADIENTS, GRADIENTS.flip(0)))
        same = rule.rates(table(), NAMES, one, 60_000) == rule.rates(table(), NAMES, other, 60_000)
        assert same == (name in ("uniform", "random")), name


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_is_refused_where_a_rule_is_made(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"decay of the running importance is .*; allowed is \[0, 1\): set 0.9"):
        PRUNING_RULES["single_pass"](decay=decay)  # type: ignore[call-arg]
