"""Model selection without labels: fixed tasks on other shifts than those of training, and their score."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from metaopt.data.seeding import generator_for
from metaopt.inner_loop import deployed
from metaopt.meta.loss import CleanTeacher
from metaopt.meta.tasks import Task, TaskSampler

EXCESS = 1.0  # far more than any update brings

if TYPE_CHECKING:
    from metaopt.meta.trainer import MetaTrainer


def held_out_tasks(trainer: "MetaTrainer", shifts: Sequence[str], count: int, steps: int, seed: int = 0) -> list[Task]:
    """Fixed tasks on other shifts than a trainer trains on, with its images and the source model as their teacher.

    Args:
        trainer: gives images, task settings and teacher.
        shifts: names of the held-out shifts.
        count: number of tasks.
        steps: K.
        seed: which tasks; another seed gives other ones.
    """
    randomness = generator_for("held-out tasks", seed)
    held_out = TaskSampler(trainer.images, shifts, trainer.config.tasks, trainer.teach)
    return [held_out.sample(steps, randomness) for _ in range(count)]


def selection_loss(trainer: "MetaTrainer", tasks: Sequence[Task]) -> float:
    """Mean over tasks and positions of the distance to the source model's predictions on the clean view.

    Where rates are learned, each task is also run under fixed budgets, at the rates that the policy then chooses. An
    update gate that opens more often than it may costs ``EXCESS`` times the share beyond. A policy that is trained on
    tasks that go on where another ended is scored on one stream of all tasks.
    """
    balance = trainer.policy.balance
    score = CleanTeacher(trainer.config.tempered, None if balance is None else balance.strength)
    means, updates, parameters, state = [], 0, trainer.parameters, None
    for task in tasks:
        if state is None or trainer.config.carry == 0:
            with torch.no_grad():
                parameters = trainer.policy.start(trainer.parameters)
                state = trainer.policy.init(parameters)
        budgeted = [] if trainer.rate_tasks is None else trainer.rate_tasks.memories(task[0].images)
        runs = [
            deployed(trainer.policy, trainer.model, parameters, state, task, score, memory)
            for memory in (None, *budgeted)
        ]
        parameters, state, updates = runs[0].parameters, runs[0].state, updates + runs[0].updates
        means.extend(torch.stack(run.losses).mean() for run in runs)
    loss = float(torch.stack(means).mean())
    allowed = trainer.config.update_rate
    rate = updates / sum(map(len, tasks))
    return loss if allowed is None else loss + EXCESS * max(0.0, rate - allowed)
