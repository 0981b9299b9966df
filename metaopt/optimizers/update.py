"""How a loss becomes new parameters: in place, as deployed, or as a differentiable step of an unroll."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.errors import ModelError
from metaopt.parameters import detached, flatten
from metaopt.types import LossOf, Parameters, UpdateRule

NONFINITE = "nonfinite"  # event: an update that was refused for what is not finite

NO_GRADIENT = (
    "an update would change nothing: allowed is a network that is differentiable from its normalisation layers to its "
    "logits, so take no_grad, detach and quantised layers out of its forward pass, or use method=bn"
)


def gradients_of(
    loss: Tensor, parameters: Parameters, create_graph: bool = False, retain_graph: bool = False
) -> Parameters:
    """Gradient of a scalar in each parameter; zeros where the loss does not depend on it.

    Raises:
        ModelError: it depends on none of them.
    """
    if not loss.requires_grad:
        raise ModelError(f"the loss has no gradient at all; {NO_GRADIENT}")
    gradients = torch.autograd.grad(
        loss,
        list(parameters.values()),
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
    )
    if all(gradient is None for gradient in gradients):
        raise ModelError(f"none of the {len(parameters)} adapted tensors gets a gradient; {NO_GRADIENT}")
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(parameters.items(), gradients, strict=True)
    }


def loss_and_gradients(
    rule: UpdateRule, loss_of: LossOf, parameters: Parameters, create_graph: bool = False
) -> tuple[Tensor, Parameters]:
    """The loss and the gradients that a rule's ``update`` takes: those at the parameters, or where its ascent leads."""
    loss = loss_of(parameters)
    gradients = gradients_of(loss, parameters, create_graph)
    ascend = getattr(rule, "ascend", None)
    if ascend is None:
        return loss, gradients
    there = {name: parameters[name] + step for name, step in ascend(gradients).items()}
    there = there if create_graph else detached(there)
    loss = loss_of(there)
    return loss, gradients_of(loss, there, create_graph)


@dataclass(frozen=True)
class FuncApply:
    """Backend ``func``: new tensors by plain ``torch.autograd.grad``, a graph through the gradients and the rule."""

    rule: UpdateRule

    def __call__(self, loss_of: LossOf, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new rule state after one update."""
        _, gradients = loss_and_gradients(self.rule, loss_of, parameters, create_graph=True)
        updates, state = self.rule.update(gradients, state)
        return {name: tensor - updates[name] for name, tensor in parameters.items()}, state


@dataclass(frozen=True)
class InPlaceApply:
    """Deployment's update: the parameters' own storage changes, nothing is kept for a second derivative.

    ``accept`` sees the loss and the gradients first; where it says no, parameters and state stay as they are.
    ``length`` says how far to go, as a multiple of what the rule says; None: as far.
    """

    rule: UpdateRule
    accept: Callable[[Tensor, Parameters], bool] | None = None
    length: Callable[[], float] | None = None

    def __call__(self, loss_of: LossOf, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """The same storages, changed in place, as fresh leaves, and new rule state after one update."""
        loss, gradients = loss_and_gradients(self.rule, loss_of, parameters)
        if self.accept is not None and not self.accept(loss, gradients):
            return detached(parameters), state
        with torch.no_grad():
            updates, state = self.rule.update(gradients, state)
            length = 1.0 if self.length is None else self.length()
            subtract = torch._foreach_sub_  # pyright: ignore[reportPrivateImportUsage]
            subtract(list(parameters.values()), list(updates.values()), alpha=length)
        return detached(parameters), state


def is_finite(loss: Tensor, gradients: Parameters) -> bool:
    """Whether the loss and the squared norm of the gradients are neither NaN nor infinite: what is worth an update.

    The square counts because it enters the second moments, where an infinity would stay for good.
    """
    return bool(torch.isfinite(loss)) and bool(torch.isfinite(flatten(gradients).square().sum()))
