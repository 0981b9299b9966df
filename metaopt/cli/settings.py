"""What each command can be told: one dataclass for each file at the top of ``configs/``, checked when it is made.

Methods, meta-training and sources of data are the library's own dataclasses, which have their defaults and ranges.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from metaopt.activation_memory import ALLOCATIONS, MemoryConfig, Precision
from metaopt.data.arrangements import settings_of
from metaopt.data.readers import READERS
from metaopt.errors import ConfigError, check_one_of, check_positive, check_range
from metaopt.meta import MetaTrainConfig
from metaopt.online import SETTINGS
from metaopt.online.compute_dial import ComputeDial, holds_nothing
from metaopt.policy import MethodConfig
from metaopt.policy.parts.pruning import LEARNED
from metaopt.settings import PathSetting, build

TRANSFERS = ("generator",)


@dataclass
class ModelSettings:
    """The source model: a name in timm's registry and, unless the data are the digits, its weights."""

    name: str
    checkpoint: PathSetting | None = None
    num_classes: int | None = None  # of the checkpoint; None: as many as the architecture's default
    # Logits that are kept, by their index; labels count within them. None: all.
    classes: list[int] | None = None

    def __post_init__(self) -> None:
        """Check the class count."""
        if self.num_classes is not None:
            check_range("model.num_classes", self.num_classes, 2, example="10")


@dataclass
class SourceSettings:
    """Clean unlabeled images of the source domain, and the folder where the digits' source models are kept."""

    images: PathSetting | None = None  # (N, H, W, 3) uint8 .npy; None: those that the data have
    cache: PathSetting = "runs/source"


@dataclass
class Common:
    """What most commands can be told."""

    model: ModelSettings
    data: Any  # settings of the reader that data.name names
    source: SourceSettings
    n_unlabeled: int = 128  # clean images that are used
    device: str = "cpu"  # or auto, cuda, cuda:1, mps

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        values = dict(self.data)
        name = values.pop("name", None)
        check_one_of("data", name, READERS)
        self.data = build(READERS[name], values, "data")
        check_range("n_unlabeled", self.n_unlabeled, 2, example="128")
        if not self.data.has_clean_images and self.model.checkpoint is None:
            raise ConfigError(
                "model.checkpoint is not set; source models are trained here for data=digits alone: set "
                "model.checkpoint=PATH to the model's weights"
            )


@dataclass
class SpeedSettings(Common):
    """Settings of ``pretrain/speed.py``, which measures a meta-training."""

    LIFTED: ClassVar[Mapping[str, str]] = {
        key: "meta" for key in ("batch_size", "seed", "generator", "objective", "parts", "layers")
    }
    """Settings that stand at the top, but belong to a group."""

    meta: MetaTrainConfig = field(default_factory=MetaTrainConfig)

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        super().__post_init__()
        check_range("batch_size", self.meta.batch_size, 2, example="64")
        if not self.data.has_clean_images and self.source.images is None:
            self.data.clean_images()  # says why not


@dataclass
class MetaTrainSettings(SpeedSettings):
    """Settings of ``pretrain/meta_train.py``."""

    out: PathSetting | None = None  # None: a new runs/meta_train/DATE, and with resume, the folder of that file
    resume: PathSetting | None = None  # last.pt of a run that was stopped
    start: PathSetting | None = None  # policy whose learned parts training begins with; None: the published rules
    stop_after: int | None = None  # epochs in this run; None: to the end

    def __post_init__(self) -> None:
        """Check each value and what they need of one another; a run that goes on stays in its folder."""
        super().__post_init__()
        if self.out is None and self.resume is not None:
            self.out = str(Path(self.resume).parent)
        if self.stop_after is not None:
            check_range("stop_after", self.stop_after, 1, example="1")


@dataclass
class OnlineSettings(Common):
    """Settings of ``adapt/online.py``."""

    method: MethodConfig = field(default_factory=lambda: MethodConfig("source"))
    policy_path: PathSetting | None = None  # --policy X is short for policy_path=X method=policy
    transfer: str | None = None  # generator: a policy of another model runs on this one, with what fits
    setting: str = "reset"  # before each corruption; or continual: never
    stream: Any = field(default_factory=lambda: {"name": "shuffled"})  # how its images are arranged, with settings
    batch_size: int = 64
    memory: str | None = None  # None: dense, and with a budget pruned
    budget_mib: float | None = None  # bound on what is held for backward; 0: no update is made
    compute: float | None = None  # forward passes a batch in the mean, counted; 1: no update is made, 3: all are
    compile: bool = False  # run the network by torch.compile
    gather: int | None = None  # images that an update is made on at least; None: half of the policy's own batch
    seed: int = 0
    out: PathSetting = "runs/online"
    snapshot_every: int = 200  # batches from one saved state to the next, to resume from; 0: only when stopped
    resume: PathSetting | None = None  # folder of a run that was stopped: it goes on, with the settings that it had

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        super().__post_init__()
        check_one_of("setting", self.setting, SETTINGS)
        self.stream = settings_of(self.stream)
        check_range("snapshot_every", self.snapshot_every, 0, example="200")
        self.memory = check_memory(self.memory, self.budget_mib)
        if self.compute is not None:
            ComputeDial(self.compute)  # checks it
        check_range("batch_size", self.batch_size, 1, example="64")
        if self.gather is not None:
            check_range("gather", self.gather, 1, example="32")
        check_range("seed", self.seed, 0, example="0")
        self.data.check_stream()
        check_policy(self.method, bool(self.policy_path), self.transfer)


