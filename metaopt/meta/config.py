"""Settings of meta-training."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from metaopt.errors import ConfigError, check_one_of, check_positive, check_range
from metaopt.meta.loss import META_LOSSES
from metaopt.meta.task_config import TaskConfig
from metaopt.meta.unroll import UnrollConfig
from metaopt.optimizers.backends import BACKENDS
from metaopt.optimizers.mgg import GeneratorConfig
from metaopt.policy.method import MethodConfig
from metaopt.policy.untrained import DEFAULT_PARTS

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class MetaTrainConfig(TaskConfig, UnrollConfig):
    """What is learned, on which tasks, and for how long. Times are counted in epochs of ``unrolls`` meta-updates.

    How tasks are drawn and how the meta-gradient is taken are settings of it too (`TaskConfig`, `UnrollConfig`).
    """

    clean: float = 0.15  # these three in place of the plain tasks of `TaskConfig`: streams change and mix domains
    alternating: float = 0.15
    mixed: float = 0.15
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    # Weight of each objective term at the start; learned with ``clean_teacher``.
    objective: dict[str, float] = field(default_factory=lambda: {"slr": 1.0, "diversity": 1.0})
    parts: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_PARTS))  # as metaopt.policy.MethodConfig.parts
    layers: tuple[str, ...] | None = None  # as metaopt.policy.MethodConfig.layers
    continued: float = 0.5  # probability that a task begins where the one before it ended, of a policy with restoration
    loss: str = "clean_teacher"
    tempered: bool = True  # whether the clean teacher is compared at the best temperature
    backend: str = "func"
    steps: int = 8  # K, the longest unroll
    first_steps: int = 2  # K at the start of the curriculum
    curriculum: float = 0.5  # share of the epochs over which K grows
    update_every: int | None = None  # meta-update after so many steps of a running unroll; None: after the whole of it
    epochs: int = 10
    unrolls: int = 12  # in an epoch
    lr: float = 3e-2  # of the meta-optimizer, Adam
    schedule: str = "cosine"  # of that rate: "cosine" falls to a tenth, "constant" stays
    clip_norm: float = 1.0  # largest norm of the meta-gradient
    # Factor of the learned step sizes in the policy that is handed back: on images that it was trained on, shorter
    # steps look better than they are on others.
    deploy_step_scale: float = 1.5
    shrinkage: float = 0.02  # weight of the mean square of the log step sizes
    frozen: tuple[str, ...] = ()  # what stays as it starts: generator, objective, a part, or "gates" of the experts
    only: tuple[str, ...] | None = None  # what learns on top of a trained policy; None: all but the frozen
    shifts: tuple[str, ...] | None = None  # registered names; None: those of the families meta and wide
    selection_shifts: tuple[str, ...] = ("gamma", "posterise")
    selection_tasks: int = 4
    select_best: bool = True  # keep what does best on the selection tasks; else the last epoch
    report_tasks: int = 16  # unseen tasks of the closing table; 0: no table
    report_adam_lr: float = 0.01  # of the Adam that the table compares with
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value against its range."""
        TaskConfig.__post_init__(self)
        UnrollConfig.__post_init__(self)
        for key, names in (("loss", META_LOSSES), ("backend", BACKENDS), ("schedule", SCHEDULES)):
            check_one_of(f"meta.{key}", getattr(self, key), names)
        for key in ("steps", "first_steps", "epochs", "unrolls", "selection_tasks", "update_every"):
            if getattr(self, key) is not None:
                check_range(f"meta.{key}", getattr(self, key), 1, example="1")
        for key in ("lr", "clip_norm", "deploy_step_scale", "report_adam_lr"):
            check_positive(f"meta.{key}", getattr(self, key), "0.01")
        check_range("meta.shrinkage", self.shrinkage, 0, example="0.02")
        check_range("meta.continued", self.continued, 0, 1, example="0.5")
        check_range("meta.curriculum", self.curriculum, 0, 1, example="0.5")
        check_range("seed", self.seed, 0, example="0")
        if self.report_tasks != 0:
            check_range("meta.report_tasks", self.report_tasks, 2, example="16")
        if not self.selection_shifts:
            raise ConfigError(
                "meta.selection_shifts is empty; at least one shift is needed to choose the best epoch on: set "
                "meta.selection_shifts=[gamma,posterise]"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        parts = MethodConfig("policy", objective=self.objective, parts=self.parts, layers=self.layers).named_parts()
        for name, learned in (("update_gate", self.gate_share is not None), ("pruning", self.learns_precision)):
            if learned and self.gradient != "first_order":
                raise ConfigError(
                    f"parts.{name} does not go with meta.gradient={self.gradient}; allowed is first_order: set "
                    "meta.gradient=first_order"
                )
        if self.objective.get("teacher", 0) > 0 and "teacher" not in parts:
            raise ConfigError(
                "objective.teacher is set and there is no teacher; allowed without one are all other terms: set "
                "recipe=experts, which has one, or objective.teacher=0"
            )

    def _setting(self, part: str, name: str) -> Any:
        """A setting of a part; None without it."""
        found = MethodConfig("policy", parts=self.parts).named_parts().get(part)
        return None if found is None else getattr(found[1], name)

    @property
    def gate_share(self) -> float | None:
        """Share of the batches that the learned update gate may open at; None without one."""
        return self._setting("update_gate", "share")

    @property
    def learns_precision(self) -> bool:
        """Whether what is kept of each layer's activations is learned too, for any budget."""
        return self._setting("pruning", "allocation") == "learned"

    @property
    def balance(self) -> float | None:
        """Strength with which predictions are corrected by what a batch holds; None: they are not."""
        return self._setting("class_balance", "strength")

    @property
    def continues(self) -> float:
        """Probability that a task begins where the one before it ended."""
        return self.continued if self._setting("restoration", "base") is not None else 0.0

    @property
    def total_unrolls(self) -> int:
        """Unrolls of the whole training."""
        return self.epochs * self.unrolls

    def steps_at(self, epoch: int) -> int:
        """K in epoch ``epoch`` (from 0): grows linearly from ``first_steps`` to ``steps``."""
        first = min(self.first_steps, self.steps)
        ramp = max(1, round(self.curriculum * self.epochs))
        return first + round((self.steps - first) * min(1.0, epoch / ramp))

    def is_scored(self, epoch: int) -> bool:
        """Whether model selection looks at the weights after ``epoch`` epochs: those of the start and of full length.

        What was trained on shorter unrolls has not met what it is for, and an update gate has not met its price.
        """
        return epoch in (0, self.epochs) or self.steps_at(epoch - 1) == self.steps_at(self.epochs - 1)

    def rate_share(self, epoch: int, unroll: int) -> float:
        """Share of the rates that is left at an unroll of an epoch (from 0): with "cosine", a tenth at the end."""
        if self.schedule == "constant":
            return 1.0
        done = (epoch * self.unrolls + unroll) / self.total_unrolls
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """Primitives, to compare and to store."""
        return asdict(self)
