"""Noise of each pixel and channel by itself, with published constants."""

import torch
from torch import Tensor

from metaopt.data.corruptions.severity import constants, normal, poisson, truncate, uniform, unit

GAUSSIAN = ((0.0,), (0.04,), (0.06,), (0.08,), (0.09,), (0.10,))  # standard deviation
SHOT = ((0.0,), (1 / 500,), (1 / 250,), (1 / 100,), (1 / 75,), (1 / 50,))  # brightness of one photon
IMPULSE = ((0.0,), (0.01,), (0.02,), (0.03,), (0.05,), (0.07,))  # share of values replaced
SPECKLE = ((0.0,), (0.06,), (0.10,), (0.12,), (0.16,), (0.20,))  # standard deviation relative to the value


def gaussian_noise(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Add normal noise."""
    (scale,) = constants(GAUSSIAN, severity)
    values = unit(images)
    return truncate(values + scale * normal(values.shape, values, generator), images)


def shot_noise(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Count photons: Poisson noise with the value as its mean."""
    (photon,) = constants(SHOT, severity)
    full = 1 / photon  # photons of a white pixel
    return truncate(poisson(unit(images) * full, generator) / full, images)


def impulse_noise(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the values by 0 or 1, half each."""
    (amount,) = constants(IMPULSE, severity)
    values = unit(images)
    draws = uniform(values.shape, values, generator)
    values = torch.where(draws < amount / 2, torch.zeros_like(values), values)
    return truncate(torch.where(draws >= 1 - amount / 2, torch.ones_like(values), values), images)


def speckle_noise(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Add normal noise in proportion to the value."""
    (scale,) = constants(SPECKLE, severity)
    values = unit(images)
    return truncate(values + scale * values * normal(values.shape, values, generator), images)
