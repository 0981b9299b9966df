"""Arrangements by label: what a deployed model meets where classes come in stretches, or not equally often."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from metaopt.data.arrangements.arrangement import Arrangement, shuffled
from metaopt.data.seeding import generator_for
from metaopt.data.stream import Stream, arranged
from metaopt.errors import ConfigError, check_positive, check_range

MOST_SLOTS = 100


class ByClass(Arrangement):
    """Every domain for itself, its images chosen and put in order by class."""

    needs_labels: ClassVar[bool] = True

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`; a domain of which no image is left is left out."""
        labels = [domain.labels for domain in stream]
        known = torch.cat([own for own in labels if own is not None]).unique()
        choose = self.chooser(known, seed)
        found = []
        for domain, own in zip(stream, labels, strict=True):
            assert own is not None
            order = shuffled(len(own), seed)
            # Classes by their place among those that the stream has: the labels themselves may have gaps.
            index = order[choose(torch.searchsorted(known, own[order]))]
            if len(index):
                found.append(arranged([domain], torch.zeros_like(index), index))
        return found

    def chooser(self, known: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
        """What tells which images of a domain are met, and in which order.

        Args:
            known: (K,) labels of the stream, ascending.
            seed: of what is drawn, the same for all domains.

        Returns:
            A function of the classes (N,) in 0..K-1 of images in random order, which gives places among them.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Sorted(ByClass):
    """Each domain sorted by class."""

    def chooser(self, known: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
        """See `ByClass`."""
        rank = _ranks(len(known), seed)
        return lambda classes: rank[classes].argsort(stable=True)


@dataclass(frozen=True)
class Dirichlet(ByClass):
    """Each domain in time slots, with class shares drawn from a Dirichlet distribution.

    There are as many slots as classes, 100 at most. The images of each class are divided among them by
    Dir(concentration); within a slot, the classes come one after another in random order. Source: Yuan et al., RoTTA
    (CVPR 2023), section 4, after Gong et al., NOTE (NeurIPS 2022).

    Attributes:
        concentration: small ones give long stretches of a class, large ones even slots.
    """

    concentration: float = 0.1

    def __post_init__(self) -> None:
        """Check the range."""
        check_positive("stream.concentration", self.concentration, "0.1")

    def chooser(self, known: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
        """See `ByClass`."""
        count = len(known)
        slots = min(count, MOST_SLOTS)
        drawn = int(torch.randint(2**62, (), generator=generator_for(seed, "slots")))
        random = numpy.random.default_rng(drawn)
        shares = random.dirichlet([self.concentration] * slots, count)  # (K, slots)
        within = torch.from_numpy(random.permuted(numpy.tile(numpy.arange(count), (slots, 1)), axis=1))  # (slots, K)

        def choose(classes: Tensor) -> Tensor:
            slot = torch.zeros_like(classes)
            for k in classes.unique().tolist():
                places = (classes == k).nonzero().flatten()
                ends = numpy.floor(shares[k].cumsum()[:-1] * len(places))
                slot[places] = torch.from_numpy(ends.searchsorted(numpy.arange(len(places)), side="right"))
            return (slot * count + within[slot, classes]).argsort(stable=True)

        return choose


@dataclass(frozen=True)
class FewClasses(ByClass):
    """Images of some of the classes alone, drawn from the seed.

    Attributes:
        classes: how many.
    """

    classes: int = 2

    def __post_init__(self) -> None:
        """Check the range."""
        check_range("stream.classes", self.classes, 1, example="2")

    def chooser(self, known: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
        """See `ByClass`."""
        if self.classes > len(known):
            raise ConfigError(
                f"stream.classes is {self.classes}; allowed is [1, {len(known)}], as many as the labels name: set for "
                f"example {len(known)}"
            )
        met = _ranks(len(known), seed) < self.classes
        return lambda classes: met[classes].nonzero().flatten()


@dataclass(frozen=True)
class LongTail(ByClass):
    r"""Exponentially unbalanced classes; which ones are frequent is drawn from the seed.

    Of K classes, that of rank r keeps :math:`n \rho^{-r/(K-1)}` images, one at least, with n those of the largest
    class. Source: Cui et al. (CVPR 2019), section 5.1.

    Attributes:
        ratio: :math:`\rho`, images of the most frequent class over those of the rarest.
    """

    ratio: float = 10.0

    def __post_init__(self) -> None:
        """Check the range."""
        check_range("stream.ratio", self.ratio, 1, example="10")

    def chooser(self, known: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
        """See `ByClass`."""
        share = self.ratio ** -(_ranks(len(known), seed).double() / max(len(known) - 1, 1))  # (K,)

        def choose(classes: Tensor) -> Tensor:
            counts = torch.bincount(classes, minlength=len(known))
            kept = (counts.max() * share).round().long().clamp(min=1)
            places = torch.cat([(classes == k).nonzero().flatten()[: kept[k]] for k in range(len(known))])
            return places[shuffled(len(places), seed)]  # in their old order, the rare ones would all come early

        return choose


def _ranks(count: int, seed: int) -> Tensor:
    """A rank for each class, (count,)."""
    return torch.randperm(count, generator=generator_for(seed, "classes"))
