"""What every update rule promises, by hand or learned. A row of ``metaopt.registry.RULES`` enrols a rule here."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaopt import registry
from metaopt.optimizers.mgg import VARIANTS, GeneratorConfig, GradientGenerator
from metaopt.policy.state import state_from_dict, state_to_dict
from metaopt.types import Parameters, UpdateRule

SHAPES = {"a": (3,), "b": (2, 2), "c": (), "d": (1,)}
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(params=[*registry.RULES, *VARIANTS])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, dtype: torch.dtype = torch.float64) -> UpdateRule:
    """The rule with its learned tensors moved off their special start, so that each takes part."""
    torch.manual_seed(0)
    rule: UpdateRule
    if name in VARIANTS:
        rule = GradientGenerator(GeneratorConfig(name, lr=0.01))
    else:
        rule = registry.get("update rule", name)(lr=0.01)
    if isinstance(rule, nn.Module):
        rule.to(dtype)
        with torch.no_grad():
            for tensor in rule.parameters():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return rule


def gradients(steps: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Parameters]:
    randomness = torch.Generator().manual_seed(1)
    return [
        {key: scale * torch.randn(shape, generator=randomness, dtype=dtype) for key, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def run(rule: UpdateRule, given: list[Parameters], state: Any = None) -> tuple[list[Parameters], Any]:
    state = rule.init(given[0]) if state is None else state
    found = []
    for each in given:
        updates, state = rule.update(each, state)
        found.append(updates)
    return found, state


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def copied(tree: Any) -> Any:
    """The same values as leaves of their own; a rule without some part of its state has None there."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def assert_equal(left: Any, right: Any) -> None:
    for one, other in zip(tensors_of(left), tensors_of(right), strict=True):
        assert torch.equal(one, other)


def test_its_inputs_stay_as_they_are_and_so_does_the_rule(name: str) -> None:
    rule = build(name)
    own = [tensor.detach().clone() for tensor in rule.parameters()] if isinstance(rule, nn.Module) else []
    given = gradients(4)
    _, state = run(rule, given[:3])
    kept_state, kept_gradients = copied(state), copied(given[3])
    first = rule.update(given[3], state)
    assert_equal(state, kept_state)
    assert_equal(given[3], kept_gradients)
    assert_equal(own, list(rule.parameters()) if isinstance(rule, nn.Module) else [])
    assert_equal(first, rule.update(given[3], state))


def test_init_reads_shapes_alone(name: str) -> None:
    rule = build(name)
    zeros, others = ({key: torch.full(shape, value).double() for key, shape in SHAPES.items()} for value in (0.0, 7.0))
    assert_equal(rule.init(zeros), rule.init(others))


def test_its_state_is_a_tree_of_tensors(name: str) -> None:
    _, state = run(build(name), gradients(2))
    leaves = pytree.tree_leaves(state)
    assert all(isinstance(leaf, Tensor) for leaf in leaves if leaf is not None)
    assert sum(leaf.numel() for leaf in leaves if leaf is not None) > 0
    fresh = pytree.tree_structure(build(name).init(gradients(1)[0]))
    assert pytree.tree_structure(state) == fresh


def test_updates_have_the_gradients_names_shapes_and_order(name: str) -> None:
    (updates,), _ = run(build(name), gradients(1))
    assert {key: tuple(tensor.shape) for key, tensor in updates.items()} == SHAPES
    assert list(updates) == list(SHAPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_type_and_device_are_kept(name: str, dtype: torch.dtype) -> None:
    found, state = run(build(name, dtype), gradients(3, dtype))
    assert {tensor.dtype for tensor in tensors_of(found)} == {dtype}
    assert {tensor.dtype for tensor in tensors_of(state) if tensor.is_floating_point()} == {dtype}
    meta = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in SHAPES.items()}
    rule = build(name, dtype)
    rule = rule.to("meta") if isinstance(rule, nn.Module) else rule
    found, state = run(rule, [meta, meta])  # type: ignore[arg-type]
    assert {tensor.device.type for tensor in tensors_of((found, state))} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_computes_the_same_on_cuda(name: str) -> None:
    on_cpu, _ = run(build(name), gradients(5))
    rule = build(name)
    rule = rule.to("cuda") if isinstance(rule, nn.Module) else rule
    on_cuda, _ = run(rule, [{key: tensor.cuda() for key, tensor in each.items()} for each in gradients(5)])  # type: ignore[arg-type]
    for one, other in zip(tensors_of(on_cpu), tensors_of(on_cuda), strict=True):
        assert other.device.type == "cuda"
        torch.testing.assert_close(one, other.cpu(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e10, 1e15])
