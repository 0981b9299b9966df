"""A method's teacher: its prediction, also as the mean over augmented views (CoTTA, CVPR 2022), and its move."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt.data.seeding import generator_for
from metaopt.experts import TeacherConfig, TeacherState, restore, teacher_logits, update_teacher
from metaopt.objectives import augmented_view
from metaopt.types import Parameters

if TYPE_CHECKING:
    from metaopt.policy.policy import AdaptationPolicy


def taught_logits(
    config: TeacherConfig,
    model: nn.Module,
    state: TeacherState,
    images: Tensor,
    *,
    statistics: Mapping[str, Any],
    step: int,
) -> Tensor:
    """The teacher's logits (B, C), without gradients; of several views, their mean.

    Args:
        config: how many views, and when.
        model: source model, whose own tensors tell how sure it is.
        state: of the teacher.
        images: (B, 3, H, W) in [0, 1].
        statistics: how BatchNorm layers normalise, as `metaopt.models.SourceModel.forward` takes it.
        step: number of updates before this one, which the views are drawn from.
    """
    if config.views == 0 or (config.sure_above < 1 and _confidence(model, images, statistics) > config.sure_above):
        return teacher_logits(model, state, images, **statistics)
    views = (
        augmented_view(images, generator_for("teacher view", config.seed, step, index)) for index in range(config.views)
    )
    return torch.stack([teacher_logits(model, state, view, **statistics) for view in views]).mean(dim=0)


@torch.no_grad()
def _confidence(model: nn.Module, images: Tensor, statistics: Mapping[str, Any]) -> float:
    """Mean probability that the source gives to the class that it predicts."""
    return model(images, **statistics).logits.softmax(dim=1).amax(dim=1).mean().item()


def settle(
    policy: "AdaptationPolicy", model: nn.Module, parameters: Parameters, state: TeacherState | None
) -> tuple[Parameters, TeacherState | None]:
    """What follows an update: the teacher takes its share of the student, and a few scalars of the student go back.

    Where the update was in place (the tensors are leaves), so is this.
    """
    config = policy.teacher
    if config is None or state is None:
        return parameters, state
    moved = update_teacher(config, state, parameters)
    in_place = all(tensor.is_leaf for tensor in parameters.values())
    with torch.no_grad() if in_place else nullcontext():
        restored = restore(config, parameters, policy.initial(model, parameters), state.step)
        if not in_place:
            return restored, moved
        for name, tensor in parameters.items():
            tensor.copy_(restored[name])
    return parameters, moved
