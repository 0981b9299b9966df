"""Backend ``higher``: the generator as a differentiable optimizer of the higher library."""

from typing import Any

import higher
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.generator.faces import MGGOptimizer
from metaopt.generator.mgg import GradientGenerator
from metaopt.types import Parameters, UpdateRule


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

    def __call__(self, loss: Tensor, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new rule state after one update on ``loss``."""
        if self._optimizer is None:
            leaves = [tensor.detach().requires_grad_() for tensor in parameters.values()]
            self._optimizer = higher.get_diff_optim(MGGOptimizer(leaves, self.generator), leaves)
        self._optimizer.generator_state = state
        moved = self._optimizer.step(loss, params=list(parameters.values()))
        return dict(zip(parameters, moved, strict=True)), self._optimizer.generator_state
