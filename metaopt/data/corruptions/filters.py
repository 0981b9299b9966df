"""Batched filters and resampling with the borders and grids of the libraries that the published recipe used."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metaopt.data.corruptions.severity import length_scale

Border = Literal["nearest", "mirror", "symmetric"]
"""Outside an image lies its edge pixel, its reflection about the edge pixel's centre, or that about the pixel's rim."""


def border_index(index: Tensor, size: int, border: Border) -> Tensor:
    """Integer positions, anywhere, as positions in [0, size)."""
    if border == "nearest" or size == 1:
        return index.clamp(0, size - 1)
    if border == "mirror":
        period = 2 * (size - 1)
        folded = index.remainder(period)
        return torch.minimum(folded, period - folded)
    folded = index.remainder(2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


def pad(images: Tensor, amount: int, border: Border) -> Tensor:
    """Add ``amount`` pixels on each side of (B, C, H, W)."""
    rows, columns = (
        border_index(torch.arange(-amount, size + amount, device=images.device), size, border)
        for size in images.shape[-2:]
    )
    return images.index_select(-2, rows).index_select(-1, columns)


def correlate(images: Tensor, kernel: Tensor, border: Border) -> Tensor:
    """Correlate each channel of (B, C, H, W) with one odd square kernel (k, k)."""
    channels = images.shape[1]
    weight = kernel.to(images.device, images.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(pad(images, kernel.shape[-1] // 2, border), weight, groups=channels)


def gaussian_weights(sigma: float, radius: int) -> Tensor:
    """Sampled Gaussian of ``2 radius + 1`` taps that sums to one, float64."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def gaussian(images: Tensor, sigma: float, border: Border = "nearest", cut: float = 4.0) -> Tensor:
    """Gaussian filter of (B, C, H, W), its kernel cut off at ``cut`` standard deviations (SciPy's rule).

    Args:
        images: (B, C, H, W).
        sigma: standard deviation in pixels; 0 leaves the images as they are.
        border: what lies outside an image.
        cut: radius of the kernel in standard deviations, rounded to whole pixels.
    """
    radius = int(cut * sigma + 0.5)
    if radius == 0:
        return images
    weights = gaussian_weights(sigma, radius)
    down, across = (_filter_matrix(size, weights, border).to(images) for size in images.shape[-2:])
    return down @ images @ across.T


def _filter_matrix(size: int, weights: Tensor, border: Border) -> Tensor:
    """Correlation with an odd number of weights along an axis as a matrix (size, size), the border folded into it."""
    radius = len(weights) // 2
    taps = border_index(torch.arange(size)[:, None] + torch.arange(-radius, radius + 1), size, border)
    return weights.new_zeros(size, size).scatter_add_(1, taps, weights.expand(size, -1))


def bilinear(images: Tensor, y: Tensor, x: Tensor, border: Border) -> Tensor:
    """Sample (B, C, H, W) at the pixel positions y, x (B, H', W'): (B, C, H', W')."""
    height, width = images.shape[-2:]
    top, left = y.floor(), x.floor()
    down, right = (y - top)[:, None], (x - left)[:, None]
    rows = [border_index(top.long() + step, height, border) for step in (0, 1)]
    columns = [border_index(left.long() + step, width, border) for step in (0, 1)]
    upper = gather(images, rows[0], columns[0]) * (1 - right) + gather(images, rows[0], columns[1]) * right
    lower = gather(images, rows[1], columns[0]) * (1 - right) + gather(images, rows[1], columns[1]) * right
    return upper * (1 - down) + lower * down


def gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of (B, C, H, W) at integer rows and columns (B, H', W'), each image with its own: (B, C, H', W')."""
    batch, channels, _, width = images.shape
    flat = (rows * width + columns).flatten(1)[:, None].expand(batch, channels, -1)
    return images.flatten(2).gather(2, flat).view(batch, channels, *rows.shape[1:])


def clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of (B, C, H, W) by ``factor`` >= 1 and cut it back to the old size.

    The grid is SciPy's for ``zoom`` of order 1: first and last pixel of the crop stay first and last. The published
    recipe knows square images only; here both sides are cropped alike.
    """
    crops = [math.ceil(size / factor) for size in images.shape[-2:]]
    tops = [(size - crop) // 2 for size, crop in zip(images.shape[-2:], crops, strict=True)]
    middle = images[..., tops[0] : tops[0] + crops[0], tops[1] : tops[1] + crops[1]]
    enlarged = [round(crop * factor) for crop in crops]
    zoomed = F.interpolate(middle, size=enlarged, mode="bilinear", align_corners=True)
    trims = [(large - size) // 2 for large, size in zip(enlarged, images.shape[-2:], strict=True)]
    return zoomed[..., trims[0] : trims[0] + images.shape[-2], trims[1] : trims[1] + images.shape[-1]]


def motion(images: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """Blur each image of (B, C, H, W) along its own direction, trailing to one side, edge pixels repeated outside.

    The rule of ImageMagick's motion blur: ``2 ceil(radius) + 1`` taps of half a Gaussian, at the whole pixels nearest
    to the line.

    Args:
        images: (B, C, H, W).
        radius: in pixels, above 0.
        sigma: standard deviation in pixels, above 0.
        angles: (B,) in degrees, clockwise from the right.
    """
    height, width = images.shape[-2:]
    taps = 2 * math.ceil(radius) + 1
    weights = gaussian_weights(sigma, taps - 1)[taps - 1 :]
    radians = torch.deg2rad(angles)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    blurred = torch.zeros_like(images)
    for tap, weight in enumerate((weights / weights.sum()).tolist()):
        down, right = ((tap * part - 0.5).ceil().long() for part in (radians.sin(), radians.cos()))
        y = border_index(rows + down[:, None], height, "nearest")[:, :, None].expand(-1, -1, width)
        x = border_index(columns + right[:, None], width, "nearest")[:, None, :].expand(-1, height, -1)
        blurred += weight * gather(images, y, x)
    return blurred


def drawing_size(images: Tensor) -> tuple[int, int]:
    """Height and width at which a random layer is drawn: the images' shape, its shorter side at most 32 pixels."""
    scale = length_scale(images)
    return round(images.shape[-2] / scale), round(images.shape[-1] / scale)


def enlarge(layer: Tensor, images: Tensor) -> Tensor:
    """A layer (B, C, h, w) drawn at ``drawing_size`` at the size of the images; at 32 pixels it stays as it is."""
    if layer.shape[-2:] == images.shape[-2:]:
        return layer
    return F.interpolate(layer, size=images.shape[-2:], mode="bilinear", align_corners=False)
