"""Meta-training tasks: a few unlabeled clean images, augmented, under a sampled shift.

A task is one small stream: K + 1 batches that share one shift at one strength. Diversity of tasks is what makes a
learned generator transfer, so strengths are drawn continuously, shifts are composed, and images are flipped, moved and
occluded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.data.shifts import Shift, get_shift
from metaopt.errors import ConfigError, check_one_of, check_range
from metaopt.meta.unroll import MetaBatch

CLEAN_VIEWS = ("cached", "augmented")


@dataclass(frozen=True)
class TaskConfig:
    """How tasks are drawn."""

    batch_size: int = 64
    strength: tuple[float, float] = (0.5, 5.0)  # range of the shift's strength
    composed: float = 0.3  # probability that a second shift is applied on top
    occlusion: float = 0.3  # probability that rectangles are occluded
    flip: bool | None = None  # mirror images, not where that changes the class; None: yes, but not digits by command
    translate: int = 2  # largest move of an image, pixels
    # Where the teacher's view comes from: "cached" predicts each clean image once, "augmented" each view anew.
    clean_view: str = "cached"

    def __post_init__(self) -> None:
        """Check every value against its range."""
        low, high = self.strength
        check_range("batch_size", self.batch_size, 1, example="64")
        if not 0 < low <= high <= 5:
            raise ConfigError(f"meta.strength is {self.strength}; allowed is 0 < low <= high <= 5: set [0.5, 5]")
        check_range("meta.composed", self.composed, 0, 1, example="0.3")
        check_range("meta.occlusion", self.occlusion, 0, 1, example="0.3")
        check_range("meta.translate", self.translate, 0, example="2")
        check_one_of("meta.clean_view", self.clean_view, CLEAN_VIEWS)


@dataclass(frozen=True)
class Task(Sequence[MetaBatch]):
    """K + 1 batches under one shift, each made anew, and the same, whenever it is asked for."""

    sampler: "TaskSampler"
    shifts: tuple[tuple[Shift, float], ...]  # each with its strength, in the order of application
    order: Tensor  # indices of the images, (K + 1, B)
    seed: int

    def __len__(self) -> int:
        """K + 1."""
        return self.order.shape[0]

    def __getitem__(self, position: int) -> MetaBatch:  # type: ignore[override]
        """The batch at one position of the unroll."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.sampler.batch(self, position)

    def __iter__(self) -> Iterator[MetaBatch]:
        """The batches in order, one alive at a time."""
        return (self[position] for position in range(len(self)))

    @property
    def name(self) -> str:
        """The shifts with their strengths, for logs."""
        return "+".join(f"{shift.name}@{strength:.1f}" for shift, strength in self.shifts)


class Window(Sequence[MetaBatch]):
    """Positions ``start`` to ``stop`` of a task, made when they are asked for."""

    def __init__(self, task: Task, start: int, stop: int) -> None:
        self._task, self._positions = task, range(start, stop)

    def __len__(self) -> int:
        """Number of positions."""
        return len(self._positions)

    def __getitem__(self, position: int) -> MetaBatch:  # type: ignore[override]
        """The batch at one of them."""
        return self._task[self._positions[position]]


class TaskSampler:
    """Draws tasks.

    Args:
        images: clean unlabeled images, (n, 3, H, W) in [0, 1].
        shifts: registered names or shifts to draw from.
        config: how tasks are drawn.
        teacher: gives class probabilities (B, C) for clean images; None where the meta-loss needs no targets.
    """

    def __init__(
        self,
        images: Tensor,
        shifts: Sequence[str | Shift],
        config: TaskConfig,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not shifts:
            raise ConfigError("meta.shifts is empty; at least one shift is needed: set meta.shifts=[gaussian_blur]")
        self.images = images
        self.shifts = [get_shift(shift) if isinstance(shift, str) else shift for shift in shifts]
        self.config = config
        self.teacher = teacher
        self._cached: Tensor | None = None  # (n, C), the teacher's view of each clean image

    def sample(self, steps: int, generator: torch.Generator) -> Task:
        """Draw one task of ``steps`` adaptation steps.

        Args:
            steps: K.
            generator: CPU generator; the only source of randomness.
        """
        config = self.config
        picks = torch.randint(len(self.shifts), (2,), generator=generator).tolist()
        draws = torch.rand(4, generator=generator).tolist()
        low, high = config.strength
        chain = [(self.shifts[picks[0]], low + (high - low) * draws[0])]
        if draws[1] < config.composed and picks[1] != picks[0]:
            # Two strong shifts on top of each other leave nothing to recognise: the second is drawn weaker.
            chain.append((self.shifts[picks[1]], low + 0.5 * (high - low) * draws[2]))
        if draws[3] < config.occlusion:
            chain.append((get_shift("occlusion"), low + (high - low) * draws[3] / config.occlusion))
        size = min(config.batch_size, len(self.images))
        passes = math.ceil((steps + 1) * size / len(self.images))
        order = torch.cat([torch.randperm(len(self.images), generator=generator) for _ in range(passes)])
        seed = int(torch.randint(2**31, (), generator=generator))
        return Task(self, tuple(chain), order[: (steps + 1) * size].view(steps + 1, size), seed)

    def batch(self, task: Task, position: int) -> MetaBatch:
        """Make one batch of a task: clean views, augmented alike, and their shifted versions.

        The first has no targets: nothing has adapted to it, so it is never scored.
        """
        randomness = generator_for("task", task.seed, position)
        index = task.order[position].to(self.images.device)
        clean = self._augment(self.images[index], randomness)
        shifted = clean
        for shift, strength in task.shifts:
            shifted = shift(shifted, strength, randomness)
        return MetaBatch(shifted, self._targets(index, clean) if position > 0 else None)

    def _targets(self, index: Tensor, clean: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        if self.config.clean_view == "augmented":
            return self.teacher(clean)
        if self._cached is None:
            size = self.config.batch_size
            self._cached = torch.cat([self.teacher(part) for part in self.images.split(size)])
        return self._cached[index]

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror half of the images, and move each by a few pixels with its border repeated."""
        count, _, height, width = images.shape
        reach = self.config.translate
        moves = torch.randint(-reach, reach + 1, (2, count), generator=generator).to(images.device)
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        rows = (torch.arange(height, device=images.device) + moves[0].unsqueeze(1)).clamp(0, height - 1)  # (B, H)
        columns = (torch.arange(width, device=images.device) + moves[1].unsqueeze(1)).clamp(0, width - 1)  # (B, W)
        if self.config.flip is not False:
            columns = torch.where(mirrored.unsqueeze(1), columns.flip(1), columns)
        pixels = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).view(count, 1, -1)  # (B, 1, H W)
        return images.flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).view_as(images)
