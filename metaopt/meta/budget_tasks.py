"""What meta-training asks of a learned allocation: the layers at the tasks' batch size, and a budget for each task."""

import math

import torch
from torch import Tensor, nn

from metaopt.activation_memory import (
    ActivationMemory,
    AllocationState,
    LayerTable,
    LearnedPrecision,
    MemoryConfig,
    Profiles,
)
from metaopt.activation_memory.importance import learning_layers
from metaopt.activation_memory.learned_precision import bytes_over_budget
from metaopt.evaluation.meter import MIB
from metaopt.meta.precision_gradient import BudgetTask
from metaopt.parameters import detached
from metaopt.policy import AdaptationPolicy
from metaopt.policy.step import loss_of
from metaopt.policy.without_step import evaluate_on
from metaopt.types import Parameters

LEAST_BUDGET = 1.1  # of the budgets that tasks have, times what a step holds at the cheapest precisions
SELECTION = (0.2, 0.5)  # where model selection's budgets lie between the least and the largest, in logarithms


class BudgetTasks:
    """Budgets between what the cheapest precisions and what the dearest need; dry runs tell them at the first one.

    Args:
        model: source model.
        policy: gives the loss, and the allocation.
        parameters: adapted tensors.
    """

    def __init__(self, model: nn.Module, policy: AdaptationPolicy, parameters: Parameters) -> None:
        self.model, self.policy, self.parameters = model, policy, parameters
        self.allocation: LearnedPrecision = policy.part("pruning").allocation
        self._profiles = Profiles()

    def sample(self, images: Tensor, generator: torch.Generator) -> BudgetTask:
        """A budget drawn log-uniformly.

        Args:
            images: a batch of the task, (B, 3, H, W).
            generator: CPU generator; the only source of randomness.
        """
        table = self._table(images)
        return BudgetTask(table, _budget(table, float(torch.rand((), generator=generator))))

    def memories(self, images: Tensor) -> list[ActivationMemory]:
        """Steps as deployed under each of model selection's budgets, which are always the same."""
        table = self._table(images)
        configs = [MemoryConfig("pruned", _budget(table, position) / MIB) for position in SELECTION]
        return [ActivationMemory(config, self.allocation, self._profiles) for config in configs]

    def over_budget(self, task: BudgetTask, state: AllocationState) -> int:
        """Bytes by which the soft choices of the precisions exceed a task's budget; see ``bytes_over_budget``.

        Args:
            task: one of :meth:`sample`.
            state: what earlier gradients told of the layers.
        """
        with torch.no_grad():
            layers = list(learning_layers(self.parameters))
            choices = self.allocation.soft_choices(task.table, layers, state, task.budget)
        return bytes_over_budget(task.table, choices, task.budget)

    def _table(self, images: Tensor) -> LayerTable:
        leaves = detached(self.parameters)

        def loss_on(some: Tensor) -> Tensor:
            return loss_of(evaluate_on(self.policy, self.model, leaves, some))

        return self._profiles.table(self.model, loss_on, leaves, images, prunes=True)


def _budget(table: LayerTable, position: float) -> int:
    """Bytes, from the least budget at position 0 to the largest at 1."""
    least, most = (table.peak(costs) for costs in (table.costs.min(axis=1), table.costs.max(axis=1)))
    low = math.log(LEAST_BUDGET * least)
    return int(math.exp(low + position * max(0.0, math.log(most) - low)))
