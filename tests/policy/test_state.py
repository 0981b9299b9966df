"""The state tree: there and back, and no shared storage."""

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.objectives import WeightedObjective
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.mgg import VARIANTS
from metaopt.optimizers.sgd import SGD
from metaopt.optimizers.update import InPlaceApply
from metaopt.parameters import adapted_layout, detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.policy.state import State, copied_state, detached_state, state_from_dict, state_to_dict
from metaopt.policy.step import adaptation_step

from ..tiny import random_images, tiny_model, tiny_policy


def methods() -> dict[str, AdaptationPolicy]:
    generators = {variant: tiny_policy(tiny_model(), variant) for variant in VARIANTS}
    rules = {"adam": Adam(), "sgd": SGD()}
    return {
        "source": AdaptationPolicy("source", parts=[BatchStatistics()]),
        **{
            name: AdaptationPolicy(name, WeightedObjective({"slr": 1}), rule, [BatchStatistics()])
            for name, rule in rules.items()
        },
        **generators,
    }


def moved_state(policy: AdaptationPolicy, steps: int = 2) -> State:
    """The state after a few batches."""
    model = tiny_model()
    parameters = detached({name: tensor.clone() for name, tensor in adapted_layout(model).take(model).items()})
    state = policy.init(parameters)
    apply = None if policy.rule is None else InPlaceApply(policy.rule)
    for seed in range(steps):
        parameters, state, _ = adaptation_step(policy, model, parameters, state, random_images(8, seed), apply)
    return state


def leaves(state: State) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", methods())
def test_there_and_back(name: str) -> None:
    policy = methods()[name]
    state = moved_state(policy)
    values = state_to_dict(state)
    tensors = [tensor for part in values.values() for tensor in part]
    back = state_from_dict(values, moved_state(policy, steps=0))
    assert pytree.tree_structure(back) == pytree.tree_structure(state)
    assert len(leaves(back)) == len(leaves(state)) == len(tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves(back), leaves(state), strict=True))
    assert ("rule" in values) == (name != "source") and tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_copies_share_nothing(name: str) -> None:
    state = moved_state(methods()[name])
    before = [leaf.clone() for leaf in leaves(state)]
    for copy in (copied_state(state), state_from_dict(state_to_dict(state), state)):
        for leaf in leaves(copy):
            assert leaf.is_contiguous()
            leaf.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(state), strict=True))


def test_another_rules_state_is_refused() -> None:
    adam, sgd, residual = (moved_state(methods()[name]) for name in ("adam", "sgd", "residual"))
    for tensors, like in ((adam, sgd), (sgd, adam), (residual, adam)):
        with pytest.raises(ValueError, match="belongs to another rule or another model"):
            state_from_dict(state_to_dict(tensors), like)
    for tensors, like in ((adam, {}), ({}, adam)):
        with pytest.raises(ValueError, match=r"has other parts \(batch_statistics, rule\)"):
            state_from_dict(state_to_dict(tensors), like)


def test_detaching_cuts_the_graph_and_keeps_the_values() -> None:
    policy = methods()["residual"]
    state = policy.init(adapted_layout(tiny_model()).take(tiny_model()))
    assert any(leaf.requires_grad for leaf in leaves(state))  # the memory's learned start
    cut = detached_state(state)
    assert not any(leaf.requires_grad for leaf in leaves(cut))
    assert all(torch.equal(a, b) for a, b in zip(leaves(cut), leaves(state), strict=True))


def test_a_state_is_as_large_as_promised() -> None:
    """h² + h + 2 floats for each adapted scalar, and one counter."""
    policy, count = methods()["residual"], adapted_layout(tiny_model()).numel
    assert sum(tensor.numel() for tensor in leaves(moved_state(policy)["rule"])) == (64 + 8 + 2) * count + 1
