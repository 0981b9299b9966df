r"""The source's statistics as a prior on the batch's: what BatchNorm normalises by where a batch says too little.

Schneider et al. (NeurIPS 2020, section 2) count the source's statistics as N images beside the n of the batch:

.. math:: \bar\mu = \tfrac{N}{N+n}\,\mu_S + \tfrac{n}{N+n}\,\mu_B, \qquad
    \bar\sigma^2 = \tfrac{N}{N+n}\,\sigma_S^2 + \tfrac{n}{N+n}\,\sigma_B^2.

Here each layer has an N of its own, which can be learned. The layer still normalises by the batch; a weight and a bias
take the result to where the mixture would have it:

.. math:: \gamma\,\frac{x-\bar\mu}{\bar\sigma} + \beta = \gamma\frac{\sigma_B}{\bar\sigma}\,\frac{x-\mu_B}{\sigma_B}
    + \Big(\beta + \gamma\,\frac{\mu_B-\bar\mu}{\bar\sigma}\Big).

So torch's own kernel runs, backward keeps one activation as before, and whatever stores that kernel's input in few bits
goes on doing so. Backward takes the batch's statistics *in these factors* as constants.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from metaopt.errors import ModelError
from metaopt.types import HALF, widened


def prior_layers(module: nn.Module) -> list[str]:
    """Names of the layers that a prior can act on, in the module's order: BatchNorm with the source's statistics."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    ]


class SourcePrior(TorchFunctionMode):
    """Within it, BatchNorm layers of ``module`` normalise by the mixture; their buffers stay untouched.

    A layer with one value for each channel (of a single image, behind the pooling) has no spread to go by: it takes the
    source's statistics. Statistics and affine tensors are float32 at least, whatever the maps' type.

    Args:
        module: the network, in ``eval()``.
        counts: N of each layer of :func:`prior_layers`, (L,), at least 0; or one for all, (); None: the batch alone.

    Raises:
        ModelError: another number of counts than the module has such layers.
    """

    def __init__(self, module: nn.Module, counts: Tensor | None) -> None:
        super().__init__()
        names = prior_layers(module)
        if counts is not None and counts.ndim > 0 and len(counts) != len(names):
            raise ModelError(
                f"the prior has {len(counts)} counts and {type(module).__name__} has {len(names)} BatchNorm layers "
                "with source statistics; allowed is one count for each, or a single one"
            )
        self._counts: dict[int, Tensor | None] = {
            id(module.get_submodule(name).running_mean): counts if counts is None or counts.ndim == 0 else counts[place]
            for place, name in enumerate(names)
        }

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Everything runs as it is but the normalisation of those layers."""
        named = kwargs or {}
        if func is functional.batch_norm:
            source_mean = args[1] if len(args) > 1 else named.get("running_mean")
            if id(source_mean) in self._counts:
                return _normalised(self._counts[id(source_mean)], *args, **named)
        return func(*args, **named)


@torch.no_grad()
def channel_moments(x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (B, C, ...), (C,), in the type of ``near``: see `moments_about`."""
    if x.device.type in ("cpu", "cuda"):
        # The kernel that batch normalisation itself has for them: one pass, no temporary.
        # In half precision it rounds what it finds, unless it has statistics of a wider type to update.
        unused = (near.new_zeros(len(near)), near.new_ones(len(near))) if x.dtype in HALF else (None, None)
        mean, variance = torch.batch_norm_update_stats(x, *unused, 0.0)
        return mean.to(near), variance.to(near)
    return moments_about(x, near)


def moments_about(x: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), on any device; about ``near``, for large squares lose digits."""
    dims = [0, *range(2, x.ndim)]
    away = x - near.view(-1, *[1] * (x.ndim - 2))
    offset = away.mean(dims)
    return near + offset, away.square_().mean(dims) - offset.square()


def _normalised(
    count: Tensor | None,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm by the mixture; arguments are its own."""
    running_mean, running_var = widened(running_mean), widened(running_var)
    weight, bias = (None if tensor is None else widened(tensor) for tensor in (weight, bias))
    if input.numel() == input.shape[1]:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if count is None:
        return functional.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    mean, variance = channel_moments(input, running_mean)
    share = input.shape[0] / (input.shape[0] + count.to(mean))
    mixed = torch.lerp(running_var, variance, share)
    if not torch.is_grad_enabled():  # nothing to take back: one pass less, for the statistics are known
        centre = torch.lerp(running_mean, mean, share)
        return functional.batch_norm(input, centre, mixed, weight, bias, False, momentum, eps)
    scale = ((variance + eps) / (mixed + eps)).sqrt()
    shift = (mean - torch.lerp(running_mean, mean, share)) * (mixed + eps).rsqrt()
    if weight is not None:
        scale, shift = weight * scale, weight * shift
    return functional.batch_norm(input, None, None, scale, shift if bias is None else bias + shift, True, momentum, eps)
