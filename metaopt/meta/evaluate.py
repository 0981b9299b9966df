"""The meta-loss of a policy as it is deployed: what held-out tasks are scored by."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaopt.activation_memory import ActivationMemory
from metaopt.meta.unroll import MetaBatch, MetaLoss
from metaopt.optimizers.update import InPlaceApply
from metaopt.parameters import detached
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.state import State
from metaopt.policy.step import adaptation_step
from metaopt.policy.without_step import evaluate_on
from metaopt.types import Parameters


def unrolled_loss(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    batches: Iterable[MetaBatch],
    meta_loss: MetaLoss,
    memory: ActivationMemory | None = None,
) -> list[Tensor]:
    """Meta-loss at positions 1 to K of an unroll by deployment's in-place update: detached scalars, no meta-gradient.

    Works for every method, those that never update included. ``parameters`` are not changed; ``memory`` says how
    activations are kept for backward, None as torch keeps them.
    """
    with torch.no_grad():
        parameters = policy.start(parameters)
        state = policy.init(parameters)
    return deployed(policy, model, parameters, state, batches, meta_loss, memory).losses


@dataclass(frozen=True)
class Deployment:
    """What a run of deployment's steps gives; all detached."""

    losses: list[Tensor]  # meta-loss at positions 1 to K, scalars
    updates: int  # steps at which the policy updated
    parameters: Parameters  # after the last step
    state: State


def deployed(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    state: State,
    batches: Iterable[MetaBatch],
    meta_loss: MetaLoss,
    memory: ActivationMemory | None = None,
    first_position: int = 0,
) -> Deployment:
    """As :func:`unrolled_loss`, from any state on, which has met ``first_position`` batches; also what became of it."""
    parameters = detached({name: tensor.clone() for name, tensor in parameters.items()})
    apply = InPlaceApply(policy.rule) if policy.rule is not None else None
    losses: list[Tensor] = []
    updates = 0
    for position, batch in enumerate(batches):
        with torch.set_grad_enabled(policy.updates):
            parameters, state, output = adaptation_step(
                policy, model, parameters, state, batch.images, apply, first_position + position, memory
            )
        updates += policy.updates and output.updated
        if position > 0:
            if output.loss is None and meta_loss.own_objective:  # not updated on, so nobody has weighed it yet
                with torch.no_grad():
                    met = first_position + position
                    output = evaluate_on(policy, model, parameters, batch.images, state, met)
            losses.append(meta_loss(output, batch).detach())
    return Deployment(losses, updates, parameters, state)
