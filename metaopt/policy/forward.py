"""A policy's forward passes: what it predicts on a batch, and the loss that it would descend there."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.data.seeding import generator_for
from metaopt.experts import TeacherState, init_teacher, proximal_loss, select_anchor
from metaopt.objectives import augmented_view
from metaopt.policy.taught import taught_logits
from metaopt.types import Parameters, StepOutput

if TYPE_CHECKING:
    from metaopt.policy.policy import AdaptationPolicy


def evaluated(
    policy: "AdaptationPolicy",
    model: nn.Module,
    parameters: Parameters,
    images: Tensor,
    step: int,
    teacher: TeacherState | None,
) -> StepOutput:
    """Predict and weigh the loss. Arguments and result are those of ``AdaptationPolicy.evaluate``."""
    objective = policy.objective
    if policy.teacher is not None and teacher is None:
        teacher = init_teacher(parameters)
    taught = None
    if policy.predict_with == "teacher" or (objective is not None and objective.needs_teacher):
        taught = _taught(policy, model, teacher, images, step)
    tensors, statistics = policy.gates() | parameters, _statistics(policy)
    features = objective is not None and objective.needs_features
    output = functional_call(model, tensors, (images,), statistics | {"features": features})
    logits = taught if taught is not None and policy.predict_with == "teacher" else output.logits
    if objective is None:
        return StepOutput(_balanced(policy, logits))
    if objective.needs_view:
        view = augmented_view(images, generator_for("view", policy.seed, step))
        viewed = functional_call(model, tensors, (view,), statistics)
        output = output._replace(view_logits=viewed.logits)
    loss, terms = objective.loss(output._replace(teacher_logits=taught), policy.statistics)
    if policy.pulls:
        assert policy.teacher is not None and teacher is not None
        anchor = select_anchor(policy.teacher, teacher, policy.initial(model, parameters))
        terms["proximal"] = proximal_loss(policy.teacher, parameters, anchor)
        loss = loss + policy.teacher.proximal * terms["proximal"]
    return StepOutput(_balanced(policy, logits), loss, terms)


def predicted(
    policy: "AdaptationPolicy",
    model: nn.Module,
    parameters: Parameters,
    images: Tensor,
    step: int,
    teacher: TeacherState | None,
) -> StepOutput:
    """Predict alone. Arguments and result are those of ``AdaptationPolicy.predict``."""
    with torch.no_grad():
        if policy.predict_with == "teacher":
            logits = _taught(policy, model, teacher or init_teacher(parameters), images, step)
        else:
            logits = functional_call(model, policy.gates() | parameters, (images,), _statistics(policy)).logits
        return StepOutput(_balanced(policy, logits), updated=False)


def _statistics(policy: "AdaptationPolicy") -> dict[str, Any]:
    """How BatchNorm layers normalise, as the source model takes it."""
    prior = {} if policy.prior is None else {"prior": policy.prior()}
    return {"batch_statistics": policy.batch_statistics} | prior


def _balanced(policy: "AdaptationPolicy", logits: Tensor) -> Tensor:
    """Predictions, (B, C), corrected where the policy does so."""
    return logits if policy.balance is None else policy.balance(logits)


def _taught(
    policy: "AdaptationPolicy", model: nn.Module, teacher: TeacherState | None, images: Tensor, step: int
) -> Tensor:
    """The teacher's logits, (B, C)."""
    assert policy.teacher is not None and teacher is not None
    state = teacher._replace(average=policy.gates() | teacher.average)
    return taught_logits(policy.teacher, model, state, images, statistics=_statistics(policy), step=step)
