"""Discrepancy between a batch's features and the source's (MGG, arXiv 2412.16901, section 3).

D = (12 / L) Σ_l ‖μ_l(B) − μ_l(S)‖² + ‖σ_l(B) − σ_l(S)‖²

over the L blocks of the model, with mean μ and biased standard deviation σ of each feature over the samples. The factor
keeps a weight comparable between depths: the published weights are for the 12 blocks of a ViT-B.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError, DataError, ModelError
from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput, SourceStatistics

REFERENCE_BLOCKS = 12
"""Depth of the model that the published weights of this term belong to (ViT-B)."""


def biased_std(features: Tensor) -> Tensor:
    """Biased standard deviation over the samples of ``features`` (B, D), shape (D,).

    A constant feature has standard deviation zero, with zero first and second derivatives; so has one that varies less
    than the rounding of its mean, or so little that its variance is subnormal.
    """
    variance, mean = torch.var_mean(features, dim=0, correction=0)  # (D,), (D,)
    precision = torch.finfo(variance.dtype)
    varies = variance > (4 * precision.eps * mean).square() + precision.tiny
    # Two wheres: with the outer one alone, the derivative of sqrt(0) would still come back as 0 · inf = NaN.
    return torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)


def feature_discrepancy(features: Sequence[Tensor], statistics: SourceStatistics | None) -> Tensor:
    """Squared distance of the batch's feature mean and std from the source's, over features and blocks: a scalar.

    ``features`` holds one (B, D_l) per block. Differentiable twice, also where a feature is constant over the batch.

    Raises:
        ConfigError: no statistics, no features, or statistics of other blocks than the features come from.
    """
    _check_blocks(features, statistics)
    assert statistics is not None
    distances = []
    for block, source_mean, source_std in zip(features, statistics.mean, statistics.std, strict=True):
        mean_gap = block.mean(dim=0) - source_mean.to(block)
        std_gap = biased_std(block) - source_std.to(block)
        distances.append(mean_gap.square().sum() + std_gap.square().sum())
    return torch.stack(distances).sum() * (REFERENCE_BLOCKS / len(features))


def _check_blocks(features: Sequence[Tensor], statistics: SourceStatistics | None) -> None:
    if statistics is None:
        raise ConfigError(
            "the objective's term 'discrepancy' has no source statistics to compare with; give clean unlabeled source "
            "images (source.images=PATH.npy, or source_statistics(model, images) in code) or drop the term"
        )
    if not features:
        raise ConfigError(
            "the objective's term 'discrepancy' got 0 feature blocks, needs at least 1; "
            "call the source model with features=True"
        )
    met = [block.shape[1] for block in features]
    known = [mean.shape[0] for mean in statistics.mean]
    if met != known:
        raise ConfigError(
            f"the features have widths {met} per block but the source statistics {known}; "
            "they belong to another model: take them anew with source_statistics(model, images)"
        )


class Discrepancy(Term):
    """Distance of the batch's feature statistics from the source's (MGG)."""

    per_sample = False
    needs = frozenset({"features"})

    def __init__(self) -> None:
        super().__init__()
        self.statistics: SourceStatistics | None = None

    def forward(self, output: ForwardOutput) -> Tensor:
        """A scalar."""
        return feature_discrepancy(output.features, self.statistics)

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int) -> None:
        """Take the source's statistics, unless they are there."""
        self.statistics = self.statistics or source_statistics(model, images(), batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The statistics."""
        known = self.statistics
        return {} if known is None else {"mean": [m.cpu() for m in known.mean], "std": [s.cpu() for s in known.std]}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a statistic is not finite, or they are no pairs of mean and deviation, each (D,).
        """
        self.statistics = None
        if not values:
            return
        statistics = SourceStatistics(tuple(values["mean"]), tuple(values["std"]))
        for mean, std in zip(statistics.mean, statistics.std, strict=True):
            if mean.ndim != 1 or mean.shape != std.shape or not mean.is_floating_point() or mean.dtype != std.dtype:
                raise ValueError("the source's statistics are no means and deviations of the same features")
            if not bool(torch.isfinite(torch.stack([mean, std])).all()) or bool((std < 0).any()):
                raise ValueError("the source's statistics hold NaN or infinity, or a negative deviation")
        self.statistics = statistics

    def _apply(self, fn: Any, recurse: bool = True) -> "Discrepancy":
        """What ``to`` calls: the statistics move as buffers do."""
        super()._apply(fn, recurse)
        if self.statistics is not None:
            mean, std = (tuple(fn(tensor) for tensor in each) for each in (self.statistics.mean, self.statistics.std))
            self.statistics = SourceStatistics(mean, std)
        return self


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
