"""Meta-gradients against finite differences, brute force and each other."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from metaopt.meta.unroll import MetaBatch, learned_tensors
from metaopt.models import SourceModel
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.backends import BACKENDS
from metaopt.optimizers.mgg import VARIANTS
from metaopt.optimizers.update import gradients_of
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.policy.state import detached_state
from metaopt.policy.without_step import evaluate_on

from .cases import (
    ALL_TERMS,
    GRADIENTS,
    MODELS,
    assert_same,
    mean_loss,
    policy_for,
    relative_difference,
    start,
    take,
    task,
    tiny_resnet,
)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_backends_give_the_same_meta_gradient(model: str, gradient: str) -> None:
    network = MODELS[model]()
    policy, batches = policy_for(network), task(4)
    results = {name: take(policy, network, batches, backend=name, gradient=gradient, **ALL_TERMS) for name in BACKENDS}
    expected = results["func"]
    assert all(float(tensor.norm()) > 0 for tensor in expected.gradients.values())
    for found in results.values():
        assert_same(found.gradients, expected.gradients, 1e-9)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0.0)
        for name, tensor in expected.parameters.items():
            torch.testing.assert_close(found.parameters[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "variant"), [*(("resnet", variant) for variant in VARIANTS), ("vit", "residual"), ("vit", "step_sizes")]
)
def test_full_agrees_with_finite_differences_and_not_with_first_order(model: str, variant: str) -> None:
    network = MODELS[model]()
    check_against_differences(policy_for(network, variant), network, task(2))


def check_against_differences(policy: AdaptationPolicy, network: SourceModel, batches: list[MetaBatch]) -> None:
    full = take(policy, network, batches, gradient="full").gradients
    first_order = take(policy, network, batches, **ALL_TERMS).gradients
    step = 1e-6
    for name, tensor in learned_tensors(policy).items():
        flat, slopes = tensor.data.view(-1), full[name].reshape(-1)
        # The largest entries: those far below them are lost in the rounding of the loss.
        for index in slopes.abs().topk(min(2, len(slopes))).indices.tolist():
            value, losses = float(flat[index]), []
            for sign in (1, -1):
                flat[index] = value + sign * step
                losses.append(mean_loss(policy, network, batches))
            flat[index] = value
            numeric = (losses[0] - losses[1]) / (2 * step)
            # The absolute part is the rounding of the two losses over the step.
            assert numeric == pytest.approx(float(slopes[index]), rel=1e-6, abs=5e-10), (name, index)
    whole = [torch.cat([each[name].reshape(-1) for name in full]) for each in (first_order, full)]
    assert relative_difference(*whole) > 0.01


def brute_force(
    policy: AdaptationPolicy, network: SourceModel, batches: list[MetaBatch], truncation: int | None
) -> dict[str, Tensor]:
    """Sum of ⟨∇L_t(θ_t), ∂θ_t/∂φ⟩ with one Jacobian product per position and one graph of the rule per stretch."""
    assert policy.objective is not None and policy.rule is not None
    learned = learned_tensors(policy)
    total = {name: torch.zeros_like(tensor) for name, tensor in learned.items()}
    theta = start(network)
    state = policy.rule.init(theta)
    steps = len(batches) - 1
    for t in range(1, steps + 1):
        if truncation and (t - 1) % truncation == 0 and t > 1:
            theta = {name: tensor.detach() for name, tensor in theta.items()}
            state = detached_state({"rule": state})["rule"]
        here = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        asked = {"batch_statistics": True, "features": "features" in policy.objective.needs}
        output = functional_call(network, here, (batches[t - 1].images,), asked)
        gradient = {name: torch.zeros_like(tensor) for name, tensor in here.items()}
        for name, value in policy.objective.values(output).items():
            slopes = gradients_of(value, here, retain_graph=True)
            weight = policy.objective.weights()[name]
            gradient = {key: gradient[key] + weight * slope for key, slope in slopes.items()}
        updates, state = policy.rule.update(gradient, state)
        theta = {name: tensor - updates[name] for name, tensor in theta.items()}
        there = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        scored = functional_call(network, there, (batches[t].images,), asked)
        loss = torch.nn.functional.cross_entropy(scored.logits, batches[t].targets)  # type: ignore[arg-type]
        slopes = gradients_of(loss, there)
        product = torch.stack([(slopes[name] * tensor).sum() for name, tensor in theta.items()]).sum()
        for name, part in gradients_of(product, learned, retain_graph=True).items():
            total[name] += part / steps
    return total


@pytest.mark.parametrize("truncation", [None, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_first_order_agrees_with_brute_force(model: str, variant: str, truncation: int | None) -> None:
    network = MODELS[model]()
    policy, batches = policy_for(network, variant), task(4)
    found = take(policy, network, batches, truncation=truncation, **ALL_TERMS)
    assert_same(found.gradients, brute_force(policy, network, batches, truncation), 1e-9)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dead_channel_leaves_the_meta_gradient_finite(variant: str, gradient: str) -> None:
    network = tiny_resnet(dead_channel=True)
    policy, batches = policy_for(network, variant), task(3)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start(network).items()}
    loss = evaluate_on(policy, network, leaves, batches[0].images).loss
    assert loss is not None
    dead, _ = torch.autograd.grad(loss, [leaves["module.blocks.0.bn1.weight"], leaves["module.blocks.0.bn1.bias"]])
    assert dead[0] == 0.0 and dead[1:].all()
    found = take(policy, network, batches, gradient=gradient, **ALL_TERMS)
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in found.gradients.values())


@pytest.mark.parametrize("model", MODELS)
def test_objectives_that_read_features_work_in_full(model: str) -> None:
    network = MODELS[model]()
    policy = policy_for(network, terms={"entropy": 1.0, "discrepancy": 0.1, "slr": 0.5})
    batches = task(2)
    full = take(policy, network, batches, gradient="full").gradients
    assert full["objective.log_weights"].all()
    tensor = policy.objective.log_weights.data  # type: ignore[union-attr]
    for index in range(3):
        value, losses = float(tensor[index]), []
        for sign in (1, -1):
            tensor[index] = value + sign * 1e-6
            losses.append(mean_loss(policy, network, batches))
        tensor[index] = value
        numeric = (losses[0] - losses[1]) / 2e-6
        assert numeric == pytest.approx(float(full["objective.log_weights"][index]), rel=1e-5, abs=2e-9)


def test_hand_made_rules_unroll_too() -> None:
    network = tiny_resnet()
    learned = policy_for(network)
    policy = AdaptationPolicy("adam", learned.objective, Adam(lr=0.05), [BatchStatistics()])
    found = {
        (backend, gradient): take(policy, network, task(3), backend=backend, gradient=gradient, **ALL_TERMS).gradients
        for backend in ("func", "torchopt")
        for gradient in GRADIENTS
    }
    for gradient in GRADIENTS:
        assert set(found["func", gradient]) == {"objective.log_weights"}
        assert found["func", gradient]["objective.log_weights"].all()
        assert_same(found["torchopt", gradient], found["func", gradient], 1e-9)
