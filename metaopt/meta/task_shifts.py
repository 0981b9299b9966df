"""What a task's images are shifted by: one chain of shifts, or several in turn or side by side, or none.

A chain is a few shifts, each with its strength, one applied on top of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.data.shifts import Shift, get_shift
from metaopt.meta.task_config import TaskConfig

Chain = tuple[tuple[Shift, float], ...]

STEADY, ALTERNATING, MIXED = "steady", "alternating", "mixed"
MOST_CHAINS = 4  # of an alternating or mixed task; at least 2
LEAST_FACTOR = 0.1  # of the strength, at the ends of a gradual task


@dataclass(frozen=True)
class TaskShifts:
    """The shifts of a task's batches."""

    chains: tuple[Chain, ...]
    arrangement: str = STEADY  # of one chain; of several: each batch another in turn, or each image one at random
    factors: tuple[float, ...] | None = None  # of all strengths at each position of the task; None: 1

    def apply(self, images: Tensor, position: int, generator: torch.Generator) -> Tensor:
        """Shifted images of the same shape.

        Args:
            images: of the batch at one position, (B, 3, H, W) in [0, 1].
            position: from 0.
            generator: CPU generator; the only source of randomness.
        """
        factor = 1.0 if self.factors is None else self.factors[position]
        if self.arrangement != MIXED:
            return _shifted(images, self.chains[position % len(self.chains)], factor, generator)
        chosen = torch.randint(len(self.chains), (len(images),), generator=generator)
        shifted = images.clone()
        for number, chain in enumerate(self.chains):
            index = (chosen == number).nonzero().flatten().to(images.device)
            if len(index) > 0:
                shifted[index] = _shifted(images[index], chain, factor, generator)
        return shifted

    @property
    def name(self) -> str:
        """The shifts with their strengths, and how they come, for logs: ``fog@3.2+snow@1.0 | hue@2.1 mixed``."""
        chains = ("+".join(f"{shift.name}@{strength:.1f}" for shift, strength in chain) for chain in self.chains)
        words = [" | ".join(chain or "clean" for chain in chains)]
        if self.arrangement != STEADY:
            words.append(self.arrangement)
        if self.factors is not None:
            words.append("gradual")
        return " ".join(words)


def draw_chain(shifts: Sequence[Shift], config: TaskConfig, generator: torch.Generator, first: int = -1) -> Chain:
    """One shift, perhaps another on top, perhaps occlusion.

    Args:
        shifts: to draw from.
        config: probabilities, and the range of strengths.
        generator: CPU generator; the only source of randomness.
        first: index of the first shift; -1: drawn.
    """
    picks = torch.randint(len(shifts), (2,), generator=generator).tolist()
    draws = torch.rand(4, generator=generator).tolist()
    low, high = config.strength
    picks[0] = picks[0] if first < 0 else first
    chain = [(shifts[picks[0]], low + (high - low) * draws[0])]
    if draws[1] < config.composed and picks[1] != picks[0]:
        # Two strong shifts on top of each other leave nothing to recognise: the second is drawn weaker.
        chain.append((shifts[picks[1]], low + 0.5 * (high - low) * draws[2]))
    if draws[3] < config.occlusion:
        chain.append((get_shift("occlusion"), low + (high - low) * draws[3] / config.occlusion))
    return tuple(chain)


def arranged(
    chain: Chain, shifts: Sequence[Shift], config: TaskConfig, positions: int, generator: torch.Generator
) -> TaskShifts:
    """The shifts of a task whose chain is this one: alone, not at all, or beside others.

    Args:
        chain: of the task.
        shifts: to draw others from.
        config: probabilities, and how further chains are drawn.
        positions: batches of the task, K + 1.
        generator: CPU generator; the only source of randomness.
    """
    kind, rises = torch.rand(2, generator=generator).tolist()
    if kind < config.clean:
        return TaskShifts(((),))
    found = TaskShifts((chain,))
    if kind < config.clean + config.alternating + config.mixed:
        arrangement = ALTERNATING if kind < config.clean + config.alternating else MIXED
        found = TaskShifts((chain, *_others(chain, shifts, config, generator)), arrangement)
    if rises < config.gradual:
        peak = int(torch.randint(positions, (), generator=generator))
        found = TaskShifts(found.chains, found.arrangement, _rise_and_fall(positions, peak))
    return found


def _others(chain: Chain, shifts: Sequence[Shift], config: TaskConfig, generator: torch.Generator) -> list[Chain]:
    """1 to 3 further chains, whose first shifts differ from one another as far as there are so many."""
    first = shifts.index(chain[0][0])
    count = int(torch.randint(1, MOST_CHAINS, (), generator=generator))
    others = [index for index in torch.randperm(len(shifts), generator=generator).tolist() if index != first]
    turns = [*others, first]
    return [draw_chain(shifts, config, generator, turns[turn % len(turns)]) for turn in range(count)]


def _rise_and_fall(positions: int, peak: int) -> tuple[float, ...]:
    """Factors that rise linearly to 1 at ``peak``, and fall from there."""
    last = positions - 1
    shares = (1.0 if at == peak else at / peak if at < peak else (last - at) / (last - peak) for at in range(positions))
    return tuple(LEAST_FACTOR + (1.0 - LEAST_FACTOR) * share for share in shares)


def _shifted(images: Tensor, chain: Chain, factor: float, generator: torch.Generator) -> Tensor:
    for shift, strength in chain:
        images = shift(images, factor * strength, generator)
    return images
