"""The learned prior: where it comes from, what it learns, its file, its way to another model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainer
from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import UnrollConfig, learned_tensors
from metaopt.models import SourceModel, prior_layers
from metaopt.online import OnlineAdapter
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method, transferred
from metaopt.policy.parts.batch_statistics import BatchStatistics, BatchStatisticsConfig
from metaopt.policy.untrained import DEFAULT_PARTS
from metaopt.policy.without_step import evaluate_on
from metaopt.types import Parameters

from ..meta.cases import GRADIENTS, TeacherLoss, policy_for, start, task, tiny_resnet, tiny_vit
from ..tiny import random_images, tiny_config, tiny_model, tiny_policy, with_parts

COUNTS = "parts.batch_statistics.log_counts"


def learned_prior(model: SourceModel, count: float | None) -> BatchStatistics:
    return BatchStatistics.build(BatchStatisticsConfig(count), model)


def prior_of(policy: AdaptationPolicy) -> BatchStatistics:
    found = policy.part("batch_statistics")
    assert isinstance(found, BatchStatistics)
    return found


def case() -> tuple[AdaptationPolicy, Parameters]:
    """A policy on the small ResNet with a prior of its own in each layer."""
    network = tiny_resnet()
    prior = learned_prior(network, 4.0)
    assert prior.log_counts is not None
    prior.log_counts.data = torch.linspace(0.5, 3.0, len(prior.layers))
    return policy_for(network, "residual", parts=[prior]), start(network)


def of_depth(layers: int) -> SourceModel:
    """A model with so many BatchNorm layers."""
    return SourceModel(nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(layers)), nn.Flatten(), nn.Linear(12, 2)))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_unroll_is_deployment(gradient: str) -> None:
    policy, parameters = case()
    taken = meta_gradient(
        policy, tiny_resnet(), parameters, None, task(4), TeacherLoss(), config=UnrollConfig(gradient)
    )
    plain = unrolled_loss(policy, tiny_resnet(), parameters, task(4), TeacherLoss())
    torch.testing.assert_close(torch.stack(taken.losses), torch.stack(plain), rtol=0.0, atol=1e-12)
    policy.parts["batch_statistics"] = BatchStatistics()
    without = unrolled_loss(policy, tiny_resnet(), parameters, task(4), TeacherLoss())
    assert not torch.allclose(torch.stack(without), torch.stack(plain), rtol=1e-3)


def test_first_order_is_the_direct_derivative_of_each_position() -> None:
    policy, parameters = case()
    steps, batches, network = 3, task(3), tiny_resnet()
    found = meta_gradient(policy, network, parameters, None, batches, TeacherLoss()).gradients[COUNTS]
    learned = prior_of(policy).log_counts
    assert learned is not None and policy.rule is not None
    expected = torch.zeros_like(learned)
    theta, state = parameters, policy.rule.init(parameters)
    for position in range(steps + 1):
        here = detached(theta)
        output = evaluate_on(policy, network, here, batches[position].images)
        if position > 0:
            score = TeacherLoss()(output, batches[position])
            own: dict[str, Tensor] = {"log_counts": learned}
            expected += gradients_of(score, own, retain_graph=True)["log_counts"] / steps
        assert output.loss is not None
        updates, state = policy.rule.update(gradients_of(output.loss, here), state)
        theta = {name: tensor.detach() - updates[name].detach() for name, tensor in here.items()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().min() > 0


def test_meta_training_learns_it_from_the_teacher_and_not_from_its_own_objective() -> None:
    for loss, learns in (("clean_teacher", True), ("unsupervised", False)):
        config = tiny_config(loss=loss, epochs=1, parts={**DEFAULT_PARTS, "batch_statistics": 8.0})
        trainer = MetaTrainer(tiny_model(), random_images(32), None, config)
        prior = prior_of(trainer.policy)
        before = prior.counts()
        assert before is not None and before.shape == (2,) and torch.allclose(before, torch.tensor(8.0))
        assert (COUNTS in learned_tensors(trainer.policy)) == learns
        trainer.run()
        after = prior.counts()
        assert after is not None and torch.allclose(after, torch.tensor(8.0)) != learns
    config = tiny_config(parts={**DEFAULT_PARTS, "batch_statistics": True})
    assert prior_of(MetaTrainer(tiny_model(), random_images(32), None, config).policy).counts() is None


def test_the_file_brings_it_back_and_models_without_such_layers_have_none() -> None:
    policy = tiny_policy(tiny_model())
    assert prior_of(AdaptationPolicy.from_dict(policy.to_dict())).counts() is None
    policy = with_parts(policy, learned_prior(tiny_model(), 5.0))
    loaded = AdaptationPolicy.from_dict(policy.to_dict())
    assert prior_of(loaded).layers == tuple(prior_layers(tiny_model().module))
    assert prior_of(loaded).log_counts is not None
    batch = random_images(8)
    assert torch.equal(OnlineAdapter(tiny_model(), loaded)(batch), OnlineAdapter(tiny_model(), policy)(batch))
    assert not list(learned_prior(tiny_vit(), 5.0).parameters())
    assert learned_prior(tiny_model(), None).counts() is None


def test_another_model_takes_it_by_depth() -> None:
    prior = learned_prior(of_depth(3), 16.0)
    assert prior.log_counts is not None
    prior.log_counts.data = torch.tensor([0.0, 1.0, 4.0])
    for depth, expected in ((5, [0.0, 0.5, 1.0, 2.5, 4.0]), (1, [0.0])):
        moved = prior.transferred(of_depth(depth))[0].log_counts
        assert moved is not None and torch.allclose(moved, torch.tensor(expected))
    counts = learned_prior(of_depth(1), 3.0).transferred(of_depth(2))[0].counts()
    assert counts is not None and counts.shape == (2,) and torch.allclose(counts, torch.tensor(3.0))
    policy, _ = case()
    policy.source = tiny_policy(tiny_model()).source
    found, notes = transferred(policy, tiny_model())
    found.prepare(tiny_model(), lambda: pytest.fail("not needed"))
    layers = prior_layers(tiny_model().module)
    assert prior_of(found).layers == tuple(layers) and prior_of(found).log_counts is not None
    assert f"batch_statistics: source prior of {len(layers)} BatchNorm layers by depth" in notes


def test_methods_take_a_number_or_the_policys_own() -> None:
    policy = with_parts(tiny_policy(tiny_model()), learned_prior(tiny_model(), 5.0))
    learned = MethodConfig("policy", update="generator", objective_from_policy=True, inherit=True)
    assert prior_of(build_method(learned, policy=policy)) is prior_of(policy)
    none = {"batch_statistics": {"prior": 0.0}}
    assert prior_of(build_method(replace(learned, parts=none), policy=policy)).counts() is None
    assert prior_of(build_method(MethodConfig("mgtta", update="generator", parts=none), policy=policy)).counts() is None
    tent = MethodConfig("tent", update="adam", objective={"entropy": 1.0}, parts=none)
    assert prior_of(build_method(tent, policy=policy)).counts() is None
    bn = build_method(MethodConfig("bn", parts={"batch_statistics": 16.0}))
    fixed = prior_of(bn).counts()
    assert fixed is not None and float(fixed) == 16.0 and not list(bn.parameters())
    batch = random_images(8)
    found = OnlineAdapter(tiny_model(), bn)(batch)
    with torch.no_grad():
        assert torch.equal(found, tiny_model()(batch, batch_statistics=True, prior=torch.tensor(16.0)).logits)


def test_bad_numbers_are_refused() -> None:
    for count in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"batch_statistics.prior is"):
            MethodConfig("bn", parts={"batch_statistics": count})
        with pytest.raises(ConfigError, match=r"batch_statistics.prior is"):
            tiny_config(parts={**DEFAULT_PARTS, "batch_statistics": count})
