"""Which images a task's batches hold: all alike often, or classes skewed as streams of deployment have them.

``sorted``
    one class after the other, each for at least a batch.
``few_classes``
    one to three classes alone.
``dirichlet``
    each batch with class shares of its own, drawn from a Dirichlet distribution: mostly one or two classes.
``long_tail``
    all classes, the most frequent ten times as often as the rarest.

Classes are what the source model predicts on the clean images. Few images have few of each class, so images come again
before all have come, in a batch too.
"""

import math

import numpy as np
import torch
from torch import Tensor

SKEWS = ("sorted", "few_classes", "dirichlet", "long_tail")

MOST_CLASSES = 3  # of few_classes
CONCENTRATION = 0.1  # of the Dirichlet distribution
IMBALANCE = 10.0  # of the long tail


def draw_sizes(bounds: tuple[int, int], changing: float, positions: int, generator: torch.Generator) -> list[int]:
    """Images in each batch of a task, log-uniform.

    Args:
        bounds: least and most.
        changing: probability that each batch has a size of its own.
        positions: batches of the task, K + 1.
        generator: CPU generator; the only source of randomness.
    """
    low, high = (math.log(bound) for bound in bounds)
    changes, *draws = torch.rand(1 + positions, generator=generator, dtype=torch.float64).tolist()
    sizes = [round(math.exp(low + (high - low) * draw)) for draw in draws]
    return sizes if changes < changing else positions * sizes[:1]


def draw_skew(probability: float, generator: torch.Generator) -> str:
    """One of ``SKEWS``, each as often, with this probability; else empty."""
    skewed = float(torch.rand((), generator=generator)) < probability
    kind = int(torch.randint(len(SKEWS), (), generator=generator))
    return SKEWS[kind] if skewed else ""


def shuffled(images: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices of ``images`` images, (count,): every image comes before any comes again."""
    passes = math.ceil(count / images)
    return torch.cat([torch.randperm(images, generator=generator) for _ in range(passes)])[:count]


def skewed_order(kind: str, classes: Tensor, sizes: list[int], generator: torch.Generator) -> list[Tensor]:
    """Indices of the images of each batch, one tensor (size,) for each.

    Args:
        kind: one of ``SKEWS``.
        classes: predicted class of each image, (n,) on the CPU.
        sizes: images in each batch.
        generator: CPU generator; the only source of randomness.
    """
    present = classes.unique()
    present = present[torch.randperm(len(present), generator=generator)]
    wanted = present[_SEQUENCES[kind](len(present), sizes, generator)]
    order = torch.empty_like(wanted)
    for each in present:
        places, pool = (wanted == each).nonzero().flatten(), (classes == each).nonzero().flatten()
        if len(places) > 0:
            order[places] = pool[shuffled(len(pool), len(places), generator)]
    return list(order.split(sizes))


def _sorted(classes: int, sizes: list[int], generator: torch.Generator) -> Tensor:
    """Runs as long as a batch at least, as those of a long sorted stream are; the first may have begun before."""
    total = sum(sizes)
    run = max(math.ceil(total / classes), *sizes)
    begun = int(torch.randint(min(run, classes * run - total + 1), (), generator=generator))
    return (torch.arange(total) + begun) // run


def _few_classes(classes: int, sizes: list[int], generator: torch.Generator) -> Tensor:
    count = int(torch.randint(1, min(MOST_CLASSES, classes) + 1, (), generator=generator))
    return torch.randint(count, (sum(sizes),), generator=generator)


def _dirichlet(classes: int, sizes: list[int], generator: torch.Generator) -> Tensor:
    # torch draws from this distribution by its global generator alone.
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    shares = torch.from_numpy(numbers.dirichlet([CONCENTRATION] * classes, len(sizes)))
    return torch.cat([_drawn(row, size, generator) for row, size in zip(shares, sizes, strict=True)])


def _long_tail(classes: int, sizes: list[int], generator: torch.Generator) -> Tensor:
    shares = IMBALANCE ** -torch.linspace(0, 1, classes, dtype=torch.float64)
    return _drawn(shares, sum(sizes), generator)


def _drawn(shares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(shares, count, replacement=True, generator=generator)


# Places among the classes present, in a random order of these, of all images of a task, (sum of sizes,).
_SEQUENCES = {"sorted": _sorted, "few_classes": _few_classes, "dirichlet": _dirichlet, "long_tail": _long_tail}
