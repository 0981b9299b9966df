"""What meta-training brought: the meta-loss on fixed unseen tasks before and after it, and of Adam on the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.data.shifts import REPORT, shift_names
from metaopt.evaluation import Monitor
from metaopt.meta.selection import held_out_tasks
from metaopt.meta.tasks import Task
from metaopt.meta.trainer import MetaTrainer
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.without_step import evaluate_on

LONGEST = 8  # adaptation steps of a report's tasks, where meta-training unrolled as many
SEED = 1  # of the report's tasks; those of model selection have another one

UNADAPTED, BEFORE, AFTER = "batch statistics alone", "before meta-training", "after meta-training"


@dataclass(frozen=True)
class Drop:
    """Mean of paired differences between two ways of adapting, with its 95 % interval (Student's t)."""

    mean: float
    half_width: float

    @classmethod
    def between(cls, losses: Tensor, reference: Tensor) -> "Drop":
        """Of ``losses - reference``, both (tasks,): negative where the losses are lower."""
        difference = (losses - reference).double()
        count = len(difference)
        from scipy import stats  # here: half a second to load

        quantile = float(stats.t.ppf(0.975, count - 1))
        return cls(float(difference.mean()), quantile * float(difference.std()) / math.sqrt(count))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half_width:.4f}"

    def to_dict(self) -> dict[str, float]:
        """Mean and both ends of the interval."""
        return {"mean": self.mean, "low": self.mean - self.half_width, "high": self.mean + self.half_width}


@dataclass(frozen=True)
class MetaReport:
    """Meta-loss of each way of adapting on the same tasks."""

    steps: int  # K
    losses: dict[str, Tensor]  # (tasks,) by the name of the row; averaged over the positions of each task

    def drop(self, name: str) -> Drop:
        """Paired difference of a row to the policy before meta-training."""
        return Drop.between(self.losses[name], self.losses[BEFORE])

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, mean and paired difference of each row, for a table."""
        return [
            (name, f"{float(losses.mean()):.4f}", "" if name == BEFORE else str(self.drop(name)))
            for name, losses in self.losses.items()
        ]

    def log(self, monitor: Monitor, step: int) -> None:
        """Each row's mean as a scalar ``meta/report/<row>``, and the drop that meta-training brought."""
        for name, losses in self.losses.items():
            monitor.scalar(f"meta/report/{name.replace(' ', '_')}", losses.mean(), step)
        monitor.scalar("meta/report/drop", self.drop(AFTER).mean, step)

    def to_dict(self) -> dict[str, object]:
        """Primitives for a summary."""
        return {
            "tasks": len(self.losses[BEFORE]),
            "steps": self.steps,
            "shifts": list(shift_names(REPORT)),
            "meta_loss": {name: float(losses.mean()) for name, losses in self.losses.items()},
            "drop": {name: self.drop(name).to_dict() for name in self.losses if name != BEFORE},
        }


def report_on_unseen_tasks(
    trainer: MetaTrainer, before: AdaptationPolicy, after: AdaptationPolicy, *, tasks: int, adam_lr: float
) -> MetaReport:
    """Compare on tasks of the ``report`` family, which neither meta-training nor selection saw.

    Args:
        trainer: gives model, images and meta-loss.
        before: the policy before meta-training.
        after: the policy after it; Adam descends this one's objective, with its learned weights.
        tasks: number of tasks, at least 2.
        adam_lr: Adam's learning rate.
    """
    steps = min(LONGEST, trainer.config.steps)
    unseen = held_out_tasks(trainer.images, trainer.teach, trainer.config, shift_names(REPORT), tasks, steps, SEED)
    parts = {"batch_statistics": {}, "class_balance": after.part("class_balance") is not None}
    rival = MethodConfig("adam", update="adam", lr=adam_lr, objective_from_policy=True, parts=parts)
    adam = build_method(rival, policy=after)
    return MetaReport(
        steps,
        {
            UNADAPTED: unadapted_losses(trainer, unseen, before),
            BEFORE: trainer.evaluate(unseen, before),
            AFTER: trainer.evaluate(unseen, after),
            f"Adam at {adam_lr:g}": trainer.evaluate(unseen, adam),
        },
    )


@torch.no_grad()
def unadapted_losses(trainer: MetaTrainer, tasks: Sequence[Task], policy: AdaptationPolicy) -> Tensor:
    """Meta-loss of the source parameters under the policy's statistics, (tasks,): what not adapting costs."""
    means = []
    for task in tasks:
        scores = [
            trainer.meta_loss(evaluate_on(policy, trainer.model, trainer.parameters, batch.images), batch)
            for batch in (task[position] for position in range(1, len(task)))
        ]
        means.append(float(torch.stack(scores).mean()))
    return torch.tensor(means)
