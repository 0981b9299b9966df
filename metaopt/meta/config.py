"""Settings of meta-training."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from metaopt.errors import ConfigError
from metaopt.experts import LearnedExpertsConfig, TeacherConfig
from metaopt.generator import GeneratorConfig
from metaopt.inner_loop.backends import BACKENDS
from metaopt.inner_loop.unroll import UnrollConfig
from metaopt.meta.loss import META_LOSSES
from metaopt.meta.tasks import TaskConfig
from metaopt.policy import RestorationConfig
from metaopt.policy.balance import ClassBalance
from metaopt.policy.prior import DEFAULT_COUNT, LearnedPrior

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class MetaTrainConfig:
    """What is learned, on which tasks, and for how long. Times are counted in epochs of ``unrolls`` meta-updates."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    # Weight of each objective term at the start; learned with ``clean_teacher``.
    objective: dict[str, float] = field(default_factory=lambda: {"slr": 1.0, "diversity": 1.0})
    tasks: TaskConfig = field(default_factory=TaskConfig)
    unroll: UnrollConfig = field(default_factory=UnrollConfig)
    experts: LearnedExpertsConfig | None = None  # experts that adapt beside the norm layers; None: none
    teacher: TeacherConfig | None = None  # of the policy; its proximal loss holds the experts
    # How the source comes back where the stream shifts, at the start; learned. None: it never does.
    restoration: RestorationConfig | None = field(default_factory=RestorationConfig)
    carry: float = 0.5  # probability that a task begins where the one before it ended
    update_rate: float | None = None  # share of batches that the learned update gate may open at; None: no gate
    # Images for which the source's statistics count in each BatchNorm layer, at the start; learned. None: for none.
    prior: float | None = DEFAULT_COUNT
    initialization: bool = True  # whether the norm layers' first values are learned too
    initialization_lr: float = 3e-3  # peak of its own rate in the meta-optimizer
    initialization_decay: float = 0.03  # weight of the sum of squares of what it changes
    experts_decay: float = 0.01  # weight of the sum of squares of what experts hand on at the start
    experts_lr: float = 1e-3  # peak of the meta-optimizer's rate on gates and first values of experts
    balance: float | None = 1.0  # strength of the predictions' correction by what a batch holds as a whole; None: none
    rates: bool = False  # whether rates of what is kept of each layer are learned too, for any budget
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
    stride: float = 1.5
    shrinkage: float = 0.02  # weight of the mean square of the log step sizes
    frozen: tuple[str, ...] = ()  # parts of the policy that stay as they start (metaopt.inner_loop.PARTS)
    only: tuple[str, ...] | None = None  # parts that learn, all others stay as they start; None: all but the frozen
    selection_shifts: tuple[str, ...] = ("gamma", "posterise")
    selection_tasks: int = 4
    select_best: bool = True  # keep what does best on the selection tasks; else the last epoch
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value against its range."""
        choices = (("loss", META_LOSSES), ("backend", BACKENDS), ("schedule", SCHEDULES))
        for key, names in choices:
            value = getattr(self, key)
            if value not in names:
                raise ConfigError(f"meta.{key} is {value!r}; allowed are {', '.join(names)}: choose one")
        counts = ("steps", "first_steps", "epochs", "unrolls", "selection_tasks", "update_every")
        for key in counts:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"meta.{key} is {value}; it must be at least 1: set meta.{key}=1 or more")
        if self.rates and self.unroll.gradient != "first_order":
            raise ConfigError(
                f"meta.rates=true does not go with meta.gradient={self.unroll.gradient}; allowed is first_order: set "
                "meta.gradient=first_order"
            )
        if self.update_rate is not None and not 0 < self.update_rate < 1:
            raise ConfigError(
                f"meta.update_rate is {self.update_rate}; allowed are 0 < share < 1, or null for an update on every "
                "batch: set for example 0.5"
            )
        if self.update_rate is not None and self.unroll.gradient != "first_order":
            raise ConfigError(
                f"meta.update_rate does not go with meta.gradient={self.unroll.gradient}; allowed is first_order: set "
                "meta.gradient=first_order"
            )
        if self.prior is not None:
            LearnedPrior((), self.prior)  # checks its own range
        if self.balance is not None:
            ClassBalance(self.balance)  # checks its own range
        if not 0 <= self.carry <= 1:
            raise ConfigError(f"meta.carry is {self.carry}; a probability lies in [0, 1]: set for example 0.5")
        if self.objective.get("teacher", 0) > 0 and self.teacher is None:
            raise ConfigError(
                "objective.teacher is set and there is no teacher; allowed without one are all other terms: set "
                "recipe=experts, which has one, or objective.teacher=0"
            )
        if not self.selection_shifts:
            raise ConfigError(
                "meta.selection_shifts is empty; at least one shift is needed to choose the best epoch on: set "
                "meta.selection_shifts=[gamma,posterise]"
            )
        for key in ("lr", "initialization_lr", "experts_lr", "clip_norm", "stride"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"meta.{key} is {value}; it must be positive and finite: set for example 0.01")
        for key in ("shrinkage", "initialization_decay", "experts_decay"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"meta.{key} is {value}; it must be finite and 0 or more: set for example 0.02")
        if not 0 <= self.curriculum <= 1:
            raise ConfigError(f"meta.curriculum is {self.curriculum}; a share lies in [0, 1]: set for example 0.5")

    @property
    def total_unrolls(self) -> int:
        """Unrolls of the whole training."""
        return self.epochs * self.unrolls

    def steps_at(self, epoch: int) -> int:
        """K in epoch ``epoch`` (from 0): grows linearly from ``first_steps`` to ``steps``."""
        first = min(self.first_steps, self.steps)
        ramp = max(1, round(self.curriculum * self.epochs))
        return first + round((self.steps - first) * min(1.0, epoch / ramp))

    def scores(self, epoch: int) -> bool:
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
        values = asdict(self)
        values["generator"] = self.generator.to_dict()
        values["tasks"]["strength"] = list(self.tasks.strength)
        values["selection_shifts"] = list(self.selection_shifts)
        values["frozen"] = list(self.frozen)
        values["only"] = None if self.only is None else list(self.only)
        values["experts"] = None if self.experts is None else self.experts.to_dict()
        return values
