"""What each command can be told: one dataclass for each file at the top of ``configs/``, checked when it is made.

The YAML files hold the values and say which settings exist; these classes hold their types and ranges.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from metaopt.activation_memory import Precision
from metaopt.configs.sections import (
    PRUNINGS,
    DataSection,
    GeneratorSection,
    MetaSection,
    MethodSection,
    ModelSection,
    SourceSection,
    check_at_least,
    check_one_of,
    check_positive,
    check_weights,
)
from metaopt.errors import ConfigError

SETTINGS = ("reset", "continual")
MEMORIES = ("dense", "exact", "compact", "pruned")
TRANSFERS = ("generator",)
BUDGETED = ("compact", "pruned")  # memories that have something to choose


def _needs(condition: bool, key: str, why: str, fix: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is not set; {why}: {fix}")


def check_memory(memory: str | None, budget_mib: float | None, key: str = "budget_mib") -> str:
    """The memory that is meant: a budget without one prunes. Refuses what does not go together."""
    if memory is None:
        memory = "dense" if budget_mib is None else "pruned"
    check_one_of("memory", memory, MEMORIES)
    check_positive(key, budget_mib)
    if budget_mib is not None and memory not in BUDGETED:
        raise ConfigError(
            f"{key}={budget_mib:g} does not go with memory={memory}, which leaves no choice; allowed are "
            f"{', '.join(BUDGETED)}: set memory=pruned"
        )
    return memory


def check_transfer(transfer: str | None) -> None:
    """Refuse what cannot be transferred."""
    if transfer is not None:
        check_one_of("transfer", transfer, TRANSFERS)


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
        fix = "add --policy PATH" if method.name == "policy" else "add policy_path=PATH"  # --policy sets the method too
        _needs(given, "policy_path", f"method {method.name} needs a meta-trained policy", fix)


@dataclass
class MetaTrainSettings:
    """Settings of ``pretrain/meta_train.py``."""

    model: ModelSection
    data: DataSection
    source: SourceSection
    generator: GeneratorSection
    objective: dict[str, float]  # weight of each term at the start; 0 leaves it out
    experts: dict[str, Any] | None  # settings of metaopt.experts.LearnedExpertsConfig; None: no experts
    teacher: dict[str, Any] | None  # settings of metaopt.experts.TeacherConfig; None: no teacher
    meta: MetaSection
    n_unlabeled: int
    batch_size: int
    memory: str
    seed: int
    device: str
    out: str | None  # set when the settings are made: see the YAML file
    resume: str | None
    start: str | None  # a policy whose learned parts training begins with; None: the published rules
    stop_after: int | None  # epochs in this run; None: to the end

    def __post_init__(self) -> None:
        """Check each value and what they need of one another; a run that goes on stays in its folder."""
        if self.out is None:
            new = f"runs/meta_train/{datetime.now():%Y-%m-%d_%H-%M-%S}"
            self.out = new if self.resume is None else str(Path(self.resume).parent)
        check_weights("objective", self.objective)
        check_one_of("memory", self.memory, MEMORIES)
        for key, least in (("n_unlabeled", 2), ("batch_size", 2), ("seed", 0), ("stop_after", 1)):
            check_at_least(key, getattr(self, key), least)
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
    transfer: str | None  # what of a policy of another model is used; None: such a policy is refused
    setting: str
    n_unlabeled: int
    batch_size: int
    memory: str | None  # None: dense, and with a budget pruned
    budget_mib: float | None  # bound on what is held for backward
    seed: int
    device: str
    out: str

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        check_one_of("setting", self.setting, SETTINGS)
        check_transfer(self.transfer)
        self.memory = check_memory(self.memory, self.budget_mib)
        for key, least in (("n_unlabeled", 2), ("batch_size", 1), ("seed", 0)):
            check_at_least(key, getattr(self, key), least)
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
    transfer: str | None  # as in OnlineSettings
    settings: list[str]
    rates: list[float]  # learning rates of every method with Adam or SGD, a row for each; empty: method.NAME.lr
    seeds: list[int]
    n_unlabeled: int
    batch_size: int
    memory: str | None  # None: dense, and with a budget pruned
    budgets: list[float]  # a row for each, of every method that updates; empty: no bound
    pruning: list[str]  # a row for each rule, of every method that updates; empty: method.NAME.pruning
    device: str
    out: str

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        check_transfer(self.transfer)
        for name in self.methods:
            check_one_of("methods", name, tuple(self.method))
        for setting in self.settings:
            check_one_of("settings", setting, SETTINGS)
        for key, rows in (("methods", self.methods), ("settings", self.settings), ("seeds", self.seeds)):
            if not rows:
                raise ConfigError(f"{key}=[] is empty; at least one is needed: leave {key} out for the default")
        self.memory = check_memory(self.memory, self.budgets[0] if self.budgets else None, "budgets")
        for budget in self.budgets:
            check_memory(self.memory, budget, "budgets")
        for rule in self.pruning:
            check_one_of("pruning", rule, PRUNINGS)
        if self.pruning and self.memory != "pruned":
            raise ConfigError(
                f"pruning=[{', '.join(self.pruning)}] does not go with memory={self.memory}; rules choose for "
                "memory=pruned alone: set memory=pruned"
            )
        for key, value, least in (("n_unlabeled", self.n_unlabeled, 2), ("batch_size", self.batch_size, 1)):
            check_at_least(key, value, least)
        for seed in self.seeds:
            check_at_least("seeds", seed, 0)
        for rate in self.rates:
            check_positive("rates", rate)
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
        check_at_least("seed", self.seed, 0)


@dataclass
class FootprintSettings:
    """Settings of ``adapt/footprint.py``."""

    model: ModelSection  # without a checkpoint: random weights
    method: MethodSection
    images: str | None  # (N, H, W, 3) uint8 .npy; None: noise
    bits: list[int]  # a row of memory=compact for each
    budgets: list[float]  # a row of memory=pruned for each, MiB
    repeats: int
    batch_size: int
    seed: int
    device: str

    def __post_init__(self) -> None:
        """Check each value."""
        for bits in self.bits:
            Precision(bits)  # refuses what it does not know
        for budget in self.budgets:
            check_positive("budgets", budget)
        for key, least in (("repeats", 1), ("batch_size", 1), ("seed", 0)):
            check_at_least(key, getattr(self, key), least)
        if self.method.update == "none" or self.method.needs_policy:
            raise ConfigError(
                f"method={self.method.name} is not one whose step can be measured without a policy; allowed are those "
                "with update adam or sgd: set method=tent"
            )
