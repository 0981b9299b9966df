"""The unroll is what deployment does, and deployment does not mind where its stream is cut."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from metaopt import registry
from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import UnrollConfig
from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.online import OnlineAdapter
from metaopt.optimizers.mgg import VARIANTS, GeneratorConfig, GradientGenerator
from metaopt.optimizers.update import FuncApply
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.policy.state import state_to_dict
from metaopt.policy.step import adaptation_step
from metaopt.types import UpdateRule

from .cases import GRADIENTS, LR, MODELS, TeacherLoss, images, policy_for, start, task, tiny_resnet


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_unroll_is_deployment(model: str, variant: str) -> None:
    network: SourceModel = MODELS[model]()
    policy, batches = policy_for(network, variant), task(6)
    assert policy.rule is not None
    adapter = OnlineAdapter(MODELS[model](), policy)
    apply = FuncApply(policy.rule)
    parameters = {name: tensor.requires_grad_() for name, tensor in start(network).items()}
    state = policy.init(parameters)
    for batch in batches[:-1]:
        parameters, state, output = adaptation_step(policy, network, parameters, state, batch.images, apply)
        seen = adapter.step(batch.images)
        torch.testing.assert_close(seen.logits, output.logits, rtol=0.0, atol=1e-12)
        for name, tensor in parameters.items():
            torch.testing.assert_close(adapter.parameters[name].detach(), tensor.detach(), rtol=0.0, atol=1e-12)
    for gradient in GRADIENTS:
        taken = meta_gradient(
            policy, network, start(network), None, batches, TeacherLoss(), config=UnrollConfig(gradient)
        )
        plain = unrolled_loss(policy, network, start(network), batches, TeacherLoss())
        torch.testing.assert_close(torch.stack(taken.losses), torch.stack(plain), rtol=0.0, atol=1e-12)
        for name, tensor in taken.parameters.items():
            torch.testing.assert_close(tensor.detach(), adapter.parameters[name].detach(), rtol=0.0, atol=1e-12)


def test_the_unroll_draws_the_views_that_deployment_draws() -> None:
    network, batches = tiny_resnet(), task(4)
    policy = policy_for(network, terms={"filtered": 1.0, "entropy": 0.1, "consistency": 2.0})
    adapter = OnlineAdapter(tiny_resnet(), policy)
    for batch in batches[:-1]:
        adapter.step(batch.images)
    plain = unrolled_loss(policy, network, start(network), batches, TeacherLoss())
    for gradient in GRADIENTS:
        taken = meta_gradient(
            policy, network, start(network), None, batches, TeacherLoss(), config=UnrollConfig(gradient)
        )
        torch.testing.assert_close(torch.stack(taken.losses), torch.stack(plain), rtol=0.0, atol=1e-12)
        for name, tensor in taken.parameters.items():
            torch.testing.assert_close(tensor.detach(), adapter.parameters[name].detach(), rtol=0.0, atol=1e-12)


def generator_of(variant: str, lr: float) -> GradientGenerator:
    return GradientGenerator(GeneratorConfig(variant, lr=lr))


RULES: dict[str, Callable[..., UpdateRule]] = {
    **{name: registry.get("update rule", name) for name in registry.RULES},
    **{variant: partial(generator_of, variant) for variant in VARIANTS},
}


def with_rule(rule: UpdateRule) -> AdaptationPolicy:
    if isinstance(rule, torch.nn.Module):
        with torch.no_grad():
            for tensor in rule.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    objective = WeightedObjective({"slr": 1.0, "diversity": 1.0})
    return AdaptationPolicy("method", objective, rule, [BatchStatistics()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_a_stream_may_be_cut_anywhere(rule: str, dtype: torch.dtype, tmp_path: Any) -> None:
    torch.manual_seed(0)
    policy = with_rule(RULES[rule](lr=LR))
    stream = [images(seed, batch=6 if seed < 4 else 3).to(dtype) for seed in range(5)]
    straight = OnlineAdapter(tiny_resnet(dtype=dtype), policy)
    logits = [straight(batch) for batch in stream]
    for cut in (0, 1, 3):
        before = OnlineAdapter(tiny_resnet(dtype=dtype), policy)
        for batch in stream[:cut]:
            before(batch)
        before.save(tmp_path / "adapter.pt")
        after = OnlineAdapter(tiny_resnet(dtype=dtype), policy)
        after(stream[-1])  # what it has seen so far must not matter
        after.load(tmp_path / "adapter.pt")
        for batch, expected in zip(stream[cut:], logits[cut:], strict=True):
            assert torch.equal(after(batch), expected)
        assert after.steps == straight.steps
        for name, tensor in straight.parameters.items():
            assert torch.equal(after.parameters[name], tensor)
        found, kept = state_to_dict(after.state), state_to_dict(straight.state)
        assert list(found) == list(kept)
        for name, tensors in kept.items():
            assert all(torch.equal(one, other) for one, other in zip(found[name], tensors, strict=True))
