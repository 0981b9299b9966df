"""An augmented view of a batch, for terms that compare predictions on two views.

Colours, a small turn and move, blur, mirroring and noise: the augmentation of CoTTA (Wang et al., CVPR 2022) with the
ranges of its released code, which SURGEON's takes over. As there, all images of a batch are changed alike, noise apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

BRIGHTNESS, CONTRAST, SATURATION, GAMMA = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (0.7, 1.3)
HUE = (-0.06, 0.06)  # share of the colour circle
DEGREES, SCALE = (-15.0, 15.0), (0.9, 1.1)
TRANSLATION = 1 / 16  # share of the padded side, in each direction
BLUR_SIGMA, BLUR_KERNEL = (0.001, 0.5), 5  # pixels
NOISE_STD = 0.005
_DARKEST = 1e-8  # a power of less has no finite slope


@torch.no_grad()
def augmented_view(images: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """Another view of the same images.

    Args:
        images: (B, 3, H, W), floating, in [0, 1].
        generator: a CPU generator, which everything random is drawn from.
        flip: mirror all images in one of two batches; not where mirroring changes the class.

    Returns:
        (B, 3, H, W), in [0, 1], of the same type on the same device, without a graph.
    """
    view = _moved(_recoloured(images.clamp(0.0, 1.0), generator), generator)
    sigma = _uniform(BLUR_SIGMA, generator)
    view = functional.gaussian_blur(view, [BLUR_KERNEL, BLUR_KERNEL], [sigma, sigma])
    mirrored = _uniform((0.0, 1.0), generator) < 0.5
    if flip and mirrored:
        view = functional.horizontal_flip(view)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (view + NOISE_STD * noise).clamp(0.0, 1.0)


def _uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator).item()


def _recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Five colour changes in a random order."""
    changes: list[tuple[Callable[[Tensor, float], Tensor], tuple[float, float]]] = [
        (functional.adjust_brightness, BRIGHTNESS),
        (functional.adjust_contrast, CONTRAST),
        (functional.adjust_saturation, SATURATION),
        (functional.adjust_hue, HUE),
        (lambda x, power: functional.adjust_gamma(x.clamp(_DARKEST, 1.0), power), GAMMA),
    ]
    for index in torch.randperm(len(changes), generator=generator).tolist():
        change, bounds = changes[index]
        images = change(images, _uniform(bounds, generator))
    return images


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, scaled and moved, the edge pixels repeated where the images end."""
    height, width = images.shape[2:]
    padded = functional.pad(images, [width // 2, height // 2], padding_mode="edge")
    angle, scale = _uniform(DEGREES, generator), _uniform(SCALE, generator)
    reach = [TRANSLATION * padded.shape[3], TRANSLATION * padded.shape[2]]
    translate = [float(round(_uniform((-pixels, pixels), generator))) for pixels in reach]
    moved = functional.affine(
        padded, angle, translate, scale, shear=[0.0, 0.0], interpolation=InterpolationMode.BILINEAR, fill=[0.0]
    )
    return functional.center_crop(moved, [height, width])
