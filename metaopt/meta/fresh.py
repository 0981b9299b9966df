"""The policy before meta-training: the parts that the settings ask for, on one model."""

from typing import NamedTuple

from torch import Tensor

from metaopt.activation_memory import LearnedPrecisionConfig
from metaopt.experts import LearnedExperts, with_experts
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.loss import build_meta_loss
from metaopt.models import SourceModel
from metaopt.objectives import source_statistics
from metaopt.policy import (
    AdaptationPolicy,
    ClassBalance,
    LearnedInitialization,
    SourceRecord,
    layout_of,
    learned_prior,
    new_policy,
)
from metaopt.types import Parameters


class Fresh(NamedTuple):
    """A policy and what it adapts."""

    policy: AdaptationPolicy
    model: SourceModel  # with the policy's experts, where it has some
    parameters: Parameters  # the model's own values of the adapted tensors


def fresh_policy(model: SourceModel, images: Tensor, config: MetaTrainConfig) -> Fresh:
    """A policy that has learned nothing yet.

    Args:
        model: source model; its tensors are frozen.
        images: clean unlabeled images, (n, 3, H, W) in [0, 1], for source statistics where the objective needs them.
        config: which parts it has.

    Raises:
        ModelError: the model has nothing to adapt.
    """
    learned = not build_meta_loss(config.loss).own_objective  # else its weights stay: it would be its own judge
    experts = None
    if config.experts is not None:
        untrained = with_experts(model, config.experts.mixtures, seed=config.seed)
        experts = LearnedExperts.of(untrained, config.experts)
    adapted = (model if experts is None else experts.attach(model)).requires_grad_(False)
    layout = layout_of("norm" if experts is None else "experts_norm", adapted)
    parameters = {name: tensor.detach() for name, tensor in layout.take(adapted).items()}
    policy = new_policy(
        config.generator,
        config.objective,
        layout.names,
        learned_objective=learned,
        rates=LearnedPrecisionConfig() if config.rates else None,
        experts=experts,
        teacher=config.teacher,
        restoration=config.restoration,
        gate=config.update_rate is not None,
        prior=learned_prior(adapted, config.prior),
        initialization=LearnedInitialization.of(model) if config.initialization else None,
        balance=None if config.balance is None else ClassBalance(config.balance),
        seed=config.seed,
    ).to(images.device, next(iter(parameters.values())).dtype)
    if policy.objective is not None and policy.objective.needs_features:
        policy.statistics = source_statistics(model, images, config.tasks.batch_size)
    policy.source = SourceRecord.of(model, layout)
    return Fresh(policy, adapted, parameters)
