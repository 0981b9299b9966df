"""Settings of meta-training's tasks."""

from dataclasses import dataclass

from metaopt.errors import ConfigError, check_one_of, check_range

CLEAN_VIEWS = ("cached", "augmented")


@dataclass(frozen=True)
class TaskConfig:
    """How tasks are drawn. What makes them like the streams of deployment is off here; see `MetaTrainConfig`."""

    batch_size: int = 64
    strength: tuple[float, float] = (0.5, 5.0)  # range of the shift's strength
    composed: float = 0.3  # probability that a second shift is applied on top
    occlusion: float = 0.3  # probability that rectangles are occluded
    flip: bool | None = None  # mirror images, not where that changes the class; None: yes, but not digits by command
    translate: int = 2  # largest move of an image, pixels
    # Where the teacher's view comes from: "cached" predicts each clean image once, "augmented" each view anew.
    clean_view: str = "cached"
    # Range that a task's batch size is drawn from, log-uniformly; None: batch_size.
    sizes: tuple[int, int] | None = None
    changing: float = 0.0  # probability that each batch of a task has a size of its own in that range
    skewed: float = 0.0  # probability that a task's classes, as the source model predicts them, are not even
    clean: float = 0.0  # probability that a task has no shift and no occlusion
    alternating: float = 0.0  # probability that a task's batches have 2 to 4 shifts in turn
    mixed: float = 0.0  # probability that each image of a task has one of 2 to 4 shifts
    gradual: float = 0.0  # probability that strength rises and falls along a task, from and to a tenth of it

    def __post_init__(self) -> None:
        """Check every value against its range."""
        low, high = self.strength
        check_range("batch_size", self.batch_size, 1, example="64")
        if not 0 < low <= high <= 5:
            raise ConfigError(f"meta.strength is {self.strength}; allowed is 0 < low <= high <= 5: set [0.5, 5]")
        for key in ("composed", "occlusion", "changing", "skewed", "clean", "alternating", "mixed", "gradual"):
            check_range(f"meta.{key}", getattr(self, key), 0, 1, example="0.3")
        check_range("meta.translate", self.translate, 0, example="2")
        check_one_of("meta.clean_view", self.clean_view, CLEAN_VIEWS)
        if self.sizes is not None and not (
            len(self.sizes) == 2
            and all(type(size) is int for size in self.sizes)
            and 2 <= self.sizes[0] <= self.sizes[1]
        ):
            raise ConfigError(f"meta.sizes is {self.sizes}; allowed are whole numbers 2 <= low <= high: set [16, 128]")
        if self.sizes is None and self.changing > 0:
            raise ConfigError(
                f"meta.changing is {self.changing} and meta.sizes is not set; it takes the range that sizes change "
                "in: set meta.sizes=[16,128]"
            )
        if (total := self.clean + self.alternating + self.mixed) > 1 + 1e-9:  # 0.2 + 0.7 + 0.1 is more than 1
            raise ConfigError(
                f"meta.clean, meta.alternating and meta.mixed add up to {total:g}; a task is one of these at most, "
                "allowed is a sum of up to 1: lower one"
            )
