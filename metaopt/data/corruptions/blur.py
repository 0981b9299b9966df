"""The blurs: Gaussian, glass, defocus, motion and zoom, with published constants; lengths scale with the images."""

import math

import torch
from torch import Tensor

from metaopt.data.corruptions.filters import clipped_zoom, correlate, gather, gaussian, gaussian_weights, motion
from metaopt.data.corruptions.severity import constants, length_scale, neighbours, truncate, uniform, unit

GAUSSIAN = ((0.0,), (0.4,), (0.6,), (0.7,), (0.8,), (1.0,))  # standard deviation, pixels
GLASS = ((0, 1, 0), (0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))  # blur, reach, repetitions
DEFOCUS = ((0, 0), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))  # radius of the disk, its antialiasing
MOTION = ((0.0, 0.0), (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))  # radius and standard deviation, pixels
MOTION_ANGLE = 45.0  # degrees to either side
ZOOM = ((0.0,), (7,), (12,), (16,), (21,), (26,))  # number of zooms that are averaged
# From one zoom factor to the next, the first being 1. The published range has this step, not 0.01: its last bit decides
# whether the middle enlarged by 1.25 has 32 or 33 pixels.
ZOOM_STEP = 1.01 - 1


def gaussian_blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Gaussian filter with edge pixels repeated outside."""
    (sigma,) = constants(GAUSSIAN, severity)
    return truncate(gaussian(unit(images), sigma * length_scale(images)), images)


def glass_blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Blur, let pixels take the place of a near one, blur again.

    The published loop means to swap pixels in turn, but its assignment overwrites the first before it is read: a pixel
    takes the value of one above or to the left, in an order in which that one is still unchanged. So all pixels can be
    moved at once. Larger images have a larger reach, to both sides, and are moved at once too.
    """
    sigma, reach, repetitions = constants(GLASS, severity)
    scale = length_scale(images)
    reach = max(1, round(reach * scale))
    values = (gaussian(unit(images), sigma * scale) * 255).floor() / 255
    batch, _, height, width = values.shape
    rows = torch.arange(height, device=values.device).view(1, -1, 1)
    columns = torch.arange(width, device=values.device).view(1, 1, -1)
    moving = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    for _ in range(round(repetitions)):
        down, right = uniform((2, batch, height, width), values, generator, -reach, reach).floor().long() * moving
        values = gather(values, rows + down, columns + right)
    return truncate(gaussian(values, sigma * scale), images)


def defocus_blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Average over an antialiased disk, the image mirrored outside; between two severities the kernels are mixed."""
    lower, share = neighbours(severity)
    scale = length_scale(images)
    half = math.ceil(max(radius for radius, _ in DEFOCUS) * scale) + math.ceil(scale)
    kernel = (1 - share) * _disk(*DEFOCUS[lower], scale, half)
    if share:
        kernel = kernel + share * _disk(*DEFOCUS[lower + 1], scale, half)
    return truncate(correlate(unit(images), kernel, "mirror"), images)


def _disk(radius: float, alias_sigma: float, scale: float, half: int) -> Tensor:
    """Disk of a radius on a grid of ``2 half + 1`` pixels, smoothed by a Gaussian of three taps at 32 pixels.

    It is made in single precision, as published: the last bit decides where a truncation falls on a whole byte.
    """
    offsets = torch.arange(-half, half + 1, dtype=torch.float32)
    disk = (offsets[:, None] ** 2 + offsets**2 <= (radius * scale) ** 2).float()
    disk = disk / disk.sum()
    if alias_sigma == 0:
        return disk
    taps = gaussian_weights(alias_sigma * scale, math.ceil(scale))
    return correlate(disk[None, None], torch.outer(taps, taps).float(), "nearest")[0, 0]


def motion_blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Trail each image along its own direction, at most 45 degrees off the horizontal."""
    radius, sigma = constants(MOTION, severity)
    values = unit(images)
    angles = uniform((values.shape[0],), values, generator, -MOTION_ANGLE, MOTION_ANGLE)
    blurred = motion(values, radius * length_scale(images), sigma * length_scale(images), angles)
    return truncate(blurred, images)


def zoom_blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Average the image and its enlargements by 1, 1.01, 1.02, ...; of a fractional number the last weighs less."""
    (count,) = constants(ZOOM, severity)
    values = unit(images)
    total = values.clone()
    for step in range(math.ceil(count)):
        total += min(1.0, count - step) * clipped_zoom(values, 1 + step * ZOOM_STEP)
    return truncate(total / (count + 1), images)
