"""Arrangements of domains: one after another, in turn, mixed, over and over, or coming and going."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from metaopt.data.arrangements.arrangement import Arrangement, shuffled
from metaopt.data.seeding import generator_for
from metaopt.data.stream import Domain, Stream, arranged
from metaopt.errors import DataError, check_range

SEVERITIES = (1.0, 2.0, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Shuffled(Arrangement):
    """One domain after another, each shuffled."""

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`."""
        return stream


@dataclass(frozen=True)
class Alternating(Arrangement):
    """All domains in one, each batch of the next one in turn."""

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`; a domain that has no more images is passed over."""
        cut = [shuffled(domain.size, seed).split(batch_size) for domain in stream]
        rounds = range(max(map(len, cut)))
        turns = [(place, parts[turn]) for turn in rounds for place, parts in enumerate(cut) if turn < len(parts)]
        source = torch.cat([torch.full_like(part, place) for place, part in turns])
        index = torch.cat([part for _, part in turns])
        return [arranged(stream, source, index, name="alternating", segments=[len(part) for _, part in turns])]


@dataclass(frozen=True)
class Mixed(Arrangement):
    """All domains in one, each image under one of them that is drawn at random.

    Each position comes once: the stream is as long as its largest domain.
    """

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`."""
        sizes = torch.tensor([domain.size for domain in stream])
        index = shuffled(int(sizes.max()), seed)
        chances = (index[:, None] < sizes[None]).double()  # (N, domains): those that have such an image
        source = torch.multinomial(chances, 1, generator=generator_for(seed, "domains")).flatten()
        return [arranged(stream, source, index, name="mixed")]


@dataclass(frozen=True)
class Recurring(Arrangement):
    """The domains over and over, each round with another share of their images.

    Attributes:
        rounds: how often each domain comes.
    """

    rounds: int = 10

    def __post_init__(self) -> None:
        """Check the range."""
        check_range("stream.rounds", self.rounds, 1, example="10")

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`."""
        small = min(stream, key=lambda domain: domain.size)
        if small.size < self.rounds:
            raise DataError(
                f"stream.rounds is {self.rounds} and {small.name!r} has {small.size} images; allowed is one round an "
                f"image at most: set stream.rounds={small.size} or give more images"
            )
        shares = [shuffled(domain.size, seed).tensor_split(self.rounds) for domain in stream]
        return [
            arranged([domain], torch.zeros_like(own[turn]), own[turn], visit=turn + 1)
            for turn in range(self.rounds)
            for domain, own in zip(stream, shares, strict=True)
        ]


@dataclass(frozen=True)
class Gradual(Arrangement):
    """Each corruption with severities that rise and fall: 1, 2, 3, 4, 5, 4, 3, 2, 1.

    All images are met at each of them, shuffled anew on the way down. Where the stream has one severity of a
    corruption, the others are made, or read where they are on disk; where it has several, these are taken. Source:
    Wang et al., CoTTA (CVPR 2022), section 4.4.
    """

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`."""
        named: dict[str, list[Domain]] = {}
        for domain in stream:
            named.setdefault(domain.name, []).append(domain)
        found = []
        for group in named.values():
            rising = sorted(group if len(group) > 1 else _other_severities(group[0]), key=lambda each: each.severity)
            found += rising
            for domain in rising[-2::-1]:
                index = shuffled(domain.size, seed, "falling")
                found.append(arranged([domain], torch.zeros_like(index), index))
        return found


@dataclass(frozen=True)
class Long(Arrangement):
    """Each domain for a long time: all its images over and over, each time in another order.

    Attributes:
        passes: how often.
    """

    passes: int = 4

    def __post_init__(self) -> None:
        """Check the range."""
        check_range("stream.passes", self.passes, 1, example="4")

    def __call__(self, stream: Stream, seed: int, batch_size: int) -> Stream:
        """See `Arrangement`."""
        return [self._stretch(domain, seed) for domain in stream]

    def _stretch(self, domain: Domain, seed: int) -> Domain:
        visits = [replace(domain, visit=number) for number in range(1, self.passes + 1)]
        index = [shuffled(domain.size, seed, *([number] if number else [])) for number in range(self.passes)]
        source = torch.arange(self.passes).repeat_interleave(domain.size)
        return arranged(visits, source, torch.cat(index), segments=[domain.size] * self.passes)


def _other_severities(domain: Domain) -> Sequence[Domain]:
    """The domain at every severity that there is."""
    found, reason = [domain], "it was given as it is"
    for severity in SEVERITIES:
        if domain.at_severity is not None and severity != domain.severity:
            try:
                found.append(domain.at_severity(severity))
            except DataError as error:
                reason = str(error)
    if len(found) == 1:
        raise DataError(
            f"stream=gradual needs several severities, and {domain.name!r} has {domain.severity:g} alone ({reason}); "
            "allowed are corruptions that are made, or files with all severities: set data.corruptions or data.root"
        )
    return found
