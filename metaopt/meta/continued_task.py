"""What one task of meta-training hands to the next, so that a policy also learns on streams that shift."""

from dataclasses import dataclass
from typing import Any

import torch

from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.state import State, copied_state, state_from_dict, state_to_dict
from metaopt.types import Parameters


@dataclass(frozen=True)
class ContinuedTask:
    """Where a task ended: a stream goes on from there."""

    parameters: Parameters
    state: State
    position: int = 0  # batches met so far

    @classmethod
    def of(cls, parameters: Parameters, state: State | None, position: int) -> "ContinuedTask | None":
        """The end of a task; None where a number is not finite, for nothing can go on from there."""
        if state is None or not all(bool(torch.isfinite(tensor).all()) for tensor in parameters.values()):
            return None
        return cls(parameters, state, position)

    def to_dict(self) -> dict[str, Any]:
        """Tensors for a file, copied."""
        parameters = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        return {"parameters": parameters, "state": state_to_dict(self.state), "position": self.position}

    @classmethod
    def from_dict(cls, values: dict[str, Any], policy: AdaptationPolicy) -> "ContinuedTask":
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: the state is that of another policy or model.
        """
        parameters = detached({name: tensor.clone() for name, tensor in values["parameters"].items()})
        state = state_from_dict(values["state"], copied_state(policy.init(parameters)))
        return cls(parameters, state, int(values.get("position", 0)))  # which files of older releases lack
