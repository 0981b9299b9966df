"""The one adaptation step, of every method, in meta-training and in deployment."""

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from metaopt.activation_memory import ActivationMemory
from metaopt.activation_memory.engine import AfterStep
from metaopt.parameters import detached
from metaopt.policy.gate import stepped
from metaopt.policy.response import opens, respond, sense
from metaopt.policy.state import PolicyState
from metaopt.policy.taught import settle
from metaopt.types import ApplyUpdate, Parameters, StepOutput

if TYPE_CHECKING:
    from metaopt.policy.policy import AdaptationPolicy


def adaptation_step(
    policy: "AdaptationPolicy",
    model: nn.Module,
    parameters: Parameters,
    state: PolicyState,
    images: Tensor,
    apply: ApplyUpdate | None,
    step: int,
    memory: ActivationMemory | None,
) -> tuple[Parameters, PolicyState, StepOutput]:
    """Sense a shift and restore the source; predict; and, where the gate opens, update.

    Arguments and result are those of ``AdaptationPolicy.step``.
    """
    if not policy.updates or apply is None:
        return parameters, state, policy.evaluate(model, parameters, images, step, state.teacher)
    sensed = sense(policy, model, parameters, state, images)
    parameters, state = respond(policy, model, parameters, state, sensed)
    if opens(policy, state, sensed):
        parameters, state, output = _updated(policy, model, parameters, state, images, apply, step, memory)
    else:
        parameters, output = detached(parameters), policy.predict(model, parameters, images, step, state.teacher)
    if policy.gate is not None:
        state = replace(state, gate=stepped(state.gate, output.logits, output.updated))
    return parameters, state, replace(output, distance=None if sensed is None else sensed.distance)


def _updated(
    policy: "AdaptationPolicy",
    model: nn.Module,
    parameters: Parameters,
    state: PolicyState,
    images: Tensor,
    apply: ApplyUpdate,
    step: int,
    memory: ActivationMemory | None,
) -> tuple[Parameters, PolicyState, StepOutput]:
    """Predict and update."""

    def loss_of(some: Tensor) -> Tensor:
        return _loss(policy.evaluate(model, parameters, some, step, state.teacher))

    plain = nullcontext(AfterStep(state.pruning))
    with plain if memory is None else memory.step(model, loss_of, parameters, state.pruning, images) as kept:
        output = policy.evaluate(model, parameters, images, step, state.teacher)
        updated, rule_state = apply(_loss(output), parameters, state.rule)
    refused = rule_state is state.rule and rule_state is not None
    if not refused:  # else nothing is to be learned from the batch
        updated, teacher = settle(policy, model, updated, state.teacher)
        state = replace(state, rule=rule_state, pruning=kept.state, teacher=teacher)
    return updated, state, output


def _loss(output: StepOutput) -> Tensor:
    """The loss of a method that updates, which has one."""
    assert output.loss is not None
    return output.loss
