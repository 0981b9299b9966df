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
    load_labels: Callable[[], Tensor | None] | None = None  # (N,) int64 without the images; None: as `load` gives them
    load_rows: Callable[[Tensor], ImageSet] | None = None  # images at (B,) positions alone; None: as `load` gives them
    at_severity: Callable[[float], "Domain"] | None = None  # the same images at another one; None: there is no other
    order: "Order | None" = None  # which images are met, and how, where the stream was arranged
    visit: int = 1  # which time an arranged stream comes here

    @property
    def images(self) -> ImageSet:
        """The images as the model meets them, in the order of their source, or of ``order`` where there is one."""
        return self.load()

    @property
    def labels(self) -> Tensor | None:
        """Labels of the images, (N,) int64; None without."""
        return self.images.labels if self.load_labels is None else self.load_labels()

    @property
    def sources(self) -> tuple["Domain", ...]:
        """The domains that its images come from: itself, unless it is made of others."""
        return (self,) if self.order is None else self.order.sources


Stream = Sequence[Domain]


@dataclass(frozen=True, eq=False)
class Order:
    """The images of an arranged domain, one by one."""

    sources: tuple[Domain, ...]  # as read; one of them may stand here several times, as several visits
    source: Tensor  # (N,) int64: place of each image's domain among them
    index: Tensor  # (N,) int64: position of each image there
    segments: tuple[int, ...]  # images of each stretch, N together; no batch has images of two of them

    def split(self, batch_size: int) -> list[Tensor]:
        """Places in this order of the images of each batch."""
        stretches = torch.arange(len(self.index)).split(list(self.segments))
        return [part for stretch in stretches for part in stretch.split(batch_size)]

    def gather(self, places: Tensor, read: dict[Callable[[], ImageSet], ImageSet]) -> ImageSet:
        """The images at these places.

        Args:
            places: (B,) in this order.
            read: what was read so far, by what reads it; takes in what is read now.

        Raises:
            DataError: images of two domains differ in size.
        """
        source, index = self.source[places], self.index[places]
        parts, several = list[ImageSet](), len(self.sources) > 1
        for place in source.unique().tolist():
            origin, chosen = self.sources[place], index[source == place]
            if several and origin.load_rows is not None:  # files of many domains need not be held
                parts.append(origin.load_rows(chosen))
                continue
            load = origin.load
            data = read[load] if load in read else read.setdefault(load, load())
            parts.append(ImageSet(data.images[chosen], None if data.labels is None else data.labels[chosen]))
        shapes = sorted({tuple(part.images.shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise DataError(
                f"domains have images of the shapes {shapes}; allowed is one shape where several are met together: "
                "resize them, or set stream=shuffled"
            )
        back = source.argsort(stable=True).argsort()  # the parts stand one after another
        labels = [part.labels for part in parts if part.labels is not None]
        images = torch.cat([part.images for part in parts])[back]
        return ImageSet(images, torch.cat(labels)[back] if len(labels) == len(parts) else None)


def arranged(
    sources: Sequence[Domain],
    source: Tensor,
    index: Tensor,
    *,
    name: str | None = None,
    segments: Sequence[int] = (),
    visit: int = 1,
) -> Domain:
    """A domain of images of others.

    Args:
        sources: the others, as read.
        source: (N,) place of each image's domain among them.
        index: (N,) position of each image in its domain.
        name: None: that of the first.
        segments: images of each stretch; none: all in one.
        visit: which time the stream comes here.
    """
    order = Order(tuple(sources), source, index, tuple(segments) or (len(index),))
    severities = {domain.severity for domain in sources}
    return Domain(
        name or sources[0].name,
        severities.pop() if len(severities) == 1 else 0.0,
        len(index),
        lambda: order.gather(torch.arange(len(index)), {}),
        order=order,
        visit=visit,
    )


@dataclass(frozen=True)
class Batch:
    """What the model sees at one step, and what only the scoring may look at."""

    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    labels: Tensor | None  # (B,) int64
    index: Tensor  # (B,) int64 on the CPU: position of each image in its domain
    sources: tuple[Domain, ...] = ()  # domains of the images, where a stream has several in one
    source: Tensor | None = None  # (B,) int64 on the CPU: place of each image's domain among them

    def home(self, domain: Domain) -> Domain:
        """The domain that all its images are of, or else ``domain``, which it is a batch of."""
        places = [] if self.source is None else self.source.unique().tolist()
        return self.sources[places[0]] if len(places) == 1 else domain


def batches(
    domain: Domain, batch_size: int = 64, device: torch.device | str = "cpu", seed: int = 0, skip: int = 0
) -> Iterator[Batch]:
    """The domain's images in a seeded random order, or as they were arranged, the short last batch included.

    A random order depends on the seed and the number of images alone, so every method and every domain of that size
    meets the same one.

    Args:
        domain: the images.
        batch_size: images a batch.
        device: of the batches.
        seed: of the order; without effect where the images were arranged.
        skip: batches at the beginning that are left out; no image of theirs is touched.

    Raises:
        DataError: the batch size is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}: at least 1 image a batch is needed; raise it")
    if domain.order is not None:
        read: dict[Callable[[], ImageSet], ImageSet] = {}
        for places in domain.order.split(batch_size)[skip:]:
            part, index, source = domain.order.gather(places, read), domain.order.index, domain.order.source
            labels = None if part.labels is None else part.labels.to(device)
            yield Batch(to_float(part.images, device), labels, index[places], domain.sources, source[places])
        return
    data = domain.images
    order = torch.randperm(len(data), generator=generator_for(seed, "order"))
    for index in order.split(batch_size)[skip:]:
        labels = None if data.labels is None else data.labels[index].to(device)
        yield Batch(to_float(data.images[index], device), labels, index)


def batch_count(stream: Stream, batch_size: int) -> int:
    """Batches of a stream, short ones included."""
    stretches = [size for domain in stream for size in (domain.order.segments if domain.order else (domain.size,))]
    return sum(-(-size // batch_size) for size in stretches)


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

    def made(shift: Shift, severity: float) -> Domain:
        load = cache(partial(corrupt, clean, shift, severity, seed))
        return Domain(
            shift.name, float(severity), len(clean), load, lambda: clean.labels, at_severity=partial(made, shift)
        )

    shifts = [get_shift(corruption) for corruption in corruptions]
    return [made(shift, severity) for severity in severities for shift in shifts]
