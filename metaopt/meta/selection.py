"""Model selection without labels: fixed tasks on other shifts than those of training, and their score."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from metaopt.data.seeding import generator_for
from metaopt.inner_loop import deployed
from metaopt.meta.loss import CleanTeacher
from metaopt.meta.tasks import Task, TaskSampler

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

    A policy that is trained on tasks that go on where another ended is scored on one stream of all tasks.
    """
    score = CleanTeacher(trainer.config.tempered)
    means, parameters, state = [], trainer.parameters, None
    for task in tasks:
        if state is None or trainer.config.carry == 0:
            parameters = trainer.parameters
            with torch.no_grad():
                state = trainer.policy.init(parameters)
        losses, parameters, state = deployed(trainer.policy, trainer.model, parameters, state, task, score)
        means.append(torch.stack(losses).mean())
    return float(torch.stack(means).mean())
