"""What each command can be told: one dataclass for each file at the top of ``configs/``, checked when it is made.

The YAML files hold the values and say which settings exist; these classes hold their types and ranges. Values that
belong to one part alone (a generator's clamp, a corruption's name) are checked by that part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from metaopt.errors import ConfigError

SETTINGS = ("reset", "continual")
MEMORIES = ("dense",)
UPDATES = ("none", "adam", "sgd", "generator")
PARTS = ("stream", "source")


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} is unknown; allowed are {', '.join(allowed)}: choose one")


def _at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{key}={value} is out of range; allowed are values of at least {least}: set {key}={least}")


def _positive(key: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}={value} is out of range; allowed are finite values above 0: for example {key}=0.001")


def _weights(key: str, weights: dict[str, float]) -> None:
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
        _at_least("model.num_classes", self.num_classes, 2)


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
    part: str = "stream"  # of the digits: the held-out ones, or "source", the labelled training images

    def __post_init__(self) -> None:
        """Check the range of each value."""
        _one_of("data.part", self.part, PARTS)
        _at_least("data.limit", self.limit, 1)
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
    objective: dict[str, float] = field(default_factory=dict)  # weight of each term; empty: the policy's own
    objective_from_policy: bool = False  # with policy_path, take its objective with the learned weights

    def __post_init__(self) -> None:
        """Check the range of each value."""
        _one_of("method.update", self.update, UPDATES)
        _positive("method.lr", self.lr)
        _weights("method.objective", self.objective)

    @property
    def needs_policy(self) -> bool:
        """Whether the method cannot run without a meta-trained policy."""
        return self.update == "generator"


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

    def __post_init__(self) -> None:
        """Check what no other part checks."""
        if len(self.strength) != 2:
            raise ConfigError(f"meta.strength={self.strength} is not allowed; it takes two values: set [0.5,5]")
        if self.report_tasks != 0:
            _at_least("meta.report_tasks", self.report_tasks, 2)
        _positive("meta.report_adam_lr", self.report_adam_lr)


def _needs(condition: bool, key: str, why: str, fix: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is not set; {why}: {fix}")


def _check_source_images(data: DataSection, source: SourceSection) -> None:
    _needs(
        data.name == "digits" or source.images is not None,
        "source.images",
        f"data={data.name} has no clean unlabeled images of its own",
        "set source.images=PATH to a .npy file of (N, H, W, 3) uint8 images",
    )


def _check_model(data: DataSection, model: ModelSection) -> None:
    _needs(
        data.name == "digits" or model.checkpoint is not None,
        "model.checkpoint",
        "source models are trained here for data=digits alone",
        "set model.checkpoint=PATH to the model's weights",
    )


def _check_data(data: DataSection) -> None:
    if data.name == "arrays":
        _needs(data.images is not None, "data.images", "data=arrays reads .npy files", "set data.images=PATH")
    if data.name == "cifar_c":
        _needs(data.root is not None, "data.root", "data=cifar_c reads a folder", "set data.root=PATH")


def _check_policy(method: MethodSection, given: bool) -> None:
    if method.needs_policy:
        _needs(given, "policy_path", f"method {method.name} runs a meta-trained policy", "add --policy PATH")


@dataclass
class MetaTrainSettings:
    """Settings of ``pretrain/meta_train.py``."""

    model: ModelSection
    data: DataSection
    source: SourceSection
    generator: GeneratorSection
    objective: dict[str, float]  # weight of each term at the start; 0 leaves it out
    meta: MetaSection
    n_unlabeled: int
    batch_size: int
    memory: str
    seed: int
    device: str
    out: str | None  # set when the settings are made: see the YAML file
    resume: str | None
    stop_after: int | None  # epochs in this run; None: to the end

    def __post_init__(self) -> None:
        """Check each value and what they need of one another; a run that goes on stays in its folder."""
        if self.out is None:
            new = f"runs/meta_train/{datetime.now():%Y-%m-%d_%H-%M-%S}"
            self.out = new if self.resume is None else str(Path(self.resume).parent)
        _weights("objective", self.objective)
        _one_of("memory", self.memory, MEMORIES)
        for key, least in (("n_unlabeled", 2), ("batch_size", 2), ("seed", 0), ("stop_after", 1)):
            _at_least(key, getattr(self, key), least)
        _check_model(self.data, self.model)
        _check_source_images(self.data, self.source)


@dataclass
class OnlineSettings:
    """Settings of ``adapt/online.py``."""

    model: ModelSection
    data: DataSection
    source: SourceSection
    method: MethodSection
    policy_path: str | None
    setting: str
    n_unlabeled: int
    batch_size: int
    memory: str
    seed: int
    device: str
    out: str

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        _one_of("setting", self.setting, SETTINGS)
        _one_of("memory", self.memory, MEMORIES)
        for key, least in (("n_unlabeled", 2), ("batch_size", 1), ("seed", 0)):
            _at_least(key, getattr(self, key), least)
        _check_model(self.data, self.model)
        _check_data(self.data)
        _check_policy(self.method, bool(self.policy_path))


@dataclass
class BenchmarkSettings:
    """Settings of ``adapt/benchmark.py``."""

    model: ModelSection
    data: DataSection
    source: SourceSection
    method: dict[str, MethodSection]  # settings of each method by its name
    methods: list[str]  # the rows; a method with a policy has one row for each policy
    policy_path: list[str]
    settings: list[str]
    rates: list[float]  # learning rates of every method with Adam or SGD, a row for each; empty: method.NAME.lr
    seeds: list[int]
    n_unlabeled: int
    batch_size: int
    memory: str
    device: str
    out: str

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        for name in self.methods:
            _one_of("methods", name, tuple(self.method))
        for setting in self.settings:
            _one_of("settings", setting, SETTINGS)
        for key, rows in (("methods", self.methods), ("settings", self.settings), ("seeds", self.seeds)):
            if not rows:
                raise ConfigError(f"{key}=[] is empty; at least one is needed: leave {key} out for the default")
        _one_of("memory", self.memory, MEMORIES)
        for key, value, least in (("n_unlabeled", self.n_unlabeled, 2), ("batch_size", self.batch_size, 1)):
            _at_least(key, value, least)
        for seed in self.seeds:
            _at_least("seeds", seed, 0)
        for rate in self.rates:
            _positive("rates", rate)
        _check_model(self.data, self.model)
        _check_data(self.data)
        for name in self.methods:
            _check_policy(self.method[name], bool(self.policy_path))


@dataclass
class SourceSettings:
    """Settings of ``pretrain/source.py``."""

    model: ModelSection
    seed: int
    device: str
    cache: str

    def __post_init__(self) -> None:
        """Check the range of each value."""
        _at_least("seed", self.seed, 0)
