"""Backend ``torchopt``: the generator as a torchopt gradient transformation, applied by ``torchopt.apply_updates``."""

from typing import Any

import torchopt
from torch import Tensor

from metaopt.generator.faces import gradient_transformation
from metaopt.inner_loop.func import gradients_of
from metaopt.types import Parameters, UpdateRule


class TorchOptApply:
    """Differentiable update through torchopt's functional interface."""

    def __init__(self, rule: UpdateRule) -> None:
        self.transformation = gradient_transformation(rule)

    def __call__(self, loss: Tensor, parameters: Parameters, state: Any) -> tuple[Parameters, Any]:
        """New parameters and new rule state after one update on ``loss``."""
        # Tuples, because torchopt's trees would sort a dictionary by its keys.
        params = tuple(parameters.values())
        gradients = tuple(gradients_of(loss, parameters, create_graph=True).values())
        updates, state = self.transformation.update(gradients, state, params=params, inplace=False)
        moved: Any = torchopt.apply_updates(params, updates, inplace=False)
        return dict(zip(parameters, moved, strict=True)), state
