"""The meta gradient generator as a differentiable optimizer of the higher library, and the backend ``higher``."""

from collections.abc import Sequence
from typing import Any

import higher
import torch
from higher.optim import DifferentiableOptimizer
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.optimizers.interop.torch_optim import MGGOptimizer, named_parameters
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.types import LossOf, Parameters, UpdateRule


class DifferentiableMGG(DifferentiableOptimizer):
    """The meta gradient generator as a higher ``DifferentiableOptimizer``; made by ``higher.get_diff_optim``.

    The generator is an attribute and not a setting of the parameter groups, which higher copies deeply: its tensors
    keep their identity, so that meta-gradients reach them.
    """

    def __init__(self, other: MGGOptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self.generator = other.generator
        self.generator_state = other.generator_state

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **kwargs: Any) -> None:
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        flat = [gradient for group in grouped_grads for gradient in group]
        filled = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for gradient, tensor in zip(flat, tensors, strict=True)
        ]
        if self.generator_state is None:
            self.generator_state = self.generator.init(named_parameters(tensors, self.generator))
        updates, self.generator_state = self.generator.update(
            named_parameters(filled, self.generator), self.generator_state
        )
        remaining = iter(updates.values())
        for group in self.param_groups:
            scale = group["lr"] / self.generator.config.lr
            group["params"] = [tensor - next(remaining) * scale for tensor in group["params"]]


higher.register_optim(MGGOptimizer, DifferentiableMGG)  # pyright: ignore[reportArgumentType]: its annotation is wrong


class HigherApply:
    """Differentiable update through ``higher.optim.DifferentiableOptimizer.step``.

    Raises:
        ConfigError: the rule is not a generator; higher has differentiable versions of registered optimizers only.
    """

    def __init__(self, rule: UpdateRule) -> None:
        if not isinstance(rule, GradientGenerator):
            raise ConfigError(
                f"meta.backend=higher got the rule {type(rule).__name__}; it unrolls gradient generators only: use func"
            )
        self.generator = rule
        self._optimizer: Any = None

    def __call__(self, loss_of: LossOf, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new rule state after one update."""
        if self._optimizer is None:
            leaves = [tensor.detach().requires_grad_() for tensor in parameters.values()]
            self._optimizer = higher.get_diff_optim(MGGOptimizer(leaves, self.generator), leaves)
        self._optimizer.generator_state = state
        moved = self._optimizer.step(loss_of(parameters), params=list(parameters.values()))
        return dict(zip(parameters, moved, strict=True)), self._optimizer.generator_state
