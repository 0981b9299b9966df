"""The blurs: Gaussian, glass, defocus, motion and zoom.

Constants: Hendrycks and Dietterich, ICLR 2019, ``make_cifar_c.py``. Every function takes images (B, 3, H, W) in [0, 1],
a severity in (0, 5] and a generator, and gives images of the same shape. Lengths scale with the image (``severity.py``).
"""

import torch
from torch import Tensor

from metaopt.data.corruptions.filters import gaussian
from metaopt.data.corruptions.severity import constants, length_scale, truncate, unit

GAUSSIAN = ((0.0,), (0.4,), (0.6,), (0.7,), (0.8,), (1.0,))  # standard deviation, pixels


def gaussian_blur(images: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Gaussian filter with edge pixels repeated outside."""
    (sigma,) = constants(GAUSSIAN, severity)
    return truncate(gaussian(unit(images), sigma * length_scale(images)), images)
