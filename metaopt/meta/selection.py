"""Model selection without labels: fixed tasks on other shifts than those of training, and their score."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metaopt.data.seeding import generator_for
from metaopt.meta.budget_tasks import BudgetTasks
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.evaluate import deployed
from metaopt.meta.loss import CleanTeacher
from metaopt.meta.tasks import Task, TaskSampler
from metaopt.policy import AdaptationPolicy
from metaopt.types import Parameters

EXCESS = 1.0  # far more than any update brings


def held_out_tasks(
    images: Tensor,
    teacher: Callable[[Tensor], Tensor],
    config: MetaTrainConfig,
    shifts: Sequence[str],
    count: int,
    steps: int,
    seed: int = 0,
) -> list[Task]:
    """Fixed tasks on other shifts than those of training, with the source model as their teacher.

    Args:
        images: clean unlabeled images, (n, 3, H, W) in [0, 1].
        teacher: gives class probabilities (B, C) for clean images.
        config: how tasks are drawn.
        shifts: names of the held-out shifts.
        count: number of tasks.
        steps: K.
        seed: which tasks; another seed gives other ones.
    """
    randomness = generator_for("held-out tasks", seed)
    held_out = TaskSampler(images, shifts, config, teacher)
    return [held_out.sample(steps, randomness) for _ in range(count)]


def selection_loss(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    config: MetaTrainConfig,
    tasks: Sequence[Task],
    budgets: BudgetTasks | None = None,
) -> float:
    """Mean over tasks and positions of the distance to the source model's predictions on the clean view.

    Where an allocation is learned, each task is also run under fixed budgets, with what the policy then keeps. An
    update gate that opens more often than it may costs ``EXCESS`` times the share beyond. A policy that is trained on
    tasks that go on where another ended is scored on one stream of all tasks.

    Args:
        policy: the one to score.
        model: what it adapts.
        parameters: the source's values of the adapted tensors.
        config: says how predictions are compared, and how many updates are allowed.
        tasks: held-out ones.
        budgets: of a learned allocation.
    """
    score = CleanTeacher(config.tempered, config.balance if policy.part("class_balance") is not None else None)
    means, updates, met, now, state = [], 0, 0, parameters, None
    for task in tasks:
        if state is None or config.continues == 0:
            with torch.no_grad():
                now = policy.start(parameters)
                state, met = policy.init(now), 0
        memories = [None, *([] if budgets is None else budgets.memories(task.largest.images))]
        runs = [deployed(policy, model, now, state, task, score, memory, met) for memory in memories]
        now, state, updates, met = runs[0].parameters, runs[0].state, updates + runs[0].updates, met + len(task)
        means.extend(torch.stack(run.losses).mean() for run in runs)
    loss = float(torch.stack(means).mean())
    allowed = config.gate_share
    return loss if allowed is None else loss + EXCESS * max(0.0, updates / sum(map(len, tasks)) - allowed)
