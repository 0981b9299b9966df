"""Feature statistics of the source, which the discrepancy compares a batch with."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError, DataError, ModelError
from metaopt.types import ForwardOutput, SourceStatistics


@torch.no_grad()
def source_statistics(model: nn.Module, images: Tensor, batch_size: int = 64) -> SourceStatistics:
    """Mean and biased std of each block's features over clean source images, in source mode (running BN statistics).

    Args:
        model: a ``SourceModel``, or anything that is called as it: ``model(images, features=True) -> ForwardOutput``.
        images: (N, 3, H, W), float in [0, 1] or uint8; they may lie on another device than the model.
        batch_size: images per forward pass; it changes the result by rounding alone.

    Returns:
        Statistics on the model's device, in the features' type.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        DataError: no images, images that are not (N, 3, H, W), or features that are not finite on them.
        ModelError: the model has no feature blocks.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, must be at least 1; choose such a one")
    if images.ndim != 4 or len(images) == 0:
        raise DataError(
            f"source images have shape {tuple(images.shape)}, must be (N, 3, H, W) with N of at least 1; "
            "give at least one clean image"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    forward = cast(Callable[..., ForwardOutput], model)
    moments: list[_RunningMoments] = []
    features: tuple[Tensor, ...] = ()
    for batch in images.split(batch_size):
        scale = 1 if batch.is_floating_point() else 255
        features = forward(batch.to(like) / scale, features=True).features
        moments = moments or [_RunningMoments(block.shape[1]) for block in features]
        for moment, block in zip(moments, features, strict=True):
            moment.add(block)
    if not features:
        raise ModelError(
            "the model gave 0 feature blocks, needs at least 1; name its blocks: SourceModel(..., blocks=[...])"
        )
    for index, moment in enumerate(moments):
        if not torch.isfinite(moment.squares).all():
            raise DataError(
                f"features of block {index} are not finite on the source images, must be; "
                "check the images for NaN and the checkpoint for the right model"
            )
    return SourceStatistics(
        mean=tuple(moment.mean.to(block) for moment, block in zip(moments, features, strict=True)),
        std=tuple(moment.std().to(block) for moment, block in zip(moments, features, strict=True)),
    )


class _RunningMoments:
    """Mean and sum of squared deviations, merged batch by batch without cancellation (Chan, Golub and LeVeque, 1983).

    In float64 on the CPU, as some accelerators have no float64.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in one batch (B, D)."""
        features = features.cpu().double()
        count = len(features)
        total = self.count + count
        mean = features.mean(dim=0)
        gap = mean - self.mean
        self.squares += (features - mean).square().sum(dim=0) + gap.square() * (self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total

    def std(self) -> Tensor:
        """Biased standard deviation of all that was taken in."""
        return (self.squares / self.count).sqrt()
