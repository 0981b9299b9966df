"""How a loss becomes new parameters: in place, as deployed, or as a differentiable step of an unroll."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.parameters import detached, flatten
from metaopt.types import LossOf, Parameters, UpdateRule

NONFINITE = "nonfinite"


def gradients_of(
    loss: Tensor, parameters: Parameters, create_graph: bool = False, retain_graph: bool = False
) -> Parameters:
    """Gradient of a scalar in each parameter; zeros where the loss does not depend on it."""
    gradients = torch.autograd.grad(
        loss,
        list(parameters.values()),
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(parameters, gradients, strict=True))


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
    """

    rule: UpdateRule
    accept: Callable[[Tensor, Parameters], bool] | None = None

    def __call__(self, loss_of: LossOf, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """The same storages, changed in place, as fresh leaves, and new rule state after one update."""
        loss, gradients = loss_and_gradients(self.rule, loss_of, parameters)
        if self.accept is not None and not self.accept(loss, gradients):
            return detached(parameters), state
        with torch.no_grad():
            updates, state = self.rule.update(gradients, state)
            subtract = torch._foreach_sub_  # pyright: ignore[reportPrivateImportUsage]
            subtract(list(parameters.values()), list(updates.values()))
        return detached(parameters), state


class FiniteGuard:
    """Refuses an update whose loss or squared gradient norm is NaN or infinite: parameters and state stay as they were.

    The square counts because it enters the second moments, where an infinity would stay for good. ``events`` counts the
    refusals as ``nonfinite``, beside what else happens to a deployed model.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter({NONFINITE: 0})

    def __call__(self, loss: Tensor, gradients: Parameters) -> bool:
        """Whether to apply the update."""
        finite = bool(torch.isfinite(loss)) and bool(torch.isfinite(flatten(gradients).square().sum()))
        if not finite:
            self.events[NONFINITE] += 1
        return finite
