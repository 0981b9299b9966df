"""It learns: the meta-loss on fixed tasks of unseen shifts falls, paired, beyond the interval of chance."""

import math

import pytest
import torch

from metaopt.data import load_digits
from metaopt.data.shifts import REPORT, shift_names
from metaopt.meta import MetaTrainer, Task
from metaopt.meta import trainer as module
from metaopt.meta.selection import held_out_tasks
from metaopt.optimizers.mgg import GeneratorConfig
from metaopt.policy import MethodConfig, build_method

from ..tiny import small_digits, tiny_config, trained_model

STUDENT_T = 2.262  # 97.5 % quantile at 9 degrees of freedom


def unseen_tasks(trainer: MetaTrainer) -> list[Task]:
    """Ten fixed ones."""
    return held_out_tasks(trainer.images, trainer.teach, trainer.config, shift_names(REPORT), 10, 4, seed=1)


def paired_drop(trainer: MetaTrainer) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of after minus before, on ten fixed tasks."""
    tasks = unseen_tasks(trainer)
    before = trainer.evaluate(tasks)
    difference = trainer.evaluate(tasks, trainer.run()) - before
    assert torch.equal(trainer.evaluate(tasks, trainer.best_policy()) - before, difference)  # the tasks are fixed
    return float(difference.mean()), STUDENT_T * float(difference.std()) / math.sqrt(10)


def digits_trainer(variant: str, loss: str, rate: float, seed: int = 0) -> MetaTrainer:
    """From a base rate that is far off, so that there is something to learn in a second."""
    config = tiny_config(
        generator=GeneratorConfig(variant=variant, lr=rate),
        batch_size=32,
        translate=1,
        unrolls=6,
        selection_tasks=2,
        select_best=False,
        loss=loss,
        lr=0.1,
        seed=seed,
    )
    return MetaTrainer(trained_model(), small_digits(load_digits().unlabeled), None, config)


@pytest.mark.parametrize(
    ("variant", "loss", "rate", "seed"),
    [
        ("residual", "clean_teacher", 0.2, 0),
        ("step_sizes", "clean_teacher", 0.2, 0),
        ("published", "clean_teacher", 0.2, 1),  # a random start that does harm at this rate
        ("residual", "unsupervised", 1e-3, 0),
    ],
)
def test_the_meta_loss_falls_on_unseen_shifts(variant: str, loss: str, rate: float, seed: int) -> None:
    trainer = digits_trainer(variant, loss, rate, seed)
    mean, half_width = paired_drop(trainer)
    assert mean + half_width < 0
    assert trainer.progress.skipped == 0 and trainer.progress.updates == 12


def test_uphill_the_meta_loss_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    def uphill(*args, **kwargs):
        result = descend(*args, **kwargs)
        result.gradients = {name: -gradient for name, gradient in result.gradients.items()}
        return result

    descend = module.meta_gradient
    monkeypatch.setattr(module, "meta_gradient", uphill)
    mean, half_width = paired_drop(digits_trainer("residual", "unsupervised", 1e-3))
    assert mean - half_width > 0


def test_the_best_policy_adapts_better_than_batch_statistics_alone() -> None:
    trainer = digits_trainer("residual", "clean_teacher", 5e-3)
    tasks = unseen_tasks(trainer)
    adapted = trainer.evaluate(tasks, trainer.run())
    alone = trainer.evaluate(tasks, build_method(MethodConfig("bn", parts={"batch_statistics": True})))
    assert float((adapted - alone).mean()) < 0
