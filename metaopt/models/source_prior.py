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

Where batches hold a few classes alone, their statistics differ from the source's without any shift. A
:class:`Shrinkage` takes them as far as they differ by more (`metaopt.policy.parts.class_skew`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from metaopt.errors import ModelError
from metaopt.types import HALF, widened


def prior_layers(module: nn.Module) -> list[str]:
    """Names of the layers that a prior can act on, in the module's order: BatchNorm with the source's statistics."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    ]


class ChannelMoments(NamedTuple):
    """Mean and biased variance of what enters the layers of :func:`prior_layers`, one layer behind the other."""

    count: Tensor  # M, the images that they tell of, ()
    mean: Tensor  # (C_1 + ... + C_L,)
    variance: Tensor


class Shrinkage(NamedTuple):
    r"""Statistics are shrunk to the source's: V of their squared distance D from it is there without any shift.

    With batch and stream together, by their images, as :math:`\mu_J, \sigma_J^2`, a layer normalises by

    .. math:: \mu_S + w\,(\mu_J - \mu_S), \quad \sigma_S^2 + w\,(\sigma_J^2 - \sigma_S^2), \qquad
        w = \max(0, 1 - V / D), \quad D = \mathrm{mean}_c\, (\mu_J - \mu_S)_c^2 / \sigma_{S,c}^2

    (the positive-part estimator of James and Stein, 1961, of the shift).
    """

    unshifted: Tensor  # V of each layer of `prior_layers`, (L,)


Recorded = dict[int, tuple[Tensor, Tensor]]
"""Mean and variance of a batch at each layer, by its place in `prior_layers`; the source's where it did not run."""


class SourcePrior(TorchFunctionMode):
    """Within it, BatchNorm layers of ``module`` normalise by the mixture; their buffers stay untouched.

    A layer with one value for each channel (of a single image, behind the pooling) has no spread to go by: it takes the
    source's statistics. Statistics and affine tensors are float32 at least, whatever the maps' type.

    Args:
        module: the network, in ``eval()``.
        counts: N of each layer of :func:`prior_layers`, (L,), at least 0; or one for all, (); None: the batch alone. Or
            how statistics are shrunk to the source's.
        stream: counts beside the source, for M images; None or without images: nothing does.
        record: where the batch's own moments go, of each layer's first call; None: nowhere.

    Raises:
        ModelError: another number of counts than the module has such layers.
    """

    def __init__(
        self,
        module: nn.Module,
        counts: Tensor | Shrinkage | None,
        stream: ChannelMoments | None = None,
        record: Recorded | None = None,
    ) -> None:
        super().__init__()
        names = prior_layers(module)
        given = counts.unshifted if isinstance(counts, Shrinkage) else counts
        if given is not None and given.ndim > 0 and len(given) != len(names):
            raise ModelError(
                f"the prior has {len(given)} counts and {type(module).__name__} has {len(names)} BatchNorm layers "
                "with source statistics; allowed is one count for each, or a single one"
            )
        layers = [module.get_submodule(name) for name in names]
        self._record = record
        self._places = {id(layer.running_mean): place for place, layer in enumerate(layers)}
        self._shrinkage = counts if isinstance(counts, Shrinkage) else None
        self._sources = [(widened(mean), widened(variance)) for mean, variance in map(_buffers, layers)]
        self._references = _references(layers, None if isinstance(counts, Shrinkage) else counts, stream)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Everything runs as it is but the normalisation of those layers."""
        named = kwargs or {}
        if func is functional.batch_norm:
            source_mean = args[1] if len(args) > 1 else named.get("running_mean")
            place = self._places.get(id(source_mean))
            if place is not None:
                return self._normalised(place, *args, **named)
        return func(*args, **named)

    def _normalised(
        self,
        place: int,
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
        (source_mean, source_variance), count = self._sources[place], self._references[place].count
        mixes = count is not None or self._shrinkage is not None
        weight, bias = (None if tensor is None else widened(tensor) for tensor in (weight, bias))
        if input.numel() == input.shape[1]:
            if self._record is not None:
                self._record.setdefault(place, (source_mean, source_variance))
            return functional.batch_norm(input, source_mean, source_variance, weight, bias, False, momentum, eps)
        if not mixes and self._record is None:
            return functional.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        mean, variance = channel_moments(input, source_mean)
        if self._record is not None:
            self._record.setdefault(place, (mean, variance))
        if not mixes:
            return functional.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        centre, mixed = self._mixture(place, input.shape[0], mean, variance, eps)
        if not torch.is_grad_enabled():  # nothing to take back: one pass less, for the statistics are known
            return functional.batch_norm(input, centre, mixed, weight, bias, False, momentum, eps)
        scale = ((variance + eps) / (mixed + eps)).sqrt()
        shift = (mean - centre) * (mixed + eps).rsqrt()
        if weight is not None:
            scale, shift = weight * scale, weight * shift
        shift = shift if bias is None else bias + shift
        return functional.batch_norm(input, None, None, scale, shift, True, momentum, eps)

    def _mixture(self, place: int, images: int, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """What a layer normalises by, mean and variance, (C,), where a batch of so many images has these."""
        count, other_mean, other_variance = self._references[place]
        if count is not None:
            share = images / (images + count.to(mean))
            if self._shrinkage is not None:  # of both sets of images together
                variance = variance + (1 - share) * (mean - other_mean).square()
            mean, variance = torch.lerp(other_mean, mean, share), torch.lerp(other_variance, variance, share)
        if self._shrinkage is None:
            return mean, variance
        source_mean, source_variance = self._sources[place]
        distance = ((mean - source_mean).square() / (source_variance + eps)).mean()
        share = (1 - self._shrinkage.unshifted[place].to(distance) / distance.clamp_min(1e-12)).clamp_min(0)
        return torch.lerp(source_mean, mean, share), torch.lerp(source_variance, variance, share)


class _Reference(NamedTuple):
    """What a layer's batch is mixed with."""

    count: Tensor | None  # images that it counts for; None: it does not
    mean: Tensor  # (C,)
    variance: Tensor

    def joined(self, count: Tensor, mean: Tensor, variance: Tensor) -> "_Reference":
        """This and other moments, by their counts."""
        total = count if self.count is None else self.count.to(count) + count
        share = torch.where(total > 0, count / total.clamp_min(1e-12), 0.0)
        return _Reference(total, torch.lerp(self.mean, mean, share), torch.lerp(self.variance, variance, share))


def _buffers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance of one of the :func:`prior_layers`."""
    return cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)


def _references(layers: Sequence[nn.Module], counts: Tensor | None, stream: ChannelMoments | None) -> list[_Reference]:
    each = [counts] * len(layers) if counts is None or counts.ndim == 0 else [*counts]
    found = [_Reference(count, *map(widened, _buffers(layer))) for count, layer in zip(each, layers, strict=True)]
    if stream is None or stream.mean.numel() == 0:
        return found
    sizes = [len(reference.mean) for reference in found]
    pieces = zip(found, stream.mean.split(sizes), stream.variance.split(sizes), strict=True)
    return [reference.joined(stream.count, mean, variance) for reference, mean, variance in pieces]


def running_statistics(
    module: nn.Module, counts: Tensor | None, stream: ChannelMoments
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of each layer of :func:`prior_layers` by source and stream, each a (C,); arguments as above."""
    layers = [module.get_submodule(name) for name in prior_layers(module)]
    references = _references(layers, counts, stream)
    return [reference.mean for reference in references], [reference.variance for reference in references]


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


def recording_hooks(module: nn.Module, record: Recorded) -> list[RemovableHandle]:
    """Hooks that note the moments of what enters each layer of :func:`prior_layers`, at its first call."""

    def noting(place: int, near: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if place not in record:
                record[place] = channel_moments(inputs[0].detach(), near)

        return hook

    layers = [module.get_submodule(name) for name in prior_layers(module)]
    return [layer.register_forward_pre_hook(noting(place, _buffers(layer)[0])) for place, layer in enumerate(layers)]


def complete(record: Recorded, module: nn.Module) -> None:
    """Give layers that did not run the source's own moments."""
    for place, name in enumerate(prior_layers(module)):
        layer = module.get_submodule(name)
        record.setdefault(place, _buffers(layer))


@torch.no_grad()
def merged_moments(known: ChannelMoments, record: Recorded, images: int, window: float) -> ChannelMoments:
    """The moments with a batch's added, of which all together count for ``window`` images at most: the past fades.

    Args:
        known: of the images before; without any it is empty.
        record: of the batch, at every layer.
        images: n of the batch.
        window: the most that they count for.
    """
    mean, variance = (torch.cat([record[place][which].detach() for place in sorted(record)]) for which in (0, 1))
    if known.mean.numel() == 0:
        return ChannelMoments(known.count.new_full((), min(images, window)), mean, variance)
    before = known.count.clamp_max(max(window - images, 0.0))
    share = images / (before + images)
    apart = (mean - known.mean).square() * (share * (1 - share))
    total = (before + images).clamp_max(window)
    variance = torch.lerp(known.variance, variance, share) + apart
    return ChannelMoments(total, torch.lerp(known.mean, mean, share), variance)
