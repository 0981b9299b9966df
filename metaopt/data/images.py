"""Image sets, the checks that every image tensor passes, and the way from bytes to floats and back."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metaopt.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """RGB images as bytes, with or without labels.

    Raises:
        DataError: a tensor has the wrong shape or type, or the set is empty.
    """

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor | None = None  # (N,) int64

    def __post_init__(self) -> None:
        # Once, so that nobody downstream has to.
        if self.images.dtype != torch.uint8:
            raise DataError(f"images have type {self.images.dtype}: an image set holds uint8; scale to 0..255 and cast")
        check_image_shape(self.images)
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64:
            raise DataError(f"labels have type {self.labels.dtype}: class indices are int64; cast them")
        if self.labels.shape != (len(self),):
            raise DataError(
                f"labels have shape {tuple(self.labels.shape)}: {len(self)} images need ({len(self)},); pair them again"
            )
        if int(self.labels.min()) < 0:
            raise DataError(f"a label is {int(self.labels.min())}: class indices start at 0; renumber them")

    def __len__(self) -> int:
        """Number of images."""
        return self.images.shape[0]

    def take(self, limit: int | None) -> "ImageSet":
        """The first ``limit`` images; all of them for ``None`` or where there are fewer."""
        if limit is None:
            return self
        if limit < 1:
            raise DataError(f"the limit is {limit}: at least 1 image is needed; give a larger one or none at all")
        return ImageSet(self.images[:limit], None if self.labels is None else self.labels[:limit])

    def check_classes(self, num_classes: int, *, kept: bool = False) -> None:
        """Refuse labels that a model of ``num_classes`` outputs cannot predict.

        Args:
            num_classes: C.
            kept: whether these are only some of the network's classes, so that labels count within them.
        """
        if self.labels is None or (highest := int(self.labels.max())) < num_classes:
            return
        if kept:
            raise DataError(
                f"a label is {highest}: model.classes keeps {num_classes} classes, which labels call "
                f"0..{num_classes - 1} in that order; renumber the labels, or leave model.classes out"
            )
        raise DataError(
            f"a label is {highest}: the model has classes 0..{num_classes - 1}; use labels and model of the same task, "
            "with model.num_classes as in the checkpoint"
        )


def check_image_shape(images: Tensor, channels: int = 3) -> None:
    """Refuse anything but a non-empty (B, channels, H, W) tensor."""
    if images.ndim != 4 or images.shape[1] != channels:
        shape, fix = f"images have shape {tuple(images.shape)}", "permute or stack them"
        if channels == 3:
            raise DataError(f"{shape}: (B, 3, H, W) RGB is needed; {fix}")
        raise DataError(f"{shape}; allowed is (B, {channels}, H, W): {fix}, or give SourceModel other mean and std")
    if images.numel() == 0:
        raise DataError(f"images have shape {tuple(images.shape)}: at least one image is needed; the set is empty")


def validate_images(images: Tensor, channels: int = 3) -> Tensor:
    """The images themselves, after checking that they are what a source model takes.

    Args:
        images: (B, channels, H, W) floating point, finite, in [0, 1].
        channels: as many as the model takes.

    Raises:
        DataError: wrong shape, type or range, NaN or infinity, or an empty batch.
    """
    check_image_shape(images, channels)
    if not images.is_floating_point():
        raise DataError(f"images have type {images.dtype}: floats in [0, 1] are needed; divide bytes by 255")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("images hold NaN or infinity: finite values in [0, 1] are needed; clean them first")
    if low < 0 or high > 1:
        raise DataError(
            f"images lie in [{low:.4g}, {high:.4g}]: [0, 1] is needed; scale them and leave normalising to the model"
        )
    return images


def to_float(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Bytes (B, 3, H, W) as float32 in [0, 1] on ``device``."""
    return images.to(device).to(torch.float32) / 255


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] as the nearest bytes; undoes ``to_float`` exactly."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
