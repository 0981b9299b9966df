"""Backend ``func``: plain ``torch.autograd.grad``, on parameters that ``torch.func.functional_call`` puts in place.

Also home of the in-place update that deployment uses: the same rule, the same order of operations, no graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.parameters import detached
from metaopt.types import Parameters, UpdateRule


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


@dataclass(frozen=True)
class FuncApply:
    """Differentiable update: new tensors, a graph through the gradients and through the rule."""

    rule: UpdateRule

    def __call__(self, loss: Tensor, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new rule state after one update on ``loss``."""
        gradients = gradients_of(loss, parameters, create_graph=True)
        updates, state = self.rule.update(gradients, state)
        return {name: tensor - updates[name] for name, tensor in parameters.items()}, state


@dataclass(frozen=True)
class InPlaceApply:
    """Deployment's update: the parameters' own storage changes, nothing is kept for a second derivative.

    ``accept`` sees the loss and the gradients first; where it says no, parameters and state stay as they are.
    """

    rule: UpdateRule
    accept: Callable[[Tensor, Parameters], bool] | None = None

    def __call__(self, loss: Tensor, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """The same storages, changed in place, as fresh leaves, and new rule state after one update on ``loss``."""
        gradients = gradients_of(loss, parameters)
        if self.accept is not None and not self.accept(loss, gradients):
            return detached(parameters), state
        with torch.no_grad():
            updates, state = self.rule.update(gradients, state)
            subtract = torch._foreach_sub_  # pyright: ignore[reportPrivateImportUsage]
            subtract(list(parameters.values()), list(updates.values()))
        return detached(parameters), state
