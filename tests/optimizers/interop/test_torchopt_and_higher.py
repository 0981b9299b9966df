"""The generator in torchopt and higher, and beside them in torch.optim."""

import copy
from collections.abc import Callable

import higher
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torchopt.transform import scale

from metaopt.errors import ConfigError
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.interop.higher import DifferentiableMGG
from metaopt.optimizers.interop.torch_optim import MGGOptimizer
from metaopt.optimizers.interop.torchopt import gradient_transformation
from metaopt.optimizers.mgg import VARIANTS, GradientGenerator
from tests.optimizers.bridge import drawn_generator

LR = 0.03
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Net(nn.Module):
    """Everything adapts; ``unused`` never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def loss_of(module: Callable[[Tensor], Tensor], step: int) -> Tensor:
    return (module(X + 0.1 * step) - torch.sin(X[:, :3])).square().mean()


def names_in_torchopts_order(module: nn.Module) -> tuple[str, ...]:
    """Submodule by submodule, each one's own tensors sorted by name."""
    return tuple(
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in sorted(dict(part.named_parameters(recurse=False)))
    )


def by_torch(generator: GradientGenerator, steps: int) -> dict[str, Tensor]:
    module = net()
    named = dict(module.named_parameters())
    optimizer = MGGOptimizer([named[name] for name in generator.tensors] or list(named.values()), generator)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in module.named_parameters()}


def by_torchopt(generator: GradientGenerator, steps: int) -> dict[str, Tensor]:
    module = net()
    names = [name for name, _ in module.named_parameters()]
    optimizer = torchopt.MetaOptimizer(module, torchopt.chain(gradient_transformation(generator)))
    for step in range(steps):
        optimizer.step(loss_of(module, step))
    return _tensors(module, names)


