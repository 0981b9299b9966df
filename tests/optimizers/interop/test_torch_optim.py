"""The generator as a ``torch.optim.Optimizer``."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metaopt.errors import CheckpointError, ConfigError
from metaopt.optimizers.interop.torch_optim import MGGOptimizer
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from tests.optimizers.bridge import drawn_generator

LR = 0.03


def leaves(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 5, dtype=dtype)), nn.Parameter(torch.ones(2, 2, dtype=dtype))]


def set_gradients(tensors: list[nn.Parameter], step: int) -> None:
    for index, tensor in enumerate(tensors):
        drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7 * step + index))
        tensor.grad = drawn.to(tensor.dtype)


def tensors_of(optimizer: MGGOptimizer) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(optimizer.generator_state) if isinstance(leaf, Tensor)]


def test_it_descends_a_quadratic() -> None:
    torch.manual_seed(0)
    (tensor, _) = leaves()
    optimizer = MGGOptimizer([tensor], GradientGenerator(GeneratorConfig(lr=0.1)).double())
    for _ in range(60):
        optimizer.zero_grad()
        tensor.square().sum().backward()
        optimizer.step()
    assert float(tensor.detach().square().sum()) < 1e-2


def test_a_step_subtracts_the_generators_update() -> None:
    tensors, generator = leaves(), drawn_generator(lr=LR)
    optimizer, state = MGGOptimizer(tensors, generator), None
    expected = {str(index): tensor.detach().clone() for index, tensor in enumerate(tensors)}
    for step in range(5):
        set_gradients(tensors, step)
        gradients = {str(index): tensor.grad.clone() for index, tensor in enumerate(tensors) if tensor.grad is not None}
        with torch.no_grad():
            updates, state = generator.update(gradients, state or generator.init(expected))
        expected = {name: tensor - updates[name] for name, tensor in expected.items()}
        optimizer.step()
    for tensor, value in zip(tensors, expected.values(), strict=True):
        torch.testing.assert_close(tensor.detach(), value, rtol=1e-13, atol=1e-13)


def test_each_groups_rate_scales_its_own_moves() -> None:
    moved = {}
    for second in (LR, 3 * LR):
        first, other = leaves()
        optimizer = MGGOptimizer([{"params": [first]}, {"params": [other], "lr": second}], drawn_generator(lr=LR))
        assert [group["lr"] for group in optimizer.param_groups] == [LR, second]
        start = other.detach().clone()
        set_gradients([first, other], 0)
        optimizer.step()
        moved[second] = (first.detach().clone(), other.detach() - start)
    torch.testing.assert_close(moved[3 * LR][0], moved[LR][0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(moved[3 * LR][1], 3 * moved[LR][1], rtol=1e-12, atol=0.0)
    assert moved[LR][1].abs().min() > 0


def test_a_scheduler_changes_its_rate() -> None:
    (tensor, _) = leaves()
    optimizer = MGGOptimizer([tensor], drawn_generator(lr=LR), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    set_gradients([tensor], 0)
    optimizer.step()
    scheduler.step()
    before = tensor.detach().clone()
    optimizer.step()
    assert torch.equal(tensor.detach(), before)


def test_a_closure_is_evaluated_with_gradients_on() -> None:
    (tensor, _) = leaves()
    optimizer = MGGOptimizer([tensor], drawn_generator())
    before = tensor.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tensor.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == float(before.square().sum())
    assert not torch.equal(tensor.detach(), before)


def test_a_missing_gradient_counts_as_zero() -> None:
    outcomes = []
    for explicit in (True, False):
        tensors = leaves()
        optimizer = MGGOptimizer(tensors, drawn_generator())
        for step in range(3):
            set_gradients(tensors, step)
            if step == 1:
                tensors[0].grad = torch.zeros_like(tensors[0]) if explicit else None
            optimizer.step()
        outcomes.append([tensor.detach() for tensor in tensors])
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def run(optimizer: MGGOptimizer, tensors: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(tensors, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_state_goes_through_a_file_mid_stream_bit_for_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    generator = drawn_generator(lr=LR).to(torch.promote_types(dtype, torch.float32))
    straight = leaves(dtype)
    run(MGGOptimizer(straight, generator), straight, range(6))
    first = leaves(dtype)
    optimizer = MGGOptimizer(first, generator, lr=LR)
    run(optimizer, first, range(3))
    torch.save({"tensors": first, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    values = torch.load(tmp_path / "state.pt", weights_only=True)
    second = [nn.Parameter(tensor.detach().clone()) for tensor in values["tensors"]]
    resumed = MGGOptimizer(second, generator, lr=999.0)
    resumed.load_state_dict(values["optimizer"])
    run(resumed, second, range(3, 6))
    assert resumed.param_groups[0]["lr"] == LR
    for one, other in zip(straight, second, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_shared_with_a_state_that_was_saved_or_loaded() -> None:
    tensors = leaves()
    optimizer = MGGOptimizer(tensors, drawn_generator())
    run(optimizer, tensors, range(2))
    saved = optimizer.state_dict()
    kept = [tensor.clone() for tensor in saved["generator_state"]]
    run(optimizer, tensors, range(2, 4))
    assert all(torch.equal(now, then) for now, then in zip(saved["generator_state"], kept, strict=True))
    other = MGGOptimizer(leaves(), drawn_generator())
    other.load_state_dict(saved)
    for tensor in saved["generator_state"]:
        tensor.zero_()
    assert all(torch.equal(now, then) for now, then in zip(tensors_of(other), kept, strict=True))


def test_a_state_from_before_the_first_step_resets() -> None:
    tensors = leaves()
    optimizer = MGGOptimizer(tensors, drawn_generator())
    fresh = optimizer.state_dict()
    run(optimizer, tensors, range(2))
    optimizer.load_state_dict(fresh)
    assert optimizer.generator_state is None


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    tensors = leaves()
    optimizer = MGGOptimizer(tensors, drawn_generator(lr=LR))
    run(optimizer, tensors, range(2))
    before = optimizer.state_dict()
    small = [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    foreign = MGGOptimizer(small, drawn_generator(), lr=1.0)
    run(foreign, small, range(1))
    with pytest.raises(CheckpointError, match="tensors that do not fit; this generator over these parameters needs 5"):
        optimizer.load_state_dict(foreign.state_dict())
    assert optimizer.param_groups[0]["lr"] == LR
    for now, then in zip(tensors_of(optimizer), before["generator_state"], strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_goes_on_by_itself(duplicate: Any) -> None:
    tensors = leaves()
    optimizer = MGGOptimizer(tensors, drawn_generator())
    run(optimizer, tensors, range(2))
    twin = duplicate(optimizer)
    twins = twin.param_groups[0]["params"]
    run(optimizer, tensors, range(2, 4))
    assert not torch.equal(twins[0], tensors[0])
    run(twin, twins, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(tensors, twins, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_keep_a_float32_state(dtype: torch.dtype) -> None:
    tensors = leaves(dtype)
    optimizer = MGGOptimizer(tensors, GradientGenerator(GeneratorConfig()))
    run(optimizer, tensors, range(3))
    assert {tensor.dtype for tensor in tensors_of(optimizer)} == {torch.float32, torch.int64}
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in tensors)
    resumed = MGGOptimizer(leaves(dtype), optimizer.generator)
    resumed.load_state_dict(optimizer.state_dict())
    for now, then in zip(tensors_of(resumed), tensors_of(optimizer), strict=True):
        assert now.dtype == then.dtype and torch.equal(now, then)


def test_a_group_after_the_first_step_is_refused() -> None:
    first, second = leaves()
    optimizer = MGGOptimizer([first], drawn_generator())
    optimizer.add_param_group({"params": [second], "lr": 0.1})
    run(optimizer, [first, second], range(1))
    with pytest.raises(ConfigError, match="parameter group was added after the first step; add every group before it"):
        optimizer.add_param_group({"params": leaves()})


def test_step_sizes_for_other_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="step sizes for 3 tensors and got 2"):
        MGGOptimizer(leaves(), drawn_generator(tensors=("a", "b", "c")))


def test_the_learned_start_of_the_memory_is_never_written_to() -> None:
    generator = drawn_generator()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    tensors = leaves()
    run(MGGOptimizer(tensors, generator), tensors, range(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())
    assert all(tensor.grad is None for tensor in generator.parameters())
