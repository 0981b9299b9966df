"""Shifts outside the nineteen of CIFAR-10-C; what is random is drawn for each image.

They serve to choose between policies without labels and without touching a benchmark's corruptions, and to widen the
tasks of meta-training.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.data.corruptions.colour import to_hsv, to_rgb
from metaopt.data.corruptions.severity import HARDEST, check_severity, normal, truncate, uniform, unit

GAMMA_DOUBLINGS = 1.5  # at full strength the exponent is 2 ** 1.5 or its inverse
POSTERISE_BITS = 7.0, 1.0  # bits a channel keeps towards strength 0 and at full strength
HUE_TURN = 0.5  # largest turn of the colour wheel at full strength, in turns
GAIN_SPREAD = 0.6  # at full strength a channel is multiplied by a factor in [0.4, 1.6]
OCCLUSION_AREA = 0.05, 0.45  # share of the image that the rectangle covers
KERNEL = 5  # pixels, side of a random kernel
FILTERED = 0.8  # share of the filtered image at full strength
NOISE = 0.13  # standard deviation of the coloured noise at full strength
EXPONENTS = 0.5, 2.0  # range of the power of the frequency that its amplitude falls with; 0 were white noise
EPS = 1e-6


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


def random_convolution(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Mix each channel with a randomly filtered version of itself, of the same mean and spread.

    Random filters change the texture and leave the shapes (Xu et al., ICLR 2021, section 3, there across channels).
    """
    values = unit(images)
    batch, channels, height, width = values.shape
    kernels = normal((batch * channels, 1, KERNEL, KERNEL), values, generator) / KERNEL
    maps = F.pad(values.reshape(1, batch * channels, height, width), (KERNEL // 2,) * 4, mode="replicate")
    filtered = F.conv2d(maps, kernels, groups=batch * channels).view_as(values)
    spread = values.std((2, 3), keepdim=True)
    filtered = _standardised(filtered) * spread + values.mean((2, 3), keepdim=True)
    return truncate(torch.lerp(values, filtered, FILTERED * check_severity(strength) / HARDEST), images)


def coloured_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise whose amplitude falls with a random power of the frequency: blotches rather than grain."""
    values = unit(images)
    batch, _, height, width = values.shape
    white = normal(values.shape, values, generator)
    down = torch.fft.fftfreq(height, device=values.device).unsqueeze(1)
    across = torch.fft.rfftfreq(width, device=values.device)
    frequency = torch.hypot(down, across).clamp_min(1 / max(height, width))  # (H, W // 2 + 1), the constant's too
    power = uniform((batch, 1, 1, 1), values, generator, *EXPONENTS)
    coloured = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-power, s=(height, width))
    coloured = coloured / (coloured.std((2, 3), keepdim=True) + EPS)
    return truncate(values + NOISE * check_severity(strength) / HARDEST * coloured, images)


def _standardised(maps: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and standard deviation 1, (B, C, H, W)."""
    return (maps - maps.mean((2, 3), keepdim=True)) / (maps.std((2, 3), keepdim=True) + EPS)
