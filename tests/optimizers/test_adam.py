"""Adam's moments and normalised gradients, which the generator takes over from it."""

import pytest
import torch
from torch import Tensor

from metaopt.optimizers.adam import Moments, gradient_features, init_moments, safe_sqrt

from .oracle import OracleMGG, random_weights

BETAS, EPS = (0.9, 0.99), 1e-8


def gradients(steps: int, count: int = 4) -> Tensor:
    drawn = torch.randn(steps, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn * torch.logspace(-4, 3, count, dtype=torch.float64)


def test_twenty_steps_agree_with_the_oracle() -> None:
    gs = gradients(20)
    moments = init_moments(gs[0])
    oracles = [OracleMGG(random_weights()) for _ in range(4)]
    for g in gs:
        momentum, gradient, moments = gradient_features(g, moments, BETAS, EPS)
        expected = torch.stack([torch.stack(oracle.features(entry)) for oracle, entry in zip(oracles, g, strict=True)])
        torch.testing.assert_close(torch.stack((momentum, gradient), dim=1), expected, rtol=1e-12, atol=1e-14)
    assert int(moments.step) == 20


def test_the_state_goes_in_unchanged() -> None:
    moments = init_moments(torch.zeros(3, dtype=torch.float64))
    gradient_features(torch.ones(3, dtype=torch.float64), moments, BETAS, EPS)
    assert int(moments.step) == 0 and not moments.momentum.any() and not moments.second_moment.any()


def test_the_safe_root_has_zero_derivatives_at_zero() -> None:
    value = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(safe_sqrt(value).sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), value)
    assert first.tolist() == [0.0, 0.25]
    assert second.tolist() == [0.0, -0.03125]


def features_of(gradient: Tensor, momentum: Tensor, second_moment: Tensor) -> tuple[Tensor, ...]:
    moments = Moments(momentum, second_moment, torch.tensor(3))
    *found, after = gradient_features(gradient, moments, BETAS, EPS)
    return (*found, after.momentum, after.second_moment)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_derivatives_of_first_and_second_order(frozen: int | None) -> None:
    gradient, momentum = gradients(2, 3)
    inputs = [
        tensor.clone().requires_grad_(index != frozen)
        for index, tensor in enumerate((gradient, momentum, 1.0 + momentum.square()))
    ]
    assert torch.autograd.gradcheck(features_of, inputs)
    assert torch.autograd.gradgradcheck(features_of, inputs)


def probe(gs: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives of something smooth in all features over several steps."""
    moments, total = init_moments(gs[0]), gs.new_zeros(())
    for g in gs:
        momentum, gradient, moments = gradient_features(g, moments, BETAS, EPS)
        total = total + (momentum.sin() + gradient.square()).sum()
    (first,) = torch.autograd.grad(total, gs, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), gs)
    return first.detach(), second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_channel_has_finite_derivatives_and_leaves_its_neighbour_alone(dtype: torch.dtype) -> None:
    alive = torch.tensor([[0.3], [-0.2], [1.5]], dtype=dtype, requires_grad=True)
    beside_dead = torch.cat((torch.zeros_like(alive), alive), dim=1).detach().requires_grad_()
    for found, expected in zip(probe(beside_dead), probe(alive), strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[:, 1:], expected)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-23, 1e-20, 1e-10, 1e10, 1e18])
def test_tiny_and_huge_gradients_keep_values_and_derivatives_finite(size: float) -> None:
    g = torch.tensor([size, -size, 0.0], requires_grad=True)
    momentum, gradient, moments = gradient_features(g, init_moments(g.detach()), BETAS, EPS)
    momentum2, gradient2, _ = gradient_features(0.5 * g, moments, BETAS, EPS)
    slopes = torch.autograd.grad((momentum2 + gradient2 + momentum * gradient).sum(), g)[0]
    for tensor in (momentum, gradient, momentum2, gradient2, slopes):
        assert torch.isfinite(tensor).all(), tensor
