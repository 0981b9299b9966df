"""Shifts of texture and of broad structure outside the nineteen of CIFAR-10-C: random convolution and coloured noise.

They widen the tasks of meta-training. Every function takes images (B, 3, H, W) in [0, 1], a strength in (0, 5] and a
generator, and gives images of the same shape as truncated bytes; what is random is drawn for each image and channel.
"""

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.data.corruptions.severity import HARDEST, check_severity, normal, truncate, uniform, unit

KERNEL = 5  # pixels, side of a random kernel
FILTERED = 0.8  # share of the filtered image at full strength
NOISE = 0.13  # standard deviation of the coloured noise at full strength
EXPONENTS = 0.5, 2.0  # range of the power of the frequency that its amplitude falls with; 0 were white noise
EPS = 1e-6


def random_convolution(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Mix each channel with a randomly filtered version of itself, of the same mean and spread.

    Random filters change the texture and leave the shapes (Xu et al., ICLR 2021, section 3, there across channels).
    """
    values = unit(images)
    batch, channels, height, width = values.shape
    kernels = normal((batch * channels, 1, KERNEL, KERNEL), values, generator) / KERNEL
    maps = functional.pad(values.reshape(1, batch * channels, height, width), (KERNEL // 2,) * 4, mode="replicate")
    filtered = functional.conv2d(maps, kernels, groups=batch * channels).view_as(values)
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
