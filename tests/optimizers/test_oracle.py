"""The oracle itself, where its values are known by hand or by finite differences."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .oracle import NORM_EPS, OracleMGG, random_weights

GRADIENTS = [0.3, -1.2, 0.0, 5e-4, 2.0]


def normed(u: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return layer_norm(u, u.shape, weights[f"{name}_weight"], weights[f"{name}_bias"], NORM_EPS)


def test_first_features_are_the_sign_of_the_gradient() -> None:
    for g in (0.3, -2.0):
        x = OracleMGG(random_weights()).features(torch.tensor(g, dtype=torch.float64))
        assert [float(entry) for entry in x] == pytest.approx([math.copysign(1.0, g)] * 2, abs=1e-7)


def test_features_are_adams() -> None:
    oracle = OracleMGG(random_weights())
    parameter = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    for g in GRADIENTS:
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(g, dtype=torch.float64)
        adam.step()
        x = oracle.features(torch.tensor(g, dtype=torch.float64))
        assert x[0].item() == pytest.approx((before - parameter.detach()).item(), rel=1e-12)


def test_a_zero_gradient_reads_the_untouched_directions() -> None:
    # x = 0 makes q = k = v = 0: W keeps its value, only b moves.
    weights = random_weights()
    oracle = OracleMGG(weights)
    y = oracle.step([0.0])
    b = weights["b0"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * normed(b, weights, "ln").square().sum(), b)
    b = weights["b0"] - torch.sigmoid(weights["c_eta"]) / 8 * slope
    expected = torch.tanh(weights["Wo"] @ normed(normed(b, weights, "ln"), weights, "ln2") + weights["bo"])
    assert torch.equal(oracle.W, weights["W0"])
    torch.testing.assert_close(oracle.b, b, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0.0)


def test_a_memory_of_width_one_is_constant() -> None:
    # A layer norm over one entry is its bias, so the memory learns nothing and the output is known.
    weights = random_weights(h=1)
    oracle = OracleMGG(weights)
    y = oracle.step(GRADIENTS)
    assert torch.equal(oracle.W, weights["W0"])
    assert torch.equal(oracle.b, weights["b0"])
    torch.testing.assert_close(y, torch.tanh(weights["Wo"][0] * weights["ln2_bias"][0] + weights["bo"]))


def test_the_memory_step_is_the_slope_of_the_reconstruction_loss() -> None:
    weights = random_weights()
    oracle = OracleMGG(weights)
    g = torch.tensor(0.7, dtype=torch.float64)
    oracle.step([g])
    x = torch.stack(OracleMGG(weights).features(g))
    k, v = weights["Wk"] @ x, weights["Wv"] @ x
    eta = torch.sigmoid(weights["w_eta"] @ x + weights["c_eta"]) / 8

    def loss(W: Tensor, b: Tensor) -> float:
        return 0.5 * (normed(k @ W + b, weights, "ln") - (v - k)).square().sum().item()

    step = 1e-6
    slope_W, slope_b = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for entry, slope in [*((i, slope_W) for i in range(64)), *((i, slope_b) for i in range(8))]:
        values = []
        for sign in (1, -1):
            W, b = weights["W0"].clone(), weights["b0"].clone()
            (W if slope is slope_W else b).view(-1)[entry] += sign * step
            values.append(loss(W, b))
        slope.view(-1)[entry] = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(weights["W0"] - oracle.W, eta * slope_W, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights["b0"] - oracle.b, eta * slope_b, rtol=1e-6, atol=1e-9)
    assert loss(oracle.W, oracle.b) < loss(weights["W0"], weights["b0"])


def test_the_output_is_read_with_the_updated_memory() -> None:
    weights = random_weights()
    oracle = OracleMGG(weights)
    y = oracle.step([0.7])
    x = torch.stack(OracleMGG(weights).features(torch.tensor(0.7, dtype=torch.float64)))
    q = weights["Wq"] @ x
    z = q + normed(q @ oracle.W + oracle.b, weights, "ln")
    expected = torch.tanh(weights["Wo"] @ normed(z, weights, "ln2") + weights["bo"])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0.0)


def test_steps_taken_together_or_apart_are_the_same() -> None:
    together, apart = OracleMGG(random_weights()), OracleMGG(random_weights())
    outputs = [apart.step([g]) for g in GRADIENTS]
    assert torch.equal(together.step(GRADIENTS), outputs[-1])
    assert len({output.item() for output in outputs}) == len(GRADIENTS)


def test_the_differentiable_oracle_agrees_with_finite_differences() -> None:
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(h=3).items()}
    gradient_inputs = torch.tensor(GRADIENTS, dtype=torch.float64, requires_grad=True)
    names = list(weights)

    def output(gradients: Tensor, *tensors: Tensor) -> Tensor:
        return OracleMGG(dict(zip(names, tensors, strict=True)), differentiable=True).step(list(gradients))

    inputs = (gradient_inputs, *weights.values())
    assert torch.autograd.gradcheck(output, inputs, eps=1e-7, atol=1e-6)
    detached = OracleMGG(weights).step(GRADIENTS)
    assert not detached.requires_grad
    torch.testing.assert_close(output(*inputs).detach(), detached, rtol=1e-13, atol=0.0)
