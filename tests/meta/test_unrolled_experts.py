"""Learned gates and first values of experts: the unroll is deployment, and meta-gradients are as stated."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import UnrollConfig, learned_groups, learned_tensors
from metaopt.models import ModelSpec, SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.online import OnlineAdapter
from metaopt.optimizers.backends import BACKENDS, build_backend
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from metaopt.optimizers.update import FuncApply, gradients_of
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.adapts import layout_of
from metaopt.policy.part import Part
from metaopt.policy.parts.batch_statistics import BatchStatistics
from metaopt.policy.parts.experts import ExpertsPart, ExpertsPartConfig
from metaopt.policy.parts.teacher import Teacher, TeacherConfig
from metaopt.policy.step import adaptation_step
from metaopt.policy.without_step import evaluate_on
from metaopt.types import Parameters

from ..experts.families import stir
from .cases import ALL_TERMS, CLASSES, GRADIENTS, LOSSES, LR, TeacherLoss, assert_same, task, tiny_vit

EXPERTS = ExpertsPartConfig(experts=2, bottleneck=4, asg_range=0.3, dropout="straight_through")
TEACHER = TeacherConfig(momentum=0.8, restore=0.2, proximal=0.05, anchor="initial")


def network() -> SourceModel:
    return SourceModel(tiny_vit().module, spec=ModelSpec("custom:vit", CLASSES, (3, 8, 8))).requires_grad_(False)


def case(
    dropout: str = "straight_through",
    *,
    learned_objective: bool = True,
    teacher: TeacherConfig | None = TEACHER,
    **parts: str,
) -> tuple[AdaptationPolicy, SourceModel, Parameters]:
    """A policy none of whose tensors is at its start, the model with its experts, and what adapts."""
    torch.manual_seed(0)
    experts = ExpertsPart.build(replace(EXPERTS, dropout=dropout, **parts), network())
    stir(experts)
    model = experts.attach(network()).requires_grad_(False)
    layout = layout_of("experts_norm", model)
    found: list[Part] = [BatchStatistics(), experts, *([] if teacher is None else [Teacher(teacher)])]
    policy = AdaptationPolicy(
        "policy",
        WeightedObjective({"entropy": 0.7, "diversity": 1.3}, learned=learned_objective),
        GradientGenerator(GeneratorConfig(lr=LR, hidden=4), layout.names),
        found,
        adapts="experts_norm",
    ).double()
    stir(policy.rule, lambda tensor: 0.1)  # type: ignore[arg-type]
    return policy, model, {name: tensor.detach() for name, tensor in layout.take(model).items()}


def take(
    parts: tuple[AdaptationPolicy, SourceModel, Parameters], steps: int, loss: str = "teacher", **settings: object
):
    policy, model, start = parts
    backend = str(settings.pop("backend", "func"))
    assert policy.rule is not None
    config = UnrollConfig(**settings)  # type: ignore[arg-type]
    apply = build_backend(backend, policy.rule)
    generator = torch.Generator().manual_seed(0)
    return meta_gradient(
        policy, model, start, None, task(steps), LOSSES[loss](), apply=apply, config=config, generator=generator
    )


def test_the_unroll_is_deployment() -> None:
    policy, model, start = case()
    adapter = OnlineAdapter(network(), policy)
    assert policy.rule is not None
    parameters = policy.start(detached(start))
    state = policy.init(parameters)
    for position, batch in enumerate(task(5)[:-1]):
        apply = FuncApply(policy.rule)
        parameters, state, output = adaptation_step(policy, model, parameters, state, batch.images, apply, position)
        torch.testing.assert_close(adapter(batch.images), output.logits.detach(), rtol=0.0, atol=1e-12)
    for gradient in GRADIENTS:
        taken = take((policy, model, start), 5, gradient=gradient)
        plain = unrolled_loss(policy, model, start, task(5), TeacherLoss())
        torch.testing.assert_close(torch.stack(taken.losses), torch.stack(plain), rtol=0.0, atol=1e-12)
        for name, tensor in taken.parameters.items():
            torch.testing.assert_close(tensor.detach(), adapter.parameters[name].detach(), rtol=0.0, atol=1e-12)


def slopes_by_difference(parts: tuple[AdaptationPolicy, SourceModel, Parameters], tensor: Tensor, index: int) -> float:
    policy, model, start = parts
    flat, losses = tensor.data.view(-1), []
    value = float(flat[index])
    for sign in (1, -1):
        flat[index] = value + sign * 1e-6
        losses.append(float(torch.stack(unrolled_loss(policy, model, start, task(2), TeacherLoss())).mean()))
    flat[index] = value
    return (losses[0] - losses[1]) / 2e-6


@pytest.mark.parametrize("part", ["dag.router.weight", "asg.router.weight", "down_weight", "up_weight", "up_bias"])
def test_full_agrees_with_finite_differences(part: str) -> None:
    parts = case("soft")
    gradients = take(parts, 2, gradient="full").gradients
    name = f"parts.experts.mixtures.blocks/0/mlp.{part}"
    slopes = gradients[name].reshape(-1)
    for index in slopes.abs().topk(2).indices.tolist():
        numeric = slopes_by_difference(parts, learned_tensors(parts[0])[name], index)
        assert numeric == pytest.approx(float(slopes[index]), rel=1e-5, abs=1e-9)


def by_the_formula(parts: tuple[AdaptationPolicy, SourceModel, Parameters], steps: int) -> dict[str, Tensor]:
    """Σ_t ⟨∇L_t(θ_t), ∂θ_t/∂φ⟩ / K through one graph of the rule from the learned start, and Σ_t ∂L_t/∂gates / K."""
    policy, model, start = parts
    assert policy.rule is not None
    learned, batches = learned_tensors(policy), task(steps)
    gates = {name: t for name, t in learned.items() if ".router." in name}
    total = {name: torch.zeros_like(tensor) for name, tensor in learned.items()}
    theta = policy.start(start)
    state = policy.rule.init(theta)
    for t in range(1, steps + 1):
        here = detached(theta)
        loss = evaluate_on(policy, model, here, batches[t - 1].images).loss
        assert loss is not None
        updates, state = policy.rule.update(gradients_of(loss, here), state)
        theta = {name: tensor - updates[name] for name, tensor in theta.items()}
        there = detached(theta)
        score = TeacherLoss()(evaluate_on(policy, model, there, batches[t].images), batches[t])
        for name, slope in gradients_of(score, gates, retain_graph=True).items():
            total[name] += slope / steps
        slopes = gradients_of(score, there)
        product = torch.stack([(slopes[name] * tensor).sum() for name, tensor in theta.items()]).sum()
        for name, slope in gradients_of(product, learned, retain_graph=True).items():
            total[name] += slope / steps
    return total


def test_first_order_is_the_stated_formula() -> None:
    parts = case(learned_objective=False, teacher=None)
    assert_same(take(parts, 3).gradients, by_the_formula(parts, 3), 1e-9)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_backends_agree(gradient: str) -> None:
    found = {name: take(case(), 3, backend=name, gradient=gradient, **ALL_TERMS).gradients for name in BACKENDS}
    for other in found.values():
        assert_same(other, found["func"], 1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_learned_tensor_has_a_gradient_and_the_network_none(gradient: str, loss: str) -> None:
    parts = case()
    found = take(parts, 3, loss, gradient=gradient, **ALL_TERMS).gradients
    assert all(float(tensor.norm()) > 0 for tensor in found.values())
    assert any("dag" in name for name in found) and any("asg" in name for name in found)
    groups = learned_groups(parts[0])
    assert set(groups) == {"generator", "objective", "gates", "experts"}
    assert sorted(name for names in groups.values() for name in names) == sorted(found)
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in parts[1].parameters())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("part", "left"), [("gates", "experts"), ("initial", "gates")])
def test_a_frozen_part_is_not_learned_and_the_rest_learns_as_before(part: str, left: str, gradient: str) -> None:
    whole = take(case(), 2, gradient=gradient, **ALL_TERMS).gradients
    parts = case(gates="frozen") if part == "gates" else case(initial="frozen")
    found = take(parts, 2, gradient=gradient, **ALL_TERMS).gradients
    groups = learned_groups(parts[0])
    assert set(groups) == {"generator", "objective", left}
    assert sorted(name for names in groups.values() for name in names) == sorted(found)
    assert_same(found, {name: whole[name] for name in found}, 1e-9)


def test_the_proximal_loss_holds_the_experts_at_their_start() -> None:
    def distance(proximal: float) -> float:
        policy, model, start = case(teacher=replace(TEACHER, restore=0.0, proximal=proximal, squared=True))
        after = take((policy, model, start), 4).parameters
        return sum(float((after[n].detach() - t).square().sum()) for n, t in start.items() if n.startswith("experts."))

    assert distance(100.0) < 0.8 * distance(0.0)
