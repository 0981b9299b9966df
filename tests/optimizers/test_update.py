"""A rule of two passes, as in every way of applying an update and in a whole step of adaptation."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from metaopt.objectives import WeightedObjective
from metaopt.objectives.entropy import softmax_entropy
from metaopt.optimizers.backends import build_backend
from metaopt.optimizers.sgd import SGD, SGDState
from metaopt.optimizers.update import InPlaceApply, is_finite
from metaopt.policy import AdaptationPolicy
from metaopt.policy.step import adaptation_step
from metaopt.types import ApplyUpdate, Parameters
from tests.tiny import random_images, tiny_model

LR, RHO = 0.1, 0.5


@dataclass(frozen=True)
class Sharpness(SGD):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021): the gradient where the first one leads uphill."""

    def ascend(self, gradients: Parameters) -> Parameters:
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        return {name: RHO * gradient / norm for name, gradient in gradients.items()}


RULE = Sharpness(lr=LR, momentum=0.0)


def start() -> Parameters:
    return {
        "a": torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True),
    }


def loss_at(parameters: Parameters) -> Tensor:
    return parameters["a"].pow(4).sum() + (parameters["a"].sum() * parameters["b"]).square().sum()


def by_hand(parameters: Parameters) -> Parameters:
    names, tensors = [*parameters], [*parameters.values()]
    first = torch.autograd.grad(loss_at(parameters), tensors, create_graph=True)
    norm = torch.cat([gradient.flatten() for gradient in first]).norm()
    there = [tensor + RHO * gradient / norm for tensor, gradient in zip(tensors, first, strict=True)]
    second = torch.autograd.grad(loss_at(dict(zip(names, there, strict=True))), there, create_graph=True)
    return {name: tensor - LR * gradient for name, tensor, gradient in zip(names, tensors, second, strict=True)}


def backends() -> list[ApplyUpdate]:
    return [build_backend("func", RULE), build_backend("torchopt", RULE)]


def test_every_way_takes_the_gradient_where_the_ascent_leads() -> None:
    expected = by_hand(start())
    for apply in (*backends(), InPlaceApply(RULE)):
        found, _ = apply(loss_at, start(), RULE.init(start()))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].detach(), tensor.detach(), rtol=1e-12, atol=0.0)


def test_an_unroll_differentiates_through_both_passes() -> None:
    before = start()
    expected = torch.autograd.grad(loss_at(by_hand(before)), [*before.values()])
    for apply in backends():
        leaves = start()
        found, _ = apply(loss_at, leaves, RULE.init(leaves))
        for one, other in zip(torch.autograd.grad(loss_at(found), [*leaves.values()]), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_in_place_the_parameters_own_storage_changes_and_nothing_is_kept() -> None:
    parameters = start()
    storages = [tensor.data_ptr() for tensor in parameters.values()]
    found, _ = InPlaceApply(RULE)(loss_at, parameters, RULE.init(parameters))
    assert [tensor.data_ptr() for tensor in found.values()] == storages
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in found.values())


def test_the_guard_sees_the_second_pass() -> None:
    def cliff(parameters: Parameters) -> Tensor:  # fine at the start, not finite uphill of it
        return torch.where(parameters["a"][0] > 1.0, torch.inf, 1.0) * parameters["a"].square().sum()

    parameters = start()
    state = RULE.init(parameters)
    found, after = InPlaceApply(RULE, is_finite)(cliff, parameters, state)
    assert after is state
    assert all(torch.equal(found[name], tensor) for name, tensor in start().items())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_of_adaptation_looks_at_its_batch_again(in_place: bool) -> None:
    model, images = tiny_model(dtype=torch.float64), random_images(8, dtype=torch.float64)
    policy = AdaptationPolicy("sharpness", WeightedObjective({"entropy": 1.0}), RULE)
    model = policy.attach(model)
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in policy.layout(model).take(model).items()}

    def entropy(at: Parameters) -> Tensor:
        return softmax_entropy(functional_call(model, at, (images,)).logits).mean()

    tensors = [*parameters.values()]
    first = torch.autograd.grad(entropy(parameters), tensors)
    norm = torch.cat([gradient.flatten() for gradient in first]).norm()
    there = {
        name: (tensor.detach() + RHO * gradient / norm).requires_grad_()
        for (name, tensor), gradient in zip(parameters.items(), first, strict=True)
    }
    second = torch.autograd.grad(entropy(there), [*there.values()])
    expected = [tensor.detach() - LR * gradient for tensor, gradient in zip(tensors, second, strict=True)]
    predicted = model(images).logits

    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    apply = InPlaceApply(RULE) if in_place else build_backend("func", RULE)
    found, state, output = adaptation_step(policy, model, own, policy.init(own), images, apply)
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(output.logits, predicted)  # before the update, and where the batch was met
    assert output.loss is not None and output.loss.item() == pytest.approx(entropy(parameters).item(), rel=1e-12)
    assert isinstance(state["rule"], SGDState)
