"""Groups of settings: what the files in the folders under ``configs/`` say, with types and ranges.

Values that belong to one part alone (a generator's clamp, a corruption's name) are checked by that part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from metaopt.errors import ConfigError
from metaopt.experts import ExpertsConfig, TeacherConfig
from metaopt.policy import MethodConfig
from metaopt.policy.prior import DEFAULT_COUNT

UPDATES = ("none", "adam", "sgd", "generator")
PARTS = ("stream", "source")
PRUNINGS = ("published", "single_pass", "rate_distortion", "uniform", "random", "learned")


def check_one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise ConfigError(f"{key}={value} is unknown; allowed are {', '.join(allowed)}: choose one")


def check_at_least(key: str, value: float | None, least: float) -> None:
    """Refuse a number below ``least``; None passes."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{key}={value} is out of range; allowed are values of at least {least}: set {key}={least}")


def check_positive(key: str, value: float | None) -> None:
    """Refuse a number that is not positive and finite; None passes."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}={value} is out of range; allowed are finite values above 0: for example {key}=0.001")


def check_weights(key: str, weights: dict[str, float]) -> None:
    """Refuse weights that are negative or not finite."""
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"{key}.{name}={value} is out of range; allowed are finite weights of at least 0: set 0 to leave it out"
            )


@dataclass
class ModelSection:
    """The source model: a name in timm's registry and, unless the data are the digits, its weights."""

    name: str
    checkpoint: str | None = None
    num_classes: int | None = None  # None: as many as the architecture's default

    def __post_init__(self) -> None:
        """Check the range of each value."""
        check_at_least("model.num_classes", self.num_classes, 2)


@dataclass
class DataSection:
    """The stream of shifted images; each source of data has some of these settings."""

    name: str
    corruptions: list[str] | None = None  # None: the fifteen test corruptions
    severities: list[float] = field(default_factory=lambda: [5.0])
    limit: int | None = None  # images of each corruption; None: all
    root: str | None = None  # folder of a CIFAR-C set
    images: str | None = None  # (N, H, W, 3) uint8 .npy
    labels: str | None = None  # (N,) .npy; None: nothing is scored
    passes: int = 1  # times that the whole stream is met
    part: str = "stream"  # of the digits: the held-out ones, or "source", the labelled training images

    def __post_init__(self) -> None:
        """Check the range of each value."""
        check_one_of("data.part", self.part, PARTS)
        check_at_least("data.limit", self.limit, 1)
        check_at_least("data.passes", self.passes, 1)
        if not self.severities:
            raise ConfigError("data.severities=[] is empty; allowed are values in (0, 5]: set data.severities=[5]")
        for severity in self.severities:
            if not 0 < severity <= 5:
                raise ConfigError(
                    f"data.severities has {severity}; allowed are values in (0, 5]: set for example data.severities=[5]"
                )


@dataclass
class SourceSection:
    """Clean unlabeled images of the source domain, and the folder where the digits' source models are kept."""

    images: str | None = None  # (N, H, W, 3) uint8 .npy; None: the digits' own unlabeled part
    cache: str = "runs/source"


@dataclass
class MethodSection:
    """One way of adapting online, as a composition of parts."""

    name: str
    batch_statistics: bool = False  # BatchNorm normalises by the batch
    update: str = "none"
    lr: float | None = None  # None: the policy's own
    objective: dict[str, float] = field(default_factory=dict)  # weight of each term; none above 0: the policy's own
    objective_from_policy: bool = False  # with policy_path, take its objective with the learned weights
    pruning: str = "rate_distortion"  # the rule of memory=pruned
    restoration: bool = False  # bring the source back where the stream shifts
    prior: float | None = None  # images for which the source's statistics count; None: the policy's, or none
    balance: float | None = None  # strength of the predictions' correction; None: the policy's, or none
    initialization: bool = False  # start where the policy has learned to; else at the source's values
    update_every: int | None = None  # a domain's batches from one update to the next; None: the policy's gate, else 1
    betas: list[float] | None = None  # of Adam; None: its default
    adapts: str = "norm"  # which tensors change
    experts: dict[str, Any] | None = None  # settings of metaopt.experts.ExpertsConfig; None: no experts
    teacher: dict[str, Any] | None = None  # settings of metaopt.experts.TeacherConfig; None: no teacher
    predict_with: str = "student"

    def __post_init__(self) -> None:
        """Check the range of each value."""
        check_one_of("method.update", self.update, UPDATES)
        check_at_least("method.update_every", self.update_every, 1)
        check_one_of("method.pruning", self.pruning, PRUNINGS)
        check_positive("method.lr", self.lr)
        check_weights("method.objective", self.objective)
        self.config()

    def config(self) -> MethodConfig:
        """The method in the library's own terms, which check what belongs to one part alone.

        Raises:
            ConfigError: a value is out of range, or does not go with another.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return MethodConfig(
            **values
            | {
                "betas": None if self.betas is None else tuple(self.betas),
                "experts": None if self.experts is None else ExpertsConfig.from_dict(self.experts),
                "teacher": None if self.teacher is None else TeacherConfig.from_dict(self.teacher),
            }
        )

    @property
    def needs_policy(self) -> bool:
        """Whether the method cannot run without a meta-trained policy."""
        return self.update == "generator" or self.initialization


@dataclass
class GeneratorSection:
    """The gradient generator that is meta-trained; its own class checks the ranges."""

    variant: str
    lr: float
    hidden: int = 8
    clamp: float = 3.0


@dataclass
class MetaSection:
    """How the policy is meta-trained; :mod:`metaopt.meta` explains the settings and checks the ranges."""

    loss: str
    tempered: bool
    gradient: str
    backend: str
    steps: int
    first_steps: int
    curriculum: float
    truncation: int | None
    term_steps: int | None
    update_every: int | None
    epochs: int
    unrolls: int
    lr: float
    schedule: str
    clip_norm: float
    shrinkage: float
    shifts: list[str]
    strength: list[float]
    composed: float
    occlusion: float
    flip: bool | None
    translate: int
    clean_view: str
    selection_shifts: list[str]
    selection_tasks: int
    select_best: bool
    report_tasks: int
    report_adam_lr: float
    restoration: bool = True
    carry: float = 0.5
    prior: float | None = DEFAULT_COUNT
    balance: float | None = 1.0
    initialization: bool = True
    initialization_lr: float = 3e-3
    stride: float = 1.5
    experts_lr: float = 1e-3
    experts_decay: float = 0.01
    initialization_decay: float = 0.03
    update_rate: float | None = None
    rates: bool = False
    noise_price: float = 5.0
    frozen: list[str] = field(default_factory=list)
    only: list[str] | None = None

    def __post_init__(self) -> None:
        """Check what no other part checks."""
        if len(self.strength) != 2:
            raise ConfigError(f"meta.strength={self.strength} is not allowed; it takes two values: set [0.5,5]")
        if self.report_tasks != 0:
            check_at_least("meta.report_tasks", self.report_tasks, 2)
        check_positive("meta.report_adam_lr", self.report_adam_lr)
