"""How a policy meets a batch before the model runs on it: sense a shift, restore the source, open the update gate."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metaopt.policy.restoration import restored
from metaopt.policy.shift import Sensed, distance, image_statistics, merged
from metaopt.policy.state import PolicyState
from metaopt.types import Parameters

if TYPE_CHECKING:
    from metaopt.policy.policy import AdaptationPolicy


def sense(
    policy: "AdaptationPolicy", model: nn.Module, parameters: Parameters, state: PolicyState, images: Tensor
) -> Sensed | None:
    """How far a batch lies from those before it; None for a policy that does not watch it.

    Args:
        policy: the method.
        model: source model.
        parameters: adapted tensors before this batch, the first of a normalisation layer.
        state: state before this batch.
        images: (B, 3, H, W) in [0, 1].
    """
    if not policy.watches:
        return None
    statistics = image_statistics(model, next(iter(parameters)).rpartition(".")[0], images)
    return Sensed(distance(state.shift, statistics), statistics)


def respond(
    policy: "AdaptationPolicy", model: nn.Module, parameters: Parameters, state: PolicyState, sensed: Sensed | None
) -> tuple[Parameters, PolicyState]:
    """Parameters and state that a batch is predicted with: as they were, or nearer to the source.

    Args:
        policy: the method.
        model: source model, whose own tensors are what comes back.
        parameters: adapted tensors before this batch.
        state: state before this batch.
        sensed: what :func:`sense` told of the batch.
    """
    if sensed is None:
        return parameters, state
    if policy.restoration is not None:
        parameters = restored(parameters, policy.initial(model, parameters), policy.restoration(sensed.distance))
        if policy.restoration.begins_anew(sensed.distance):
            state = policy.init(parameters)
    return parameters, replace(state, shift=merged(state.shift, sensed.statistics))


def opening(policy: "AdaptationPolicy", state: PolicyState, sensed: Sensed | None) -> Tensor | None:
    """z of the update gate, above 0 where a batch is worth an update; None for a policy without one."""
    if policy.gate is None:
        return None
    return policy.gate(state.gate, state.gate.age.new_ones(()) if sensed is None else sensed.distance)


def opens(policy: "AdaptationPolicy", state: PolicyState, sensed: Sensed | None) -> bool:
    """Whether the batch is updated on."""
    with torch.no_grad():
        z = opening(policy, state, sensed)
    return z is None or z.item() > 0
