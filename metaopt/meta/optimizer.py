"""The meta-optimizer: one Adam step on the learned tensors from an unroll's meta-gradient."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.unroll import learned_groups, learned_tensors
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.policy import AdaptationPolicy


class MetaOptimizer:
    """Adam, in which parts of many numbers have a rate and a gradient clip of their own.

    Their tensors are of another scale than the policy's few numbers, whose gradients would drown in a common norm.

    Args:
        policy: its learned tensors are changed in place.
        config: rates, clip and penalties.
    """

    def __init__(self, policy: AdaptationPolicy, config: MetaTrainConfig) -> None:
        self.policy, self.config = policy, config
        tensors = learned_tensors(policy)
        rates = {
            group: rate
            for part in policy.listed
            if (rate := part.meta_rate()) is not None
            for group in part.learned_groups()
        }
        groups: dict[str, list[str]] = {}
        for group, names in learned_groups(policy).items():
            groups.setdefault(group if group in rates else "", []).extend(names)
        self.groups = [(names, rates.get(group, config.lr)) for group, names in groups.items()]
        self.adam = torch.optim.Adam([{"params": [tensors[n] for n in names], "lr": r} for names, r in self.groups])

    def step(self, loss: Tensor, gradients: Mapping[str, Tensor], share: float) -> tuple[Tensor, bool]:
        """Take one step, unless the loss or a gradient is not finite.

        Args:
            loss: meta-loss of the unroll, scalar.
            gradients: of the meta-loss in each learned tensor.
            share: of the rates that the schedule has left.

        Returns:
            The norm of the meta-gradient before it was clipped, scalar, and whether the step was taken.
        """
        tensors = learned_tensors(self.policy)
        for name, tensor in tensors.items():
            tensor.grad = gradients[name].to(tensor)
        penalty = self._penalty()
        if penalty.requires_grad:
            penalty.backward()
        clip = torch.nn.utils.clip_grad_norm_
        norms = [clip([tensors[name] for name in names], self.config.clip_norm) for names, _ in self.groups]
        norm = torch.stack(norms).norm()
        taken = bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))
        if taken:
            for group, (_, rate) in zip(self.adam.param_groups, self.groups, strict=True):
                group["lr"] = rate * share
            self.adam.step()
        self.adam.zero_grad()
        return norm, taken

    def _penalty(self) -> Tensor:
        """Of step sizes far from 1, and of what each part adds."""
        assert isinstance(self.policy.rule, GradientGenerator)
        penalty = self.config.shrinkage * self.policy.rule.penalty()
        for part in self.policy.listed:
            if (own := part.penalty()) is not None:
                penalty = penalty + own
        return penalty

    def state_dict(self) -> dict[str, Any]:
        """Adam's state, copied."""
        return copy.deepcopy(self.adam.state_dict())

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take over copies of a state: Adam keeps the very tensors that it is given, and changes them in place."""
        self.adam.load_state_dict(copy.deepcopy(values))
