"""What a stream hands to a deployed model: converted where that is sure, refused where answers would be silently wrong.

Single broken images, with NaN or with a pixel that no camera gives, are told apart: the rest of their batch goes on as
if it had come alone. Images that are scaled otherwise as a whole are a mistake of the caller, and refused.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt.errors import DataError

Images = Tensor | np.ndarray
"""A batch as `as_images` takes it."""

SLACK = 0.5  # how far beyond [0, 1] a pixel of an intact image may lie; resizing overshoots by less than 0.2
LARGEST = 1000.0  # beyond that no scaling is the reason: bytes as floats end at 255, normalised images before 10
SCALED_PIXELS = 0.01  # share of an image's pixels that lie outside where it is scaled otherwise, and not just damaged


def as_images(given: Any, like: Tensor) -> Tensor:
    """The batch as floats on the device of ``like``, in its type, or in float32 where that is a shorter one.

    Args:
        given: (B, C, H, W), a tensor or an array: floats in [0, 1], or bytes in 0..255.
        like: a tensor of the model.

    Raises:
        DataError: something else, which the message names: a pair with labels, a single image, channels last, no image
            at all, another type.
    """
    if isinstance(given, np.ndarray):
        try:
            given = torch.from_numpy(np.ascontiguousarray(given))
        except TypeError as error:
            raise DataError(f"images are an array of {given.dtype}; allowed are floats in [0, 1] or bytes") from error
    if not isinstance(given, Tensor):
        raise DataError(
            f"images are a {type(given).__name__}{_hint(given)}; allowed is a tensor (B, 3, H, W) in [0, 1]"
        )
    if given.ndim != 4:
        fix = "add a dimension by images[None]" if given.ndim == 3 else "give a batch of images"
        raise DataError(f"images have shape {tuple(given.shape)}; allowed is (B, 3, H, W): {fix}")
    if given.numel() == 0:
        raise DataError(
            f"images have shape {tuple(given.shape)}; at least one image is needed: leave empty batches out"
        )
    if given.shape[-1] in (1, 3, 4) and given.shape[1] > 4:
        raise DataError(
            f"images have shape {tuple(given.shape)}, with the channels last; allowed is (B, 3, H, W): "
            "use images.permute(0, 3, 1, 2)"
        )
    kind = torch.promote_types(like.dtype, torch.float32)
    if given.dtype == torch.uint8:
        return given.detach().to(like.device).to(kind) / 255
    if not given.is_floating_point():
        raise DataError(
            f"images have type {given.dtype}; allowed are floats in [0, 1], or bytes (torch.uint8): convert them"
        )
    return given.detach().to(like.device, kind)


def _hint(given: Any) -> str:
    if isinstance(given, tuple | list) and len(given) == 2 and hasattr(given[0], "ndim"):
        return ", perhaps with labels beside the images: give the images alone, batch[0]"
    return " of images: stack them by torch.stack" if isinstance(given, list) else ""


def intact_images(images: Tensor) -> Tensor | None:
    """Which images can be used, (B,) of truth values; None where all can.

    An image is broken where a pixel is not finite, or lies far outside [0, 1].

    Args:
        images: (B, C, H, W), as `as_images` gives them.

    Raises:
        DataError: most of the images are scaled otherwise: bytes as floats, or normalised already.
    """
    least, most = torch.stack(images.aminmax()).tolist()  # NaN goes through, and is no number in the range
    if least >= -SLACK and most <= 1 + SLACK:
        return None
    low, high = images.flatten(1).aminmax(dim=1)  # (B,)
    intact = (low >= -SLACK) & (high <= 1 + SLACK)
    _check_scale(images, intact, low, high)
    return intact


def _check_scale(images: Tensor, intact: Tensor, low: Tensor, high: Tensor) -> None:
    """Refuse a batch most of whose images are finite, and outside [0, 1] at many pixels."""
    outside = ~intact & (low >= -LARGEST) & (high <= LARGEST)  # NaN is neither
    if 2 * int(outside.sum()) <= int((intact | outside).sum()):
        return
    pixels = images[outside]
    share = ((pixels < -SLACK) | (pixels > 1 + SLACK)).flatten(1).float().mean(dim=1)
    if float(share.median()) < SCALED_PIXELS:
        return
    least, most = float(low[outside].min()), float(high[outside].max())
    reason = "bytes as floats: divide them by 255" if least >= 0 else "normalised already: leave that to the model"
    raise DataError(f"images lie in [{least:.4g}, {most:.4g}]; allowed is [0, 1]: they look {reason}")
