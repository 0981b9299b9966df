"""SAR: the step against its equations in float64, in place and differentiable, and with its knobs off."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from metaopt import MethodConfig, OnlineAdapter, SourceModel, build_method, load_method
from metaopt.errors import ConfigError
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import MetaBatch, UnrollConfig
from metaopt.optimizers.sam import SAM
from metaopt.optimizers.update import FuncApply, InPlaceApply
from metaopt.policy.parts.sample_filter import SampleFilterConfig
from metaopt.policy.step import StepContext

from ..tiny import CLASSES, assert_goes_on, batch_normalised, entropies, random_images, tiny_model, tiny_net

BATCHES = [random_images(12, seed, torch.float64) for seed in range(6)]
LR, RHO, MARGIN = 1e-2, 0.05, 0.95
PARTS = {"batch_statistics": {}, "sample_filter": {"margin": MARGIN, "similarity": None, "weighted": False}}


def adapter(config: MethodConfig, memory: str = "dense") -> OnlineAdapter:
    return OnlineAdapter(tiny_model(dtype=torch.float64), build_method(replace(config, lr=LR)), memory=memory)


def published_stream(batches: list[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Logits of each batch before its update, and the loss of each second look."""
    net, logits, losses = batch_normalised(), [], []
    adapted = [net.bn1.weight, net.bn1.bias, net.bn2.weight, net.bn2.bias]
    velocity, threshold = [torch.zeros_like(tensor) for tensor in adapted], MARGIN * math.log(CLASSES)
    for images in batches:
        first = net(images)
        logits.append(first.detach())
        reliable = entropies(first) < threshold
        gradients = torch.autograd.grad(entropies(first)[reliable].mean(), adapted)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        steps = [RHO * gradient / (norm + 1e-12) for gradient in gradients]
        with torch.no_grad():
            for tensor, step in zip(adapted, steps, strict=True):
                tensor += step
        second = entropies(net(images))
        loss = second[reliable & (second < threshold)].mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, adapted)
        with torch.no_grad():
            for tensor, step, speed, gradient in zip(adapted, steps, velocity, gradients, strict=True):
                speed.mul_(0.9).add_(gradient)
                tensor -= step + LR * speed
    return logits, losses


@pytest.mark.parametrize("memory", ["dense", "exact"])
def test_a_stream_is_the_papers_equations(memory: str) -> None:
    found = adapter(load_method("sar", parts={**PARTS, "recovery": {}}), memory=memory)
    logits, losses = published_stream(BATCHES)
    mean = losses[0]
    for loss in losses[1:]:
        mean = 0.9 * mean + 0.1 * loss
    for images, expected in zip(BATCHES, logits, strict=True):
        torch.testing.assert_close(found(images), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(float(found.state["recovery"]), mean, rtol=0, atol=1e-9)
    assert found.updates == len(BATCHES) and found.events["recovered"] == 0


def test_a_sample_has_to_be_reliable_at_both_looks() -> None:
    config = SampleFilterConfig(margin=0.5, similarity=None, weighted=False)
    found = adapter(load_method("sar", parts={"sample_filter": asdict(config)}))
    context = StepContext(found.policy, found.model, found.parameters, found.state, BATCHES[0][:4])
    part = found.policy.part("sample_filter")
    sure, unsure = 10 * torch.eye(CLASSES, dtype=torch.float64)[0], torch.zeros(CLASSES, dtype=torch.float64)
    first = part.weigh(context, torch.stack([sure, sure, unsure, unsure]))
    second = part.weigh(context, torch.stack([sure, unsure, sure, unsure]))
    assert first.tolist() == [2.0, 2.0, 0.0, 0.0] and second.tolist() == [4.0, 0.0, 0.0, 0.0]


def test_at_distance_0_and_without_filter_and_recovery_it_is_gradient_descent() -> None:
    first = adapter(load_method("sar", rule={"rho": 0.0}, parts={"batch_statistics": {}}))
    second = adapter(MethodConfig("sgd", update="sgd", objective={"entropy": 1.0}, parts={"batch_statistics": {}}))
    for images in BATCHES:
        torch.testing.assert_close(first(images), second(images), rtol=0, atol=1e-12)


def test_a_collapsed_model_starts_again() -> None:
    config = load_method("sar", parts={**PARTS, "recovery": {"threshold": 100.0}})
    found, fresh = adapter(config), adapter(config)
    for images in BATCHES[:3]:
        found(images)
    assert found.events["recovered"] == 3
    with found.frozen(), fresh.frozen():
        assert torch.equal(found(BATCHES[3]), fresh(BATCHES[3]))
    assert torch.equal(found.state["rule"].velocity, torch.zeros_like(found.state["rule"].velocity))


def test_the_two_passes_are_the_same_in_place_and_differentiable() -> None:
    rule = SAM(lr=LR, rho=RHO)
    start = {"a": torch.tensor([0.3, -1.2], dtype=torch.float64), "b": torch.tensor([2.0], dtype=torch.float64)}

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return (parameters["a"].sin().sum() * parameters["b"].exp()).sum()

    results = []
    for apply in (InPlaceApply(rule), FuncApply(rule)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        results.append(apply(loss_of, leaves, rule.init(leaves))[0])
    for name in start:
        torch.testing.assert_close(results[0][name].detach(), results[1][name].detach(), rtol=0, atol=1e-15)
        assert results[1][name].requires_grad


def test_a_rule_of_two_passes_is_unrolled_in_full_alone() -> None:
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    method = build_method(replace(load_method("sar", parts=PARTS), lr=LR))
    adapted = method.attach(model)
    parameters = {name: tensor.detach() for name, tensor in method.layout(adapted).take(adapted).items()}
    batches = [MetaBatch(images) for images in BATCHES[:3]]

    class Entropy:
        own_objective = False

        def __call__(self, output, batch):
            return entropies(output.logits).mean()

    result = meta_gradient(method, adapted, parameters, None, batches, Entropy(), config=UnrollConfig("full"))
    expected = [entropies(logits).mean() for logits in published_stream(BATCHES[:3])[0][1:]]
    torch.testing.assert_close(torch.stack(result.losses), torch.stack(expected), rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match="the rule takes two passes; allowed is full"):
        meta_gradient(method, adapted, parameters, None, batches, Entropy())


def test_a_saved_stream_goes_on_bit_for_bit(tmp_path) -> None:
    config = load_method("sar", parts={**PARTS, "recovery": {}})
    assert_goes_on(lambda: adapter(config), BATCHES, 3, tmp_path / "adaptation.pt")


def test_it_runs_on_the_source_model_alone() -> None:
    net = tiny_net()
    net.linear.weight.data *= 20
    found = OnlineAdapter(SourceModel(net), build_method(load_method("sar")))
    for images in BATCHES:
        found(images.float())
    assert found.updates == len(BATCHES)


@pytest.mark.parametrize("settings", [{"rule": {"rho": -0.1}}, {"parts": {"recovery": -1.0}}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="; allowed "):
        load_method("sar", **settings)
