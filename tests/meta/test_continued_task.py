"""Tasks that begin where another ended."""

import math

from metaopt.meta import MetaTrainer
from metaopt.optimizers.mgg import GradientGenerator

from ..tiny import random_images, tiny_config, tiny_model


def test_nothing_goes_on_from_a_task_that_ended_in_numbers_that_are_not_finite() -> None:
    trainer = MetaTrainer(tiny_model(), random_images(32), None, tiny_config(continued=1.0, epochs=1, unrolls=3))
    rule = trainer.policy.rule
    assert isinstance(rule, GradientGenerator) and rule.log_step_sizes is not None
    sizes = rule.log_step_sizes.data
    fine: list[bool] = []

    def after(loss: float) -> None:
        fine.append(math.isfinite(loss))
        sizes.zero_()

    sizes.fill_(1e3)  # beyond what floats hold
    trainer.run(on_unroll=after)
    assert fine == [False, True, True]
    assert trainer.progress.skipped == 1
