"""What all corruptions share: constants at a severity, bytes in and out, and random draws on any device.

A corruption takes float images in [0, 1] that stand for bytes, computes on ``k / 255`` in double precision as the
published recipe does, and cuts the result to bytes by truncation, so that it reproduces the published files to the last
bit where it draws no random numbers. Lengths in the constants are pixels of a 32-pixel image; for another size they are
multiplied by ``max(1, min(H, W) / 32)``, and random layers (fog, frost, snow, spatter, elastic fields) are drawn at 32
pixels and enlarged: 32-pixel images are as published, larger ones look the same. Noise is per pixel at any size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.errors import DataError

PUBLISHED_SIDE = 32  # pixels, the image size that the constants were made for
HARDEST = 5.0


def check_severity(severity: float) -> float:
    """The severity itself, after checking that it lies in (0, 5].

    Raises:
        DataError: it does not, or it is NaN.
    """
    if not 0 < severity <= HARDEST:
        raise DataError(f"severity {severity}: it must lie in (0, 5]; the published ones are 1, 2, 3, 4 and 5")
    return float(severity)


def constants(table: Sequence[Sequence[float]], severity: float) -> tuple[float, ...]:
    """The row of constants at a severity: rows 1 to 5 are the published ones, a fraction lies on the line between two.

    Args:
        table: six rows; row 0 leaves an image as it is.
        severity: in (0, 5].
    """
    lower, share = neighbours(severity)
    upper = min(lower + 1, len(table) - 1)
    if not share:
        return tuple(table[lower])
    return tuple((1 - share) * a + share * b for a, b in zip(table[lower], table[upper], strict=True))


def neighbours(severity: float) -> tuple[int, float]:
    """The whole severity at or below, and the share of the way to the next."""
    lower = math.floor(check_severity(severity))
    return lower, severity - lower


def length_scale(images: Tensor) -> float:
    """How many pixels of these images one published pixel is; at least one, as a shorter length would vanish."""
    return max(1.0, min(images.shape[-2:]) / PUBLISHED_SIDE)


def unit(images: Tensor) -> Tensor:
    """The bytes that the images stand for, over 255, in the widest float type of the device."""
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    # In place from the first copy on, here and in truncate: most of the time of a shift goes to fresh memory.
    return (images.to(wide) * 255).round_().clamp_(0, 255).div_(255)


def truncate(values: Tensor, like: Tensor) -> Tensor:
    """Cut values (on the scale of [0, 1]) to bytes as a cast to ``uint8`` does, and give them back over 255."""
    return values.clamp(0, 1).mul_(255).floor_().div_(255).to(like.dtype)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal draws, made on the generator's device so that a seed means the same everywhere."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(like.device, like.dtype)


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator, low: float = 0, high: float = 1) -> Tensor:
    """Uniform draws in [low, high), made on the generator's device."""
    draws = torch.rand(*shape, generator=generator, device=generator.device).to(like.device, like.dtype)
    return low + (high - low) * draws


def poisson(rate: Tensor, generator: torch.Generator) -> Tensor:
    """Poisson draws of the given rates, made on the generator's device."""
    return torch.poisson(rate.to(generator.device), generator=generator).to(rate.device)
