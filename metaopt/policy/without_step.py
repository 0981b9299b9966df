"""What a method says of images without taking a step on them: the same passes as in `metaopt.policy.step`."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.precision import network_alone_autocasts
from metaopt.policy.state import State
from metaopt.policy.step import StepContext, evaluate, predict, rest
from metaopt.types import Parameters, StepOutput


def evaluate_on(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    images: Tensor,
    state: State | None = None,
    position: int = 0,
    few: bool = False,
) -> StepOutput:
    """Predict and weigh the loss without a step, in a fresh state by default; arguments of `adaptation_step`.

    With ``few`` the images are too few to tell what their domain is like: what the stream has told counts beside them.
    """
    state = policy.init(parameters) if state is None else state
    with network_alone_autocasts(images.device.type) as autocast:
        return evaluate(StepContext(policy, model, parameters, state, images, position, few=few, autocast=autocast))


def predict_on(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    images: Tensor,
    state: State,
    remember: bool = False,
) -> tuple[State, StepOutput]:
    """Predict on a few images alone, without a step or a loss; arguments of `adaptation_step`.

    With ``remember`` the state that is given back knows what they told of the stream.
    """
    with network_alone_autocasts(images.device.type) as autocast:
        context = StepContext(policy, model, parameters, state, images, few=True, autocast=autocast)
        output = predict(context)
        if remember and bool(torch.isfinite(output.logits).all()):
            rest(context)
        return context.state, replace(output, passes=sum(context.passes))
