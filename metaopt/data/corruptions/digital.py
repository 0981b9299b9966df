"""Elastic deformation, pixelation and JPEG compression, with published constants."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaopt.data.corruptions.filters import bilinear, drawing_size, enlarge, gaussian
from metaopt.data.corruptions.severity import constants, length_scale, truncate, uniform, unit

# Height of the bumps, their width, and the farthest that a corner of the triangle is pulled, in published pixels.
ELASTIC = ((0, 0, 0), (0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96))
ELASTIC_CUT = 3.0  # standard deviations at which the smoothing of the bumps is cut off
PIXELATE = ((1.0,), (0.95,), (0.9,), (0.85,), (0.75,), (0.65,))  # share of the rows and columns that is kept
JPEG = ((100.0,), (80,), (65,), (58,), (50,), (40,))  # quality
COEFFICIENT_BITS = 22  # of Pillow's fixed-point weights for bytes


def elastic_transform(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Pull the image by a random affine map, then move its pixels along smooth random bumps."""
    height, width, pull = constants(ELASTIC, severity)
    values = unit(images)
    warped = _pull(values, pull * length_scale(images), generator)
    bumps = uniform((values.shape[0], 2, *drawing_size(images)), values, generator, -1, 1)
    bumps = gaussian(bumps, width, "symmetric", ELASTIC_CUT) * height * length_scale(images)
    right, down = enlarge(bumps, images).unbind(1)
    y, x = _grid(values)
    return truncate(bilinear(warped, y + down, x + right, "symmetric"), images)


def _pull(values: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """Move three points about the centre by up to ``reach`` pixels each way, and the image with them."""
    batch, _, height, width = values.shape
    middle, arm = values.new_tensor([width // 2, height // 2]), min(height, width) // 3
    before = middle + arm * values.new_tensor([[1, 1], [1, -1], [-1, -1]])  # (3, 2) as x, y
    after = before + uniform((batch, 3, 2), values, generator, -reach, reach)
    # The map from new to old positions, [x, y, 1] @ back, is what a sampler needs.
    back = torch.linalg.solve(torch.cat([after, torch.ones_like(after[..., :1])], dim=2), before.expand_as(after))
    y, x = _grid(values)
    old = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ back[:, None]
    return bilinear(values, old[..., 1], old[..., 0], "mirror")


def _grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel positions y, x of (B, C, H, W), each (1, H, W)."""
    rows, columns = (torch.arange(size, device=values.device, dtype=values.dtype) for size in values.shape[-2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return y[None], x[None]


def pixelate(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Shrink the image by box averages and enlarge it again, in Pillow's arithmetic; draws nothing."""
    (share,) = constants(PIXELATE, severity)
    height, width = images.shape[-2:]
    values = unit(images) * 255
    for rows, columns in ((int(height * share), int(width * share)), (height, width)):
        values = _resize(values, max(columns, 1))
        values = _resize(values.transpose(2, 3), max(rows, 1)).transpose(2, 3)
    return (values / 255).to(images.dtype)


def _resize(values: Tensor, width: int) -> Tensor:
    """Resample the last axis of whole values 0 to 255 to ``width`` by boxes; every pass rounds to bytes."""
    size = values.shape[-1]
    scale = size / width
    reach = max(scale, 1.0)
    centres = (torch.arange(width, dtype=torch.float64) + 0.5) * scale
    first, last = ((centres + sign * reach / 2 + 0.5).floor().clamp(0, size)[:, None] for sign in (-1, 1))
    pixels = torch.arange(size, dtype=torch.float64)
    offsets = (pixels - centres[:, None] + 0.5) / reach
    inside = (pixels >= first) & (pixels < last) & (offsets > -0.5) & (offsets <= 0.5)
    weights = inside / inside.sum(1, keepdim=True)
    fixed = (weights * 2**COEFFICIENT_BITS + 0.5).floor().to(values)
    return ((values @ fixed.T + 2 ** (COEFFICIENT_BITS - 1)) / 2**COEFFICIENT_BITS).floor().clamp(0, 255)


def jpeg_compression(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Write and read each image as JPEG, on the CPU and one at a time; the quality is a whole number. Draws nothing."""
    (quality,) = constants(JPEG, severity)
    pixels = (unit(images) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.stack([_jpeg(image, round(quality)) for image in pixels])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images.device).to(images.dtype) / 255


def _jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """One image (H, W, 3) of bytes through JPEG."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
