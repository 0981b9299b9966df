"""The weather: snow, frost and fog, with published constants.

Snow and fog follow the published recipe. Its frost is cut from five photographs; here it is procedural, from four kinds
of frosted pane with the photographs' colours, contrast and grain, drawn as often as the photographs showed them.
"""

import torch
from torch import Tensor

from metaopt.data.corruptions.colour import LUMA
from metaopt.data.corruptions.filters import clipped_zoom, drawing_size, enlarge, gaussian, motion
from metaopt.data.corruptions.severity import constants, normal, truncate, uniform, unit

# Mean and standard deviation of the flakes' layer, its zoom, its threshold, radius and standard deviation of the fall,
# and the share of the image that is not whitened.
SNOW = (
    (0.1, 0.0, 1, 0.6, 8, 3, 1.0),
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
SNOW_ANGLES = -135.0, -45.0  # degrees: it falls downwards
FROST = ((1.0, 0.0), (1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))  # weights of the image and of the frost
FOG = ((0.0, 3), (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))  # thickness, decay of the roughness with scale
FOG_ROUGHNESS = 100.0  # of the coarsest scale; the published recipe draws from +- its square

# Frosted panes: mean colour and its spread from image to image, in bytes; standard deviation of the grain, in bytes,
# and its skewness; shares of the grain's variance that are fine, needles and broad. The bright one stands for two
# photographs.
PANES = (
    ((96, 108, 120), 12, 33, 0.4, (0.50, 0.43, 0.07)),  # dark slate with light needles
    ((140, 154, 167), 11, 27, -0.1, (0.60, 0.24, 0.16)),  # slate with sparkle
    ((75, 147, 163), 13, 14, 0.4, (0.30, 0.36, 0.34)),  # a blue-green pane under a thin film
    ((197, 201, 211), 9, 18, -1.0, (0.48, 0.33, 0.19)),  # white ice with dark specks
    ((197, 201, 211), 9, 18, -1.0, (0.48, 0.33, 0.19)),
)
NEEDLE_RADIUS, NEEDLE_SIGMA, NEEDLE_WIDTH = 4.0, 2.0, 0.6  # pixels along (cut and decay) and across a needle
BROAD_SIGMA = 5.0  # pixels
PATCHINESS = 0.2  # standard deviation of the logarithm of the grain's strength from place to place


def snow(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Whiten the image and let flakes fall over it, once as drawn and once turned by 180 degrees."""
    mean, spread, zoom, threshold, radius, sigma, kept = constants(SNOW, severity)
    values = unit(images)
    batch = values.shape[0]
    layer = clipped_zoom(mean + spread * normal((batch, 1, *drawing_size(images)), values, generator), zoom)
    layer = torch.where(layer < threshold, torch.zeros_like(layer), (layer.clamp(0, 1) * 255).floor() / 255)
    layer = motion(layer, radius, sigma, uniform((batch,), values, generator, *SNOW_ANGLES))
    layer = enlarge(truncate(layer, layer), images)
    grey = (values * LUMA.to(values)).sum(1, keepdim=True)
    whitened = kept * values + (1 - kept) * torch.maximum(values, grey * 1.5 + 0.5)
    return truncate(whitened + layer + layer.flip(2, 3), images)


def frost(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Lay a frosted pane over each image, procedural and of a kind drawn at random."""
    image_weight, frost_weight = constants(FROST, severity)
    values = unit(images)
    panes = enlarge(_panes(values.new_empty(values.shape[0], 3, *drawing_size(images)), generator), images)
    return truncate(image_weight * values + frost_weight * panes, images)


def _panes(like: Tensor, generator: torch.Generator) -> Tensor:
    """Frosted panes of the shape of ``like`` (B, 3, h, w), in [0, 1]."""
    batch, _, height, width = like.shape
    kind = (uniform((batch,), like, generator) * len(PANES)).long()
    colour, place, spread, skewness, shares = (
        torch.tensor(column, dtype=like.dtype, device=like.device)[kind] for column in zip(*PANES, strict=True)
    )
    fine, needles, broad, patches = normal((4, batch, 1, height, width), like, generator)
    angles = uniform((batch,), like, generator, 0, 360)
    needles = _standardise(motion(gaussian(needles, NEEDLE_WIDTH), NEEDLE_RADIUS, NEEDLE_SIGMA, angles))
    broad, patches = (_standardise(gaussian(layer, BROAD_SIGMA, "symmetric")) for layer in (broad, patches))
    weights = shares.sqrt()[:, :, None, None]
    grain = fine * weights[:, 0:1] + needles * weights[:, 1:2] + broad * weights[:, 2:3]
    # z + a (z^2 - 1) of a standard normal z has mean 0, variance 1 + 2 a^2 and, for small a, skewness 6 a.
    bend = (skewness / 6).view(-1, 1, 1, 1)
    grain = (grain + bend * (grain**2 - 1)) / (1 + 2 * bend**2).sqrt()
    grain = grain * torch.exp(PATCHINESS * patches - PATCHINESS**2)  # the mean square stays 1
    shade = place.view(-1, 1, 1, 1) * normal((batch, 1, 1, 1), like, generator)
    return ((colour.view(-1, 3, 1, 1) + shade + spread.view(-1, 1, 1, 1) * grain) / 255).clamp(0, 1)


def _standardise(layer: Tensor) -> Tensor:
    """Scale a layer (B, 1, H, W) to standard deviation 1 over the batch's pixels, its mean being near 0."""
    return layer / layer.square().mean().sqrt()


def fog(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Add a fractal haze and keep the brightest value of the image where it was."""
    thickness, decay = constants(FOG, severity)
    values = unit(images)
    height, width = drawing_size(images)
    haze = plasma(values.shape[0], max(height, width), decay, values, generator)[..., :height, :width]
    brightest = values.amax(dim=(1, 2, 3), keepdim=True)
    foggy = values + thickness * enlarge(haze, images)
    return truncate(foggy * brightest / (brightest + thickness), images)


def plasma(count: int, side: int, decay: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Height maps by the diamond-square algorithm on a torus, (count, 1, S, S), S >= side a power of two, in [0, 1].

    A. Fournier, D. Fussell and L. Carpenter, "Computer rendering of stochastic models", CACM 1982. Starting from a grid
    of one point, each round halves the spacing: the centre of each square becomes the mean of its corners plus noise,
    then the middle of each edge the mean of its four neighbours plus noise; the noise shrinks with the spacing.

    Args:
        count: number of maps.
        side: least side in pixels.
        decay: the noise's roughness is divided by it each round; the noise itself is uniform within +- its square.
        like: gives type and device.
        generator: source of the noise.
    """
    size = 1 << (side - 1).bit_length()
    grid = like.new_zeros(count, 1, size, size)
    roughness, spacing = FOG_ROUGHNESS, size

    def noisy_mean(total: Tensor) -> Tensor:
        return total / 4 + uniform(total.shape, like, generator, -(roughness**2), roughness**2)

    while spacing >= 2:
        half = spacing // 2
        corners = grid[..., ::spacing, ::spacing]
        pairs = corners + corners.roll(-1, -2)
        grid[..., half::spacing, half::spacing] = noisy_mean(pairs + pairs.roll(-1, -1))
        centres = grid[..., half::spacing, half::spacing]
        upright, level = corners + corners.roll(-1, -2), corners + corners.roll(-1, -1)
        grid[..., ::spacing, half::spacing] = noisy_mean(level + centres + centres.roll(1, -2))
        grid[..., half::spacing, ::spacing] = noisy_mean(upright + centres + centres.roll(1, -1))
        roughness, spacing = roughness / decay, half
    grid = grid - grid.amin(dim=(2, 3), keepdim=True)
    return grid / grid.amax(dim=(2, 3), keepdim=True)
