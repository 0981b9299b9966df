"""The generator as a whole: variants, reductions, state and cost."""

import json
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaopt.errors import ConfigError
from metaopt.optimizers.mgg import VARIANTS, GeneratorConfig, GradientGenerator
from metaopt.settings import build
from metaopt.types import Parameters

from .bridge import drawn_generator, oracle_weights
from .oracle import OracleMGG

SHAPES = {"a": (2,), "b": (1, 2), "c": ()}


def drawn(steps: int, seed: int = 0, shapes: dict[str, tuple[int, ...]] | None = None) -> list[Parameters]:
    """Gradients of every size between 1e-3 and 30, one scalar of ``a`` dead throughout."""
    randomness = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        tensors = {
            name: 10 ** torch.empty((), dtype=torch.float64).uniform_(-3, 1.5, generator=randomness)
            * torch.randn(shape, generator=randomness, dtype=torch.float64)
            for name, shape in (shapes or SHAPES).items()
        }
        if shapes is None:
            tensors["a"][0] = 0.0
        found.append(tensors)
    return found


def scalars(tensors: Parameters) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("variant", ["published", "residual"])
def test_twenty_steps_agree_with_the_oracle(variant: str, named: bool) -> None:
    generator = drawn_generator(variant, tuple(SHAPES) if named else (), lr=0.03, clamp=0.8)
    assert generator.memory is not None
    gradients = drawn(20)
    state = generator.init(gradients[0])
    oracles = [OracleMGG(oracle_weights(generator.memory)) for _ in range(5)]
    sizes = torch.ones(5, dtype=torch.float64)
    if generator.log_step_sizes is not None:
        own = generator.log_step_sizes.detach().exp()
        sizes = own[[0, 0, 1, 1, 2]] if named else own.expand(5)
    for given in gradients:
        with torch.no_grad():
            updates, state = generator.update(given, state)
        for index, (oracle, g) in enumerate(zip(oracles, scalars(given), strict=True)):
            expected = oracle.step([g])
            if variant == "residual":
                root = (oracle.v / (1 - 0.99**oracle.t)).sqrt()
                momentum = oracle.m / (1 - 0.9**oracle.t) / (root + 1e-8)
                expected = sizes[index] * (momentum.clamp(-0.8, 0.8) + expected)
            torch.testing.assert_close(scalars(updates)[index], 0.03 * expected, rtol=0.0, atol=1e-10)
            assert state.memory_weight is not None
            torch.testing.assert_close(state.memory_weight[index], oracle.W.detach(), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("variant", ["residual", "step_sizes"])
def test_at_its_start_it_is_adam(variant: str) -> None:
    torch.manual_seed(0)
    lr = 0.02
    generator = GradientGenerator(GeneratorConfig(variant, lr=lr, clamp=1e6), tuple(SHAPES)).double()
    gradients = drawn(20)
    ours = {name: torch.ones_like(tensor) for name, tensor in gradients[0].items()}
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in ours.items()}
    adam = torch.optim.Adam(theirs.values(), lr=lr, betas=(0.9, 0.99), eps=1e-8)
    state = generator.init(ours)
    for given in gradients:
        with torch.no_grad():
            updates, state = generator.update(given, state)
        ours = {name: tensor - updates[name] for name, tensor in ours.items()}
        for name, tensor in theirs.items():
            tensor.grad = given[name].clone()
        adam.step()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor.detach(), rtol=1e-12, atol=1e-12)


def test_the_momentum_is_clamped() -> None:
    generator = GradientGenerator(GeneratorConfig("step_sizes", lr=1.0, clamp=0.25)).double()
    given = {"a": torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)}
    updates, _ = generator.update(given, generator.init(given))
    assert updates["a"].tolist() == [0.25, -0.25, 0.0]


def test_each_tensor_has_its_own_log_step_size() -> None:
    given = drawn(1)[0]
    plain = GradientGenerator(GeneratorConfig("step_sizes"), tuple(SHAPES)).double()
    before, _ = plain.update(given, plain.init(given))
    assert plain.log_step_sizes is not None
    plain.log_step_sizes.data.copy_(torch.tensor([0.0, math.log(2.0), math.log(0.5)]))
    after, _ = plain.update(given, plain.init(given))
    for name, factor in zip(SHAPES, (1.0, 2.0, 0.5), strict=True):
        torch.testing.assert_close(after[name], factor * before[name], rtol=1e-7, atol=0.0)
    assert float(plain.penalty().detach()) == pytest.approx(2 * math.log(2.0) ** 2 / 3)
    (slope,) = torch.autograd.grad(after["b"].sum(), plain.log_step_sizes)
    assert slope[0] == 0.0 and slope[1] != 0.0 and slope[2] == 0.0


