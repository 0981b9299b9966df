"""Shifts outside the nineteen of CIFAR-10-C: gamma, posterise, hue, channel gain and occlusion.

They serve to choose between policies without labels and without touching a benchmark's corruptions, and to widen the
tasks of meta-training. Every function takes images (B, 3, H, W) in [0, 1], a strength in (0, 5] and a generator, and
gives images of the same shape as truncated bytes; what is random is drawn once per image.
"""

import math

import torch
from torch import Tensor

from metaopt.data.corruptions.colour import to_hsv, to_rgb
from metaopt.data.corruptions.severity import HARDEST, check_severity, truncate, uniform, unit

GAMMA_DOUBLINGS = 1.5  # at full strength the exponent is 2 ** 1.5 or its inverse
POSTERISE_BITS = 7.0, 1.0  # bits a channel keeps towards strength 0 and at full strength
HUE_TURN = 0.5  # largest turn of the colour wheel at full strength, in turns
GAIN_SPREAD = 0.6  # at full strength a channel is multiplied by a factor in [0.4, 1.6]
OCCLUSION_AREA = 0.05, 0.45  # share of the image that the rectangle covers


def gamma(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Raise the values to a power above or below one, brighter or darker with equal chance."""
    values = unit(images)
    darker = uniform((values.shape[0], 1, 1, 1), values, generator) < 0.5
    doublings = GAMMA_DOUBLINGS * check_severity(strength) / HARDEST
    return truncate(torch.where(darker, values**2**doublings, values**2**-doublings), images)


def posterise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Keep few levels a channel; draws nothing."""
    weak, strong = POSTERISE_BITS
    levels = 2 ** (weak + (strong - weak) * check_severity(strength) / HARDEST)
    return truncate((unit(images) * (levels - 1)).round() / (levels - 1), images)


def hue(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Turn the colour wheel either way."""
    turn, saturation, value = to_hsv(unit(images))
    largest = HUE_TURN * check_severity(strength) / HARDEST
    turn = turn + uniform((turn.shape[0], 1, 1), turn, generator, -largest, largest)
    return truncate(to_rgb(turn.remainder(1), saturation, value), images)


def channel_gain(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Multiply each channel by its own factor, as a wrong white balance does."""
    values = unit(images)
    spread = GAIN_SPREAD * check_severity(strength) / HARDEST
    return truncate(values * uniform((*values.shape[:2], 1, 1), values, generator, 1 - spread, 1 + spread), images)


def occlusion(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Cover a rectangle of random place, shape and colour; its area grows with the strength."""
    values = unit(images)
    batch, _, height, width = values.shape
    smallest, largest = OCCLUSION_AREA
    area = smallest + (largest - smallest) * check_severity(strength) / HARDEST
    stretch, y, x = uniform((3, batch, 1, 1), values, generator)
    aspect = torch.exp(math.log(2) * (2 * stretch - 1))  # height over width, 1/2 to 2
    tall, wide = (height * (area * aspect).sqrt()).clamp_max(height), (width * (area / aspect).sqrt()).clamp_max(width)
    rows = torch.arange(height, device=values.device).view(1, -1, 1) - y * (height - tall)
    columns = torch.arange(width, device=values.device).view(1, 1, -1) - x * (width - wide)
    covered = (rows >= 0) & (rows < tall) & (columns >= 0) & (columns < wide)
    colour = uniform((batch, 3, 1, 1), values, generator)
    return truncate(torch.where(covered[:, None], colour, values), images)
