"""The learned prior: where it comes from, what it learns, its file, its way to another model."""

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.inner_loop import UnrollConfig, gradients_of, learned_tensors, meta_gradient, unrolled_loss
from metaopt.meta import MetaTrainer
from metaopt.models import prior_layers
from metaopt.online import OnlineAdapter
from metaopt.parameters import detached
from metaopt.policy import (
    AdaptationPolicy,
    FixedPrior,
    LearnedPrior,
    MethodConfig,
    build_method,
    learned_prior,
    policy_from_dict,
    policy_to_dict,
    transferred,
)
from metaopt.types import Parameters

from ..inner_loop.cases import GRADIENTS, TeacherLoss, policy_for, start, task, tiny_resnet, tiny_vit
from ..tiny import random_images, tiny_config, tiny_model, tiny_policy


def case() -> tuple[AdaptationPolicy, Parameters]:
    """A policy on the small ResNet with a prior of its own in each layer."""
    network = tiny_resnet()
    policy = policy_for(network, "residual")
    prior = learned_prior(network, 4.0)
    assert prior is not None
    prior.log_counts.data = torch.linspace(0.5, 3.0, len(prior.layers))
    policy.prior = prior.double()
    return policy, start(network)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_unroll_is_deployment(gradient: str) -> None:
    policy, parameters = case()
    taken = meta_gradient(
        policy, tiny_resnet(), parameters, None, task(4), TeacherLoss(), config=UnrollConfig(gradient)
    )
    plain = unrolled_loss(policy, tiny_resnet(), parameters, task(4), TeacherLoss())
    torch.testing.assert_close(torch.stack(taken.losses), torch.stack(plain), rtol=0.0, atol=1e-12)
    policy.prior = None
    without = unrolled_loss(policy, tiny_resnet(), parameters, task(4), TeacherLoss())
    assert not torch.allclose(torch.stack(without), torch.stack(plain), rtol=1e-3)


def test_first_order_is_the_direct_derivative_of_each_position() -> None:
    policy, parameters = case()
    steps, batches, network = 3, task(3), tiny_resnet()
    found = meta_gradient(policy, network, parameters, None, batches, TeacherLoss()).gradients["prior.log_counts"]
    assert isinstance(policy.prior, LearnedPrior) and policy.rule is not None
    expected = torch.zeros_like(policy.prior.log_counts)
    theta, state = parameters, policy.rule.init(parameters)
    for position in range(steps + 1):
        here = detached(theta)
        output = policy.evaluate(network, here, batches[position].images)
        if position > 0:
            score = TeacherLoss()(output, batches[position])
            own: dict[str, Tensor] = {"log_counts": policy.prior.log_counts}
            expected += gradients_of(score, own, retain_graph=True)["log_counts"] / steps
        assert output.loss is not None
        updates, state = policy.rule.update(gradients_of(output.loss, here), state)
        theta = {name: tensor.detach() - updates[name].detach() for name, tensor in here.items()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().min() > 0


def test_meta_training_learns_it_from_the_teacher_and_not_from_its_own_objective() -> None:
    for loss, learns in (("clean_teacher", True), ("unsupervised", False)):
        trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config(loss=loss, epochs=1, prior=8.0))
        before = trainer.policy.prior
        assert isinstance(before, LearnedPrior) and torch.allclose(before(), torch.tensor(8.0))
        assert ("prior.log_counts" in learned_tensors(trainer.policy)) == learns
        trainer.run()
        assert torch.allclose(before(), torch.tensor(8.0)) != learns
    assert MetaTrainer(tiny_model(), random_images(32), None, tiny_config(prior=None)).policy.prior is None


def test_the_file_brings_it_back_and_models_without_such_layers_have_none() -> None:
    policy = tiny_policy(tiny_model())
    assert policy_from_dict(policy_to_dict(policy)).prior is None
    policy.prior = learned_prior(tiny_model(), 5.0)
    loaded = policy_from_dict(policy_to_dict(policy))
    assert isinstance(loaded.prior, LearnedPrior) and loaded.prior.layers == tuple(prior_layers(tiny_model().module))
    batch = random_images(8)
    assert torch.equal(OnlineAdapter(tiny_model(), loaded)(batch), OnlineAdapter(tiny_model(), policy)(batch))
    assert learned_prior(tiny_vit(), 5.0) is None
    assert learned_prior(tiny_model(), None) is None


def test_another_model_takes_it_by_depth() -> None:
    prior = LearnedPrior(["a", "b", "c"])
    prior.log_counts.data = torch.tensor([0.0, 1.0, 4.0])
    assert torch.allclose(prior.on(["1", "2", "3", "4", "5"]).log_counts, torch.tensor([0.0, 0.5, 1.0, 2.5, 4.0]))
    assert torch.allclose(prior.on(["1"]).log_counts, torch.tensor([0.0]))
    assert torch.allclose(LearnedPrior(["a"], 3.0).on(["1", "2"])(), torch.tensor(3.0))
    policy, _ = case()
    policy.source = tiny_policy(tiny_model()).source
    found, notes = transferred(policy, tiny_model(), lambda: pytest.fail("not needed"))
    layers = prior_layers(tiny_model().module)
    assert isinstance(found.prior, LearnedPrior) and found.prior.layers == tuple(layers)
    assert f"source prior: {len(layers)} BatchNorm layers by depth" in notes


def test_methods_take_a_number_or_the_policys_own() -> None:
    policy = tiny_policy(tiny_model())
    policy.prior = learned_prior(tiny_model(), 5.0)
    learned = MethodConfig("policy", update="generator", objective_from_policy=True)
    assert build_method(learned, policy=policy).prior is policy.prior
    assert build_method(MethodConfig("mgtta", update="generator", prior=0.0), policy=policy).prior is None
    assert build_method(MethodConfig("tent", update="adam", objective={"entropy": 1.0}), policy=policy).prior is None
    fixed = build_method(MethodConfig("bn", prior=16.0)).prior
    assert isinstance(fixed, FixedPrior) and float(fixed()) == 16.0
    batch = random_images(8)
    found = OnlineAdapter(tiny_model(), build_method(MethodConfig("bn", prior=16.0)))(batch)
    with torch.no_grad():
        assert torch.equal(found, tiny_model()(batch, batch_statistics=True, prior=torch.tensor(16.0)).logits)


def test_bad_numbers_are_refused() -> None:
    for count in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"method.prior is"):
            MethodConfig("bn", prior=count)
    for count in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"meta.prior is"):
            tiny_config(prior=count)
    with pytest.raises(ConfigError, match=r"method.prior is 16 and batch_statistics is false"):
        MethodConfig("source", batch_statistics=False, prior=16.0)