def _tensors(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Tensors by name: torchopt puts plain ones in the parameters' place."""
    found = {}
    for name in names:
        prefix, _, last = name.rpartition(".")
        found[name] = getattr(module.get_submodule(prefix), last)
    return found


def by_torchopt_functions(generator: GradientGenerator, steps: int) -> dict[str, Tensor]:
    module = net()
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    transformation = gradient_transformation(generator)
    state = transformation.init(parameters)
    for step in range(steps):
        loss = loss_of(lambda x, now=parameters: torch.func.functional_call(module, now, (x,)), step)
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
        gradients = dict(zip(parameters, found, strict=True))
        updates, state = transformation.update(gradients, state, params=parameters, inplace=False)
        parameters = torchopt.apply_updates(parameters, updates, inplace=False)
    return parameters


def by_higher(generator: GradientGenerator, steps: int) -> dict[str, Tensor]:
    module = net()
    named = dict(module.named_parameters())
    optimizer = MGGOptimizer([named[name] for name in generator.tensors] or list(named.values()), generator)
    with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (functional, differentiable):
        for step in range(steps):
            differentiable.step(loss_of(functional, step))
        names = [name for name, _ in module.named_parameters()]
        return dict(zip(names, list(functional.parameters()), strict=True))


FACES = {"torchopt": by_torchopt, "torchopt functions": by_torchopt_functions, "higher": by_higher}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_faces_give_the_same_parameters(variant: str, named: bool) -> None:
    generator = drawn_generator(variant, names_in_torchopts_order(net()) if named else (), lr=LR)
    expected = by_torch(generator, steps=8)
    start = dict(net().named_parameters())
    assert max(float((tensor - start[name]).detach().abs().max()) for name, tensor in expected.items()) > 0.01
    for face, run in FACES.items():
        found = run(generator, 8)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            difference = float((found[name].detach() - tensor).abs().max())
            assert difference < 1e-12, (face, name, difference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_differentiable_faces_give_the_generator_the_same_meta_gradient(variant: str) -> None:
    slopes = {}
    for face, run in FACES.items():
        generator = drawn_generator(variant, lr=LR)
        total = torch.cat([tensor.reshape(-1) for tensor in run(generator, 4).values()]).square().sum()
        slopes[face] = dict(
            zip(
                dict(generator.named_parameters()),
                torch.autograd.grad(total, list(generator.parameters())),
                strict=True,
            )
        )
    for face in ("torchopt functions", "higher"):
        for name, slope in slopes["torchopt"].items():
            assert slope.abs().max() > 0, name
            scale = float(slope.norm())
            assert float((slopes[face][name] - slope).norm()) < 1e-9 * scale, (face, name)


def test_a_dictionary_is_matched_by_name_whatever_its_order() -> None:
    names = ("weight", "bias", "a")
    generator = drawn_generator("step_sizes", names, lr=LR)
    gradients = {name: torch.full((2,), 1.0 + index, dtype=torch.float64) for index, name in enumerate(names)}
    expected, _ = generator.update(gradients, generator.init(gradients))
    transformation = gradient_transformation(generator)
    for order in (names, tuple(reversed(names)), tuple(sorted(names))):
        given = {name: gradients[name] for name in order}
        updates, _ = transformation.update(given, transformation.init(given), params=given, inplace=False)
        for name in names:
            assert torch.equal(updates[name], -expected[name])


def test_it_takes_its_place_in_a_chain() -> None:
    generator = drawn_generator("step_sizes", lr=LR)
    halved = torchopt.chain(gradient_transformation(generator), scale(0.5))
    plain = gradient_transformation(generator)
    gradients = (torch.ones(3, dtype=torch.float64), -torch.ones(2, dtype=torch.float64))
    half, _ = halved.update(gradients, halved.init(gradients), params=gradients, inplace=False)
    whole, _ = plain.update(gradients, plain.init(gradients), params=gradients, inplace=False)
    for one, other in zip(half, whole, strict=True):
        torch.testing.assert_close(one, 0.5 * other)
    assert float(whole[0][0].detach()) < 0 < float(whole[1][0].detach())


def test_a_missing_gradient_without_parameters_is_refused() -> None:
    transformation = gradient_transformation(drawn_generator())
    tensors = (torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    state = transformation.init(tensors)
    with pytest.raises(ConfigError, match=r"a gradient is None and no params were given; call update\(\.\.\., params"):
        transformation.update((tensors[0], None), state)
    with_zero, _ = transformation.update((tensors[0], torch.zeros_like(tensors[1])), state)
    filled, _ = transformation.update((tensors[0], None), state, params=tensors)
    assert all(torch.equal(one, other) for one, other in zip(with_zero, filled, strict=True))


def test_equal_tensors_in_one_tree_keep_their_own_moves() -> None:
    transformation = gradient_transformation(drawn_generator("step_sizes", ("a", "b"), lr=LR))
    shared = torch.ones(2, dtype=torch.float64)
    updates, _ = transformation.update((shared, shared), transformation.init((shared, shared)))
    assert not torch.equal(updates[0], updates[1])


def test_torchopt_takes_hand_made_rules_as_well() -> None:
    module, reference = net(), net()
    optimizer = torchopt.MetaOptimizer(module, gradient_transformation(Adam(lr=LR)))
    adam = torch.optim.Adam(reference.parameters(), lr=LR)
    for step in range(5):
        optimizer.step(loss_of(module, step))
        adam.zero_grad()
        loss_of(reference, step).backward()
        adam.step()
    names = [name for name, _ in reference.named_parameters()]
    for name, tensor in _tensors(module, names).items():
        torch.testing.assert_close(tensor.detach(), reference.get_parameter(name).detach(), rtol=1e-12, atol=1e-12)


def test_higher_takes_over_a_state_mid_stream_and_leaves_the_original_alone() -> None:
    generator = drawn_generator(lr=LR)
    module = net()
    optimizer = MGGOptimizer(module.parameters(), generator)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict()["generator_state"])
    leaves = list(module.parameters())
    differentiable = higher.get_diff_optim(optimizer, leaves)
    assert isinstance(differentiable, DifferentiableMGG)
    moved = differentiable.step(loss_of(module, 3), params=leaves)
    for now, then in zip(optimizer.state_dict()["generator_state"], kept, strict=True):
        assert torch.equal(now, then)
    optimizer.zero_grad()
    loss_of(module, 3).backward()
    optimizer.step()
    for one, other in zip(moved, leaves, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-12)


def test_higher_scales_each_group_by_its_rate() -> None:
    first, second = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "lr": 2 * LR}]
    differentiable = higher.get_diff_optim(MGGOptimizer(groups, drawn_generator(lr=LR)), [first, second])
    moved = list(differentiable.step((first + second).sum(), params=[first, second]))
    torch.testing.assert_close(1 - moved[1], 2 * (1 - moved[0]), rtol=1e-12, atol=0.0)
