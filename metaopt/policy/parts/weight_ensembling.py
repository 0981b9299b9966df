r"""Weight ensembling: after each update the parameters take a small step back to where they started.

.. math:: \theta \leftarrow \alpha\,\theta + (1 - \alpha)\,\theta_0

A model that adapts without end drifts; this keeps it near a start that generalises (ROID: Marsden, Döbler and Yang,
WACV 2024, section 3.1; :math:`\alpha` of its released code).

With ``after`` it begins late in a domain. A meta-trained policy has learned what its first K updates do, and nothing of
later ones, which on a long stretch of one domain go on until the model is ruined. There a strong pull behind the K-th
holds the parameters within about :math:`\alpha / (1 - \alpha)` updates of the start, and with ``forget`` the rule's
memory is of that age at most.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.errors import ConfigError, check_range
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext
from metaopt.types import Parameters


@dataclass(frozen=True)
class WeightEnsemblingConfig:
    """``momentum``: α, the share of the adapted parameters; 1 keeps them all."""

    momentum: float = 0.99
    after: int = 0  # updates of a domain without it
    forget: int | None = None  # behind those, what the rule remembers starts anew every so many updates; None: never

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_range("weight_ensembling.momentum", self.momentum, 0, 1, example="0.99")
        check_range("weight_ensembling.after", self.after, 0, example="8")
        if self.forget is not None and self.forget < 1:
            raise ConfigError(
                f"weight_ensembling.forget is {self.forget}; it must be at least 1, or null for never: set 8, say"
            )


class WeightEnsembling(Part):
    """Parameters take a small step back to their start after each update (ROID), or after each of a domain's later."""

    Config = WeightEnsemblingConfig
    name = "weight_ensembling"
    events = ("anchored",)

    def init(self, parameters: Parameters) -> Tensor:
        """Updates since the domain began, ()."""
        return next(iter(parameters.values())).detach().new_zeros(())

    def settle(self, context: StepContext) -> None:
        """The step back, in place where the update was."""
        config, state = self.config, context.state[self.name] + 1
        context.remember(self.name, state)
        age = int(state)
        if age > config.after:
            self._step_back(context)
            if config.after > 0:
                context.events.append("anchored")
        due = config.forget is not None and age >= config.after and (age - config.after) % config.forget == 0
        if due and context.policy.rule is not None:
            context.remember("rule", context.policy.rule.init(context.parameters))

    def _step_back(self, context: StepContext) -> None:
        parameters, start = context.parameters, context.start
        in_place = all(tensor.is_leaf for tensor in parameters.values())
        with torch.no_grad() if in_place else nullcontext():
            moved = {name: torch.lerp(start[name], own, self.config.momentum) for name, own in parameters.items()}
            if not in_place:
                context.parameters = moved
                return
            for name, tensor in parameters.items():
                tensor.copy_(moved[name])
