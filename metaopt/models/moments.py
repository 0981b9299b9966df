"""Mean and variance of each channel of a batch."""

import torch
from torch import Tensor


@torch.no_grad()
def channel_moments(x: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), in the type of ``near`` or, without it, of ``x``.

    Args:
        x: (B, C, ...).
        near: numbers that may be near the means, (C,); they help where devices have no kernel of their own.
    """
    if x.device.type in ("cpu", "cuda"):
        # The kernel that batch normalisation itself has for them: one pass, no temporary.
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        return (mean.to(x), variance.to(x)) if near is None else (mean.to(near), variance.to(near))
    return moments_about(x, x.new_zeros(x.shape[1]) if near is None else near)


def moments_about(x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), on any device; about ``near``, for large squares lose digits."""
    dims = [0, *range(2, x.ndim)]
    away = x - near.view(-1, *[1] * (x.ndim - 2))
    offset = away.mean(dims)
    return near + offset, away.square_().mean(dims) - offset.square()
