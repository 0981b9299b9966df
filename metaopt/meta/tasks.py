"""Meta-training tasks: a few unlabeled clean images, augmented, under a sampled shift.

A task is one small stream: K + 1 batches that share one shift at one strength. Diversity of tasks is what makes a
learned generator transfer, so strengths are drawn continuously, shifts are composed, and images are flipped, moved and
occluded. Where :class:`TaskConfig` says so, tasks are as streams of deployment may be: without a shift, with several or
a gradual one, of other and changing batch sizes, and with skewed classes. What such a task has beyond a plain one is
drawn from its own seed, so that the sequence of draws, and with it every plain task, is the same under any settings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.data.shifts import Shift, get_shift
from metaopt.errors import ConfigError
from metaopt.meta.skew import draw_sizes, draw_skew, shuffled, skewed_order
from metaopt.meta.task_config import TaskConfig
from metaopt.meta.task_shifts import TaskShifts, arranged, draw_chain
from metaopt.meta.unroll import MetaBatch


@dataclass(frozen=True)
class Task(Sequence[MetaBatch]):
    """K + 1 batches under its shifts, each made anew, and the same, whenever it is asked for."""

    sampler: "TaskSampler"
    plan: TaskShifts
    order: tuple[Tensor, ...]  # indices of each batch's images, K + 1 of (B,); B may differ
    seed: int
    skew: str = ""  # which of metaopt.meta.skew.SKEWS; empty: none

    def __len__(self) -> int:
        """K + 1."""
        return len(self.order)

    def __getitem__(self, position: int) -> MetaBatch:  # type: ignore[override]
        """The batch at one position of the unroll."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.sampler.batch(self, position)

    def __iter__(self) -> Iterator[MetaBatch]:
        """The batches in order, one alive at a time."""
        return (self[position] for position in range(len(self)))

    @property
    def shifts(self) -> tuple[tuple[Shift, float], ...]:
        """All of them, each with its strength, in the order of application; none where the task is clean."""
        return tuple(link for chain in self.plan.chains for link in chain)

    @property
    def largest(self) -> MetaBatch:
        """The first of its largest batches, which needs the most memory."""
        sizes = [len(index) for index in self.order]
        return self[sizes.index(max(sizes))]

    @property
    def name(self) -> str:
        """Its shifts with their strengths, its skew and its batch sizes where they were drawn, for logs."""
        words = [self.plan.name, self.skew]
        if self.sampler.config.sizes is not None:
            least, most = (each(len(index) for index in self.order) for each in (min, max))
            words.append(f"x{least}" if least == most else f"x{least}-{most}")
        return " ".join(word for word in words if word)


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
        classifier: does so where there is no teacher, to tell the classes of skewed tasks.

    Raises:
        ConfigError: no shifts, or skewed tasks without anything that tells classes.
    """

    def __init__(
        self,
        images: Tensor,
        shifts: Sequence[str | Shift],
        config: TaskConfig,
        teacher: Callable[[Tensor], Tensor] | None = None,
        classifier: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not shifts:
            raise ConfigError("meta.shifts is empty; at least one shift is needed: set meta.shifts=[gaussian_blur]")
        self._predict = teacher or classifier
        if config.skewed > 0 and self._predict is None:
            raise ConfigError(
                f"meta.skewed is {config.skewed} and nothing tells the images' classes; it needs a model's "
                "predictions: give a teacher or classifier, or set meta.skewed=0"
            )
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
        positions, size = steps + 1, min(self.config.batch_size, len(self.images))
        chain = draw_chain(self.shifts, self.config, generator)
        order = shuffled(len(self.images), positions * size, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        plan = arranged(chain, self.shifts, self.config, positions, generator_for("task shifts", seed))
        skew = draw_skew(self.config.skewed, generator_for("task skew", seed))
        return Task(self, plan, self._order(order.split(size), skew, seed), seed, skew)

    def _order(self, order: tuple[Tensor, ...], skew: str, seed: int) -> tuple[Tensor, ...]:
        """The images of each batch: these, unless sizes are drawn or classes are skewed."""
        sizes, count, randomness = self.config.sizes, len(self.images), generator_for("task order", seed)
        drawn = [len(index) for index in order]
        if sizes is not None:
            bounds = (min(sizes[0], count), min(sizes[1], count))
            drawn = draw_sizes(bounds, self.config.changing, len(order), generator_for("task sizes", seed))
        if skew:
            return tuple(skewed_order(skew, self._predictions().argmax(dim=1).cpu(), drawn, randomness))
        return order if sizes is None else shuffled(count, sum(drawn), randomness).split(drawn)

    def batch(self, task: Task, position: int) -> MetaBatch:
        """Make one batch of a task: clean views, augmented alike, and their shifted versions.

        The first has no targets: nothing has adapted to it, so it is never scored.
        """
        randomness = generator_for("task", task.seed, position)
        index = task.order[position].to(self.images.device)
        clean = self._augment(self.images[index], randomness)
        shifted = task.plan.apply(clean, position, randomness)
        return MetaBatch(shifted, self._targets(index, clean) if position > 0 else None)

    def _targets(self, index: Tensor, clean: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        if self.config.clean_view == "augmented":
            return self.teacher(clean)
        return self._predictions()[index]

    def _predictions(self) -> Tensor:
        """Class probabilities of each clean image, (n, C), predicted once."""
        if self._cached is None:
            assert self._predict is not None
            self._cached = torch.cat([self._predict(part) for part in self.images.split(self.config.batch_size)])
        return self._cached

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
