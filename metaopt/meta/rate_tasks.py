"""What meta-training asks of learned rates: the model's layers at the tasks' batch size, and a budget for each task."""

import math

import torch
from torch import Tensor, nn

from metaopt.inner_loop import RateTask
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.sparsity import LayerTable, Profile
from metaopt.types import Parameters

LEAST_BUDGET = 1.1  # of the budgets that tasks have, times what the cheapest rates hold


class RateTasks:
    """Draws budgets; what the model keeps for backward is found out at the first one.

    Args:
        model: source model.
        policy: gives the loss.
        parameters: adapted tensors.
    """

    def __init__(self, model: nn.Module, policy: AdaptationPolicy, parameters: Parameters) -> None:
        self.model, self.policy, self.parameters = model, policy, parameters
        self._table: LayerTable | None = None

    def sample(self, images: Tensor, generator: torch.Generator) -> RateTask:
        """A budget drawn log-uniformly, from a little above what the cheapest rates hold to what the dearest do.

        Args:
            images: a batch of the task, (B, 3, H, W).
            generator: CPU generator; the only source of randomness.
        """
        table = self._layers(images)
        totals = table.costs.sum(axis=0)
        low, high = math.log(LEAST_BUDGET * totals.min()), math.log(totals.max())
        budget = math.exp(low + float(torch.rand((), generator=generator)) * (high - low))
        return RateTask(table, int(budget) + table.fixed)

    def _layers(self, images: Tensor) -> LayerTable:
        if self._table is None:
            leaves = detached(self.parameters)

            def loss_of(some: Tensor) -> Tensor:
                loss = self.policy.evaluate(self.model, leaves, some).loss
                assert loss is not None
                return loss

            self._table = Profile(self.model, loss_of, leaves, images).table(len(images))
        return self._table