def test_values_and_derivatives_stay_finite(name: str, dtype: torch.dtype, scale: float) -> None:
    rule = build(name, dtype)
    given = [{key: tensor.requires_grad_() for key, tensor in each.items()} for each in gradients(3, dtype, scale)]
    found, state = run(rule, given)
    inputs = tensors_of(given) + (list(rule.parameters()) if isinstance(rule, nn.Module) else [])
    total = torch.stack([tensor.sum() for tensor in tensors_of(found)]).sum()
    slopes = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    for tensor in [*tensors_of((found, state)), *slopes]:
        assert torch.isfinite(tensor).all()


def test_one_huge_scalar_does_not_disturb_the_others(name: str) -> None:
    rule, plain = build(name), gradients(3)
    spiked = [copied(each) for each in plain]
    spiked[1]["b"][0, 0] = 1e12
    for calm, loud in zip(run(rule, plain)[0], run(rule, spiked)[0], strict=True):
        for key in ("a", "c", "d"):
            assert torch.equal(calm[key], loud[key])


def test_how_scalars_are_cut_into_tensors_does_not_matter(name: str) -> None:
    rule, given = build(name), gradients(5)
    merged = [{"all": torch.cat([tensor.reshape(-1) for tensor in each.values()])} for each in given]
    found, whole = run(rule, given)[0], run(rule, merged)[0]
    for each, together in zip(found, whole, strict=True):
        flat = torch.cat([tensor.reshape(-1) for tensor in each.values()])
        assert torch.equal(flat, together["all"])
    for order in itertools.islice(itertools.permutations(SHAPES), 1, None, 7):
        shuffled, _ = run(rule, [{key: each[key] for key in order} for each in given])
        for each, other in zip(found, shuffled, strict=True):
            for key in SHAPES:
                torch.testing.assert_close(each[key], other[key], rtol=1e-12, atol=1e-15)


def test_a_saved_state_goes_on_bit_for_bit(name: str, tmp_path: Any) -> None:
    rule, given = build(name), gradients(7)
    with torch.no_grad():
        straight, last = run(rule, given)
        _, state = run(rule, given[:4])
        torch.save(state_to_dict({"rule": state}), tmp_path / "state.pt")
        tensors = torch.load(tmp_path / "state.pt", weights_only=True)
        loaded = state_from_dict(tensors, {"rule": rule.init(given[0])})["rule"]
        resumed, resumed_last = run(rule, given[4:], loaded)
    assert_equal(straight[4:], resumed)
    assert_equal(last, resumed_last)


def test_a_foreign_state_is_refused(name: str) -> None:
    rule, given = build(name), gradients(1)
    saved = state_to_dict({"rule": rule.init(given[0])})
    smaller = rule.init({"a": torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(ValueError, match="another rule or another model"):
        state_from_dict(saved, {"rule": smaller})
    with pytest.raises(ValueError, match="another rule or another model"):
        state_from_dict({"rule": saved["rule"][:-1]}, {"rule": rule.init(given[0])})


def test_it_is_differentiable_in_gradients_state_and_learned_tensors(name: str) -> None:
    rule, given = build(name), gradients(3)
    # A state far from zero, where the root of the second moment is no steeper than finite differences can follow.
    _, state = run(rule, [{key: 3.0 + tensor for key, tensor in given[0].items()}])
    state = copied(state)
    leaves, structure = pytree.tree_flatten(state)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    learned = dict(rule.named_parameters()) if isinstance(rule, nn.Module) else {}

    def apply(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        now = list(leaves)
        for index in moving:
            now[index] = next(remaining)
        found = [{key: next(remaining) for key in SHAPES} for _ in range(2)]
        return tuple(tensors_of(run(rule, found, pytree.tree_unflatten(now, structure))))

    inputs = [tensor.clone().requires_grad_() for tensor in [leaves[i] for i in moving] + tensors_of(given[1:])]
    assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)
    outputs = run(rule, given)[0]
    if learned:
        total = torch.cat([tensor.reshape(-1) for tensor in tensors_of(outputs)]).square().sum()
        for key, slope in zip(learned, torch.autograd.grad(total, list(learned.values())), strict=True):
            assert slope.abs().max() > 0, key