@dataclass
class BenchmarkSettings(Common):
    """Settings of ``adapt/benchmark.py``."""

    method: dict[str, MethodConfig] = field(default_factory=dict)  # settings of each method by its name
    methods: list[str] = field(default_factory=lambda: ["source", "bn", "tent", "adam"])  # rows of the table
    policy_path: list[PathSetting] = field(default_factory=list)  # a row of each method with a policy for each of these
    transfer: str | None = None  # as in OnlineSettings
    settings: list[str] = field(default_factory=lambda: ["reset"])  # and, or, continual
    stream: Any = field(default_factory=lambda: {"name": "shuffled"})  # every method meets the same
    rates: list[float] = field(default_factory=list)  # learning rates of every hand-made rule, a row for each
    seeds: list[int] = field(default_factory=lambda: [0])  # of the order of images
    batch_size: int = 64
    memory: str | None = None  # None: dense, and with budgets pruned
    budgets: list[float] = field(default_factory=list)  # MiB held, a row for each, of every method that updates
    compute: list[float] = field(default_factory=list)  # forward passes a batch, a row for each, likewise
    pruning: list[str] = field(default_factory=list)  # a row for each allocation, of every method that updates
    out: PathSetting = "runs/benchmark"

    def __post_init__(self) -> None:
        """Check each value and what they need of one another."""
        super().__post_init__()
        for key, values, allowed in (
            ("methods", self.methods, self.method),
            ("settings", self.settings, SETTINGS),
            ("pruning", self.pruning, (*ALLOCATIONS, LEARNED)),
        ):
            for value in values:
                check_one_of(key, value, allowed)
        self.stream = settings_of(self.stream)
        for key, rows in (("methods", self.methods), ("settings", self.settings), ("seeds", self.seeds)):
            if not rows:
                raise ConfigError(f"{key}=[] is empty; at least one is needed: leave {key} out for the default")
        memory = self.memory
        held = [budget for budget in self.budgets if not holds_nothing(budget)]
        self.memory = check_memory(memory, held[0] if held else None)
        for budget in held:
            check_memory(memory, budget)
        for compute in self.compute:
            ComputeDial(compute)  # checks it
        if self.pruning and self.memory != "pruned":
            raise ConfigError(
                f"pruning=[{', '.join(self.pruning)}] does not go with memory={self.memory}; allocations choose for "
                "memory=pruned alone: set memory=pruned"
            )
        check_range("batch_size", self.batch_size, 1, example="64")
        for seed in self.seeds:
            check_range("seeds", seed, 0, example="[0]")
        for rate in self.rates:
            check_positive("rates", rate)
        self.data.check_stream()
        for name in self.methods:
            check_policy(self.method[name], bool(self.policy_path), self.transfer)


@dataclass
class DigitsModelSettings:
    """Settings of ``metaopt source``, which trains a source model on the digits."""

    model: ModelSettings
    seed: int = 0
    device: str = "cpu"
    cache: PathSetting = "runs/source"

    def __post_init__(self) -> None:
        """Check the range of each value."""
        check_range("seed", self.seed, 0, example="0")


@dataclass
class FootprintSettings:
    """Settings of ``adapt/footprint.py``."""

    model: ModelSettings  # without a checkpoint: random weights
    method: MethodConfig = field(default_factory=lambda: MethodConfig("source"))
    images: PathSetting | None = None  # (N, H, W, 3) uint8 .npy; None: noise
    bits: list[int] = field(default_factory=lambda: [8, 6, 5, 4, 3, 2])  # of every layer: a row of compact for each
    budgets: list[float] = field(default_factory=list)  # a row of memory=pruned for each, MiB
    repeats: int = 5  # pairs of timed steps for each row; the median counts
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check each value."""
        for bits in self.bits:
            Precision(bits)  # refuses what it does not know
        for budget in self.budgets:
            check_positive("budgets", budget)
        for key, least in (("repeats", 1), ("batch_size", 1), ("seed", 0)):
            check_range(key, getattr(self, key), least, example=str(least))
        if self.method.update == "none" or self.method.needs_policy:
            raise ConfigError(
                f"method={self.method.name} is not one whose step can be measured without a policy; allowed are those "
                "with a hand-made rule: set method=tent"
            )


def check_memory(memory: str | None, budget_mib: float | None) -> str:
    """The memory that is meant: a budget without one prunes.

    Raises:
        ConfigError: they do not go together.
    """
    budget_mib = None if holds_nothing(budget_mib) else budget_mib
    memory = memory or ("dense" if budget_mib is None else "pruned")
    MemoryConfig(memory, budget_mib)  # checks both
    return memory


def check_policy(method: MethodConfig, given: bool, transfer: str | None) -> None:
    """Refuse a method without the policy that it needs, and what cannot be transferred.

    Raises:
        ConfigError: one of them.
    """
    if transfer is not None:
        check_one_of("transfer", transfer, TRANSFERS)
    if method.needs_policy and not given:
        fix = "add --policy PATH" if method.name == "policy" else "add policy_path=PATH"  # --policy sets the method too
        raise ConfigError(f"policy_path is not set; method {method.name} needs a meta-trained policy: {fix}")
