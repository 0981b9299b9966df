"""The gradient memory layer against the oracle, whose memory step comes from autograd."""

import pytest
import torch
from torch import Tensor

from metaopt.optimizers.mgg import GradientMemoryLayer

from .bridge import ORACLE_NAMES, drawn_memory, oracle_weights
from .oracle import OracleMGG


def features(steps: int, count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(steps, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_has_164_learned_scalars() -> None:
    memory = GradientMemoryLayer()
    counts = {name: tensor.numel() for name, tensor in memory.named_parameters()}
    assert sum(counts.values()) == 164
    assert set(counts) == set(ORACLE_NAMES)
    assert sum(counts[name] for name in ("query", "key", "value")) == 48
    assert sum(counts[name] for name in ("initial_weight", "initial_bias")) == 72
    assert sum(counts[name] for name in ("rate_weight", "rate_bias")) == 3
    assert sum(counts[name] for name in counts if "norm" in name) == 32
    assert sum(counts[name] for name in ("readout_weight", "readout_bias")) == 9


def test_the_published_start_is_small_and_random_and_the_residual_one_reads_nothing() -> None:
    torch.manual_seed(0)
    memory, silent = GradientMemoryLayer(), GradientMemoryLayer(zero_readout=True)
    assert 0.01 < float(memory.initial_weight.detach().std()) < 0.03
    assert not memory.initial_bias.any()
    assert memory.readout_weight.all()
    assert not silent.readout_weight.any() and not silent.readout_bias.any()
    x = features(1)[0].float()
    assert not silent(x, *silent.init(3))[0].any()


@pytest.mark.parametrize("hidden", [1, 3, 8])
def test_twenty_steps_agree_with_the_oracle(hidden: int) -> None:
    memory = drawn_memory(hidden)
    xs = features(20)
    weight, bias = memory.init(3)
    oracles = [OracleMGG(oracle_weights(memory)) for _ in range(3)]
    for index, oracle in enumerate(oracles):
        # The features are given, so the oracle's own are put aside.
        oracle.features = lambda g, index=index: list(xs[int(g), index])  # type: ignore[method-assign]
    for step in range(20):
        with torch.no_grad():
            readout, weight, bias = memory(xs[step], weight, bias)
        for index, oracle in enumerate(oracles):
            y = oracle.step([float(step)])
            torch.testing.assert_close(torch.tanh(readout[index]), y, rtol=0.0, atol=1e-10)
            torch.testing.assert_close(weight[index], oracle.W.detach(), rtol=0.0, atol=1e-10)
            torch.testing.assert_close(bias[index], oracle.b.detach(), rtol=0.0, atol=1e-10)


def test_scalars_do_not_see_each_other() -> None:
    memory = drawn_memory()
    x = features(1)[0]
    together = memory(x, *memory.init(3))
    alone = memory(x[1:2], *memory.init(1))
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:2], one, rtol=1e-13, atol=1e-14)


def test_a_step_changes_no_input() -> None:
    memory = drawn_memory()
    x = features(1)[0]
    weight, bias = (start.clone() for start in memory.init(3))
    before = [tensor.clone() for tensor in (x, weight, bias)]
    memory(x, weight, bias)
    assert all(torch.equal(now, then) for now, then in zip((x, weight, bias), before, strict=True))


NAMES = tuple(ORACLE_NAMES)


def run_layer(x: Tensor, weight: Tensor, bias: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Two steps, so that a derivative passes through the memory."""
    memory = GradientMemoryLayer(2).double()
    named = dict(zip(NAMES, tensors, strict=True))
    for entry in x.unbind():
        readout, weight, bias = torch.func.functional_call(memory, named, (entry, weight, bias))
    return readout, weight, bias


def layer_inputs() -> list[Tensor]:
    memory = drawn_memory(2)
    weight, bias = (start.detach().clone() + 0.1 * torch.randn_like(start) for start in memory.init(2))
    own = dict(memory.named_parameters())
    return [features(2, count=2), weight, bias, *(own[name].detach().clone() for name in NAMES)]


@pytest.mark.parametrize("frozen", range(len(NAMES) + 3))
def test_first_derivatives_with_each_input_frozen_in_turn(frozen: int) -> None:
    torch.manual_seed(0)
    inputs = [tensor.requires_grad_(index != frozen) for index, tensor in enumerate(layer_inputs())]
    assert torch.autograd.gradcheck(run_layer, inputs)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    inputs = [tensor.requires_grad_() for tensor in layer_inputs()]
    assert torch.autograd.gradgradcheck(run_layer, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(run_layer, inputs, fast_mode=True)


def test_the_learned_tensors_derivatives_agree_with_the_differentiable_oracle() -> None:
    memory = drawn_memory()
    gradients = [0.3, -1.2, 0.0, 5e-4]
    oracle = OracleMGG(oracle_weights(memory), differentiable=True)
    expected = torch.autograd.grad(oracle.step(gradients), list(memory.parameters()))
    weight, bias = memory.init(1)
    source = OracleMGG(oracle_weights(memory))
    for g in gradients:
        x = torch.stack(source.features(torch.tensor(g, dtype=torch.float64))).unsqueeze(0)
        readout, weight, bias = memory(x, weight, bias)
    found = torch.autograd.grad(torch.tanh(readout).sum(), list(memory.parameters()))
    for name, mine, theirs in zip(dict(memory.named_parameters()), found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=name)
