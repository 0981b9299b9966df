"""A stream: the domains that a deployed model meets one after another, and their batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from metaopt.data.images import ImageSet, to_bytes, to_float
from metaopt.data.seeding import generator_for
from metaopt.data.shifts import Shift, get_shift
from metaopt.errors import DataError

CHUNK = 250  # images that are corrupted at once: bounds the memory and fixes the random draws


@dataclass(frozen=True)
class Domain:
    """Images under one shift at one severity, made or read when they are first asked for."""

    name: str
    severity: float  # 0 where the images are taken as they are
    size: int  # number of images
    load: Callable[[], ImageSet]

    @property
    def images(self) -> ImageSet:
        """The images as the model meets them, in the order of their source."""
        return self.load()


Stream = Sequence[Domain]


@dataclass(frozen=True)
class Batch:
    """What the model sees at one step, and what only the scoring may look at."""

    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    labels: Tensor | None  # (B,) int64
    index: Tensor  # (B,) int64 on the CPU: position of each image in its domain


def batches(
    domain: Domain, batch_size: int = 64, device: torch.device | str = "cpu", seed: int = 0, skip: int = 0
) -> Iterator[Batch]:
    """The domain's images in a seeded random order, the short last batch included.

    The order depends on the seed and the number of images alone, so every method and every domain of that size meets
    the same one.

    Args:
        domain: the images.
        batch_size: images a batch.
        device: of the batches.
        seed: of the order.
        skip: batches at the beginning that are left out; no image of theirs is touched.

    Raises:
        DataError: the batch size is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: at least 1 image a batch is needed; raise it")
    data = domain.images
    order = torch.randperm(len(data), generator=generator_for(seed, "order"))
    for index in order.split(batch_size)[skip:]:
        labels = None if data.labels is None else data.labels[index].to(device)
        yield Batch(to_float(data.images[index], device), labels, index)


def corrupt(clean: ImageSet, shift: Shift, severity: float, seed: int = 0) -> ImageSet:
    """The same images under a shift; what is random depends on the seed, the shift's name and the severity."""
    generator = generator_for(seed, shift.name, float(severity))
    parts = [to_bytes(shift(to_float(part), severity, generator)) for part in clean.images.split(CHUNK)]
    return ImageSet(torch.cat(parts), clean.labels)


def shifted_stream(
    clean: ImageSet, corruptions: Sequence[str], severities: Sequence[float], *, name: str, seed: int = 0
) -> Stream:
    """One domain per severity and corruption, corruptions innermost; each is computed once, when it is first met.

    Args:
        clean: the images before any shift.
        corruptions: names in the registry; none at all gives one domain of the images as they are.
        severities: each in (0, 5].
        name: of that one domain.
        seed: of what the corruptions draw.

    Raises:
        DataError: an unknown corruption.
    """
    if not corruptions:
        return [Domain(name, 0.0, len(clean), lambda: clean)]
    shifts = [get_shift(corruption) for corruption in corruptions]
    return [
        Domain(shift.name, float(severity), len(clean), cache(partial(corrupt, clean, shift, severity, seed)))
        for severity in severities
        for shift in shifts
    ]
