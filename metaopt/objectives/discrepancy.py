"""Discrepancy between a batch's features and the source's (MGG, arXiv 2412.16901, section 3).

D = (12 / L) Σ_l ‖μ_l(B) − μ_l(S)‖² + ‖σ_l(B) − σ_l(S)‖²

over the L blocks of the model, with mean μ and biased standard deviation σ of each feature over the samples. The factor
keeps a weight comparable between depths: the published weights are for the 12 blocks of a ViT-B.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.types import SourceStatistics

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
