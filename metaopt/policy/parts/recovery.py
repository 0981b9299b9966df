r"""Model recovery: where the loss of an adapting model has become too small, it has collapsed, and starts again.

.. math:: e \leftarrow 0.9\, e + 0.1\, L, \qquad \theta \leftarrow \theta_0 \;\text{ where }\; e < e_m

with the loss L of the batch, of its last look where the rule takes two (SAR: Niu et al., ICLR 2023, section 3.2;
constants of its released code). What rule and parts remember starts anew as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.errors import check_range
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext
from metaopt.types import Parameters, StepOutput

MOMENTUM = 0.9


@dataclass(frozen=True)
class RecoveryConfig:
    """``threshold``: e_m, in the units of the loss; 0.2 is published, for entropy."""

    threshold: float = 0.2

    def __post_init__(self) -> None:
        """Check the threshold."""
        check_range("recovery.threshold", self.threshold, 0, example="0.2")


class Recovery(Part):
    """A model whose loss has become too small has collapsed, and starts again (SAR)."""

    Config = RecoveryConfig
    name = "recovery"
    events = ("recovered",)

    def init(self, parameters: Parameters) -> Tensor:
        """The running loss: empty before any."""
        return next(iter(parameters.values())).detach().new_zeros(0)

    def check_state(self, state: Tensor, classes: int) -> None:
        """A scalar, or none yet."""
        if tuple(state.shape) not in ((), (0,)):
            raise ValueError(f"its running loss has shape {tuple(state.shape)}")

    def judge(self, context: StepContext, output: StepOutput) -> None:
        """Take the loss in, and go back to the start where the mean has become too small."""
        loss = context.losses[-1] if context.losses else None
        if loss is None or context.refused or not bool(torch.isfinite(loss)):
            return
        before = context.state[self.name]
        mean = loss.to(before) if before.numel() == 0 else torch.lerp(loss.to(before), before, MOMENTUM)
        context.remember(self.name, mean)
        if float(mean) < self.config.threshold:
            start = {name: tensor.detach().clone().requires_grad_() for name, tensor in context.start.items()}
            context.parameters = start
            context.begin_anew("recovered")
