"""The policy before meta-training: the parts that the settings ask for, on one model."""

from typing import NamedTuple

from torch import Tensor

from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.loss import build_meta_loss
from metaopt.models import SourceModel
from metaopt.parameters import own_values
from metaopt.policy import AdaptationPolicy, SourceRecord, new_policy
from metaopt.types import Parameters


class Untrained(NamedTuple):
    """A policy and what it adapts."""

    policy: AdaptationPolicy
    model: SourceModel  # a skeleton of the source, with the policy's experts, where it has some
    parameters: Parameters  # the model's own values of the adapted tensors, in float32 at least


def build_policy(model: SourceModel, images: Tensor, config: MetaTrainConfig) -> Untrained:
    """A policy that has learned nothing yet.

    Args:
        model: source model; it stays as it is.
        images: clean unlabeled images, (n, 3, H, W) in [0, 1], of which objective and parts take what they need.
        config: which parts it has.

    Raises:
        ModelError: the model has nothing to adapt.
    """
    learned = not build_meta_loss(config.loss).own_objective  # else its weights stay: it would be its own judge
    policy = new_policy(
        model,
        config.generator,
        config.objective,
        config.parts,
        learned_objective=learned,
        seed=config.seed,
        layers=config.layers,
    )
    adapted = policy.attach(model).requires_grad_(False)
    layout = policy.layout(adapted)
    parameters = own_values(adapted, layout.names)
    policy.to(images.device, next(iter(parameters.values())).dtype)
    policy.prepare(model, lambda: images, config.batch_size)
    policy.source = SourceRecord.of(model, layout)
    return Untrained(policy, adapted, parameters)