def test_the_published_variant_has_no_step_sizes_and_the_ablation_no_memory() -> None:
    published, ablation = (GradientGenerator(GeneratorConfig(name)) for name in ("published", "step_sizes"))
    assert published.log_step_sizes is None and float(published.penalty()) == 0.0
    assert sum(tensor.numel() for tensor in published.parameters()) == 164
    assert ablation.memory is None and [name for name, _ in ablation.named_parameters()] == ["log_step_sizes"]


@pytest.mark.parametrize("hidden", [3, 8])
def test_the_state_is_the_memory_two_moments_and_one_counter(hidden: int) -> None:
    given = drawn(2)
    for variant, per_scalar in (("residual", hidden**2 + hidden + 2), ("step_sizes", 2)):
        generator = GradientGenerator(GeneratorConfig(variant, hidden=hidden)).double()
        state = generator.init(given[0])
        for gradients in given:
            _, state = generator.update(gradients, state)
            leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
            floats = [leaf for leaf in leaves if leaf.is_floating_point()]
            assert sum(leaf.numel() for leaf in floats) == per_scalar * 5
            assert [tuple(leaf.shape) for leaf in leaves if not leaf.is_floating_point()] == [()]
        # Storages, not shapes: nothing bigger hides behind a view.
        assert sum(leaf.untyped_storage().nbytes() for leaf in floats) == per_scalar * 5 * 8


class OpCounter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_costs_the_same_operations_whatever_the_number_of_tensors(variant: str, named: bool) -> None:
    counts = {}
    for tensors in (2, 40):
        shapes = {f"t{index}": (3,) for index in range(tensors)}
        given = drawn(1, shapes=shapes)[0]
        generator = drawn_generator(variant, tuple(shapes) if named else ())
        state = generator.init(given)
        with torch.no_grad(), OpCounter() as counter:
            generator.update(given, state)
        per_tensor = {"view", "_unsafe_view", "reshape"}
        counts[tensors] = {name: count for name, count in counter.ops.items() if name not in per_tensor}
        assert sum(counter.ops[name] for name in per_tensor) <= 2 * tensors + 20
    assert counts[2] == counts[40]
    assert sum(counts[2].values()) < 100


def test_a_generator_for_other_tensors_is_refused() -> None:
    generator = GradientGenerator(GeneratorConfig(), ("a", "b"))
    with pytest.raises(ConfigError, match=r"step sizes for 2 tensors and got 3 \(differing: c\)"):
        generator.init(drawn(1)[0])
    with pytest.raises(ConfigError, match="differing: the order"):
        generator.init({"b": torch.zeros(1), "a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "magic"}, "generator is 'magic'; allowed are residual, published, step_sizes: choose one"),
        ({"lr": 0.0}, "generator.lr is 0.0; it must be positive and finite"),
        ({"lr": math.inf}, "generator.lr is inf"),
        ({"lr": math.nan}, "generator.lr is nan"),
        ({"hidden": 0}, "generator.hidden is 0; it must be a whole number of at least 1"),
        ({"hidden": 2.5}, "generator.hidden is 2.5; it must be a whole number"),
        ({"clamp": -1.0}, "generator.clamp is -1.0; it must be positive"),
        ({"clamp": math.nan}, "generator.clamp is nan"),
        ({"eps": 0.0}, "generator.eps is 0.0; it must be positive and finite"),
        ({"eps": math.inf}, "generator.eps is inf"),
        ({"betas": (0.9, 1.0)}, r"generator.betas is \(0.9, 1.0\); .* use for example \(0.9, 0.99\)"),
        ({"betas": (0.9,)}, r"generator.betas is \(0.9,\); it must be two numbers"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig(**settings)


def test_settings_survive_as_primitives() -> None:
    config = GeneratorConfig("published", lr=1e-4, hidden=4, clamp=2.0, betas=(0.8, 0.9), eps=1e-6)
    assert build(GeneratorConfig, asdict(config)) == config
    assert build(GeneratorConfig, json.loads(json.dumps(asdict(config)))) == config  # where betas are a list
