r"""How far a batch lies from those before it, told before the model runs on it.

What enters the first adapted layer that runs depends on the images alone: no update has touched the layers before it.
Each image gives the mean and the log standard deviation of every channel there over its positions, 2C numbers x. The
distance of a batch B from the reference R (the images since the last restoration, of which at most ``WINDOW`` count) is

.. math:: D = \frac{1}{2C} \sum_c \frac{(\mu_{B,c} - \mu_{R,c})^2}{\sigma_c^2 \, (1/n_B + 1/n_R)}

with the variance :math:`\sigma_c^2` between images, pooled over B and R. Without a shift its expectation is 1 at every
batch size. Channels without any variance, which are dead or see the same in all images, tell nothing and do not count.
That statistics of a network's first layers tell a change of domain: Niloy et al., WACV 2024.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.errors import ModelError
from metaopt.models import SourceModel
from metaopt.norm_layers import channels_first, is_norm
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext
from metaopt.types import Parameters, widened

WINDOW = 2000.0  # images; an older past fades, so that the reference follows a slow drift
LEAST_FREEDOM = 8.0  # degrees of freedom below which a variance tells nothing
EPS = 1e-6
ROUNDING = 100.0  # squares of the type's relative precision
PIECE = 16  # images at a time on CPUs, whose caches hold what enters a layer then: a third of the time


class ShiftReference(NamedTuple):
    """Statistics of the images since the last restoration."""

    count: Tensor  # number of images, scalar
    mean: Tensor  # (2C,)
    variance: Tensor  # between images, unbiased, (2C,)


class _Reached(Exception):
    """The layer that is watched has its input: the rest of the forward pass is not needed."""


class ShiftDistance(Part):
    """Tells how far each batch lies from those before it, as the signal ``shift_distance``."""

    name = "shift_distance"
    helper = True

    def init(self, parameters: Parameters) -> ShiftReference:
        """No images yet; which layer runs first, and so the width, the first batch tells."""
        return init_reference(0, next(iter(parameters.values())).detach())

    def observe(self, context: StepContext) -> None:
        """The batch's statistics and its distance, without gradients."""
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in context.parameters))
        statistics = image_statistics(context.model, layers, context.images)
        context.signals["image_statistics"] = statistics
        context.signals["shift_distance"] = distance(self._reference(context), statistics)

    def restore(self, context: StepContext) -> None:
        """The batch joins those that the next ones are compared with."""
        merged_reference = merged(self._reference(context), context.signals["image_statistics"])
        context.remember(self.name, merged_reference)

    def _reference(self, context: StepContext) -> ShiftReference:
        reference, statistics = context.state[self.name], context.signals["image_statistics"]
        if len(reference.mean) == 0:
            return init_reference(statistics.shape[1] // 2, reference.mean)
        return reference


def init_reference(width: int, like: Tensor) -> ShiftReference:
    """No images yet, of a layer with ``width`` channels."""
    return ShiftReference(like.new_zeros(()), like.new_zeros(2 * width), like.new_zeros(2 * width))


def image_statistics(model: nn.Module, layers: str | Sequence[str], images: Tensor) -> Tensor:
    """x of each image, (B, 2C), without gradients; the forward pass ends where the layer begins.

    Args:
        model: source model.
        layers: name of the normalisation layer whose input is watched, or of several: then the first that runs is.
        images: (B, 3, H, W) in [0, 1].

    Raises:
        ModelError: none of them is a normalisation, or none runs.
    """
    named = [layers] if isinstance(layers, str) else layers
    modules = [module for module in map(model.get_submodule, named) if is_norm(module)]
    pieces = images.split(PIECE) if images.device.type == "cpu" else [images]
    found = []
    for piece in pieces:
        module, x = _first_input(modules, model, piece)
        modules = [module]
        found.append(_summary(x, channels_first=channels_first(module, x)))
    return torch.cat(found)


def _first_input(modules: Sequence[nn.Module], model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Which of a model's modules runs first, and what enters it."""
    found = []

    def reached(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((module, inputs[0].detach()))
        raise _Reached

    plainly = model.uncompiled() if isinstance(model, SourceModel) else nullcontext()
    with ExitStack() as hooks, torch.no_grad(), plainly, suppress(_Reached):
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(reached).remove)
        model(images)
    if not found:
        raise ModelError(
            "no adapted normalisation layer runs in a forward pass, so that no shift can be told; allowed is a model "
            "where one does: leave parts.restoration and parts.shift_distance out"
        )
    return found[0]


def _summary(x: Tensor, channels_first: bool) -> Tensor:
    """Mean and log standard deviation over the positions of each image, (B, 2C), in float32 at least."""
    x = widened(x)
    x = x.reshape(len(x), x.shape[1], -1) if channels_first else x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
    mean = x.mean(dim=2, keepdim=True)
    variance = (x - mean).square_().mean(dim=2)  # half the time of torch.var_mean, or of normalisation's own kernel
    return torch.cat([mean.squeeze(2), 0.5 * (variance + EPS).log()], dim=1)


def distance(reference: ShiftReference, x: Tensor) -> Tensor:
    """D, scalar; 1 while there is too little to compare.

    Args:
        reference: the images before.
        x: statistics of the batch's images, (B, 2C).
    """
    count, freedom = len(x), reference.count + len(x) - 2
    batch = x.var(dim=0, correction=0) * count
    pooled = (batch + (reference.count - 1).clamp_min(0) * reference.variance) / freedom.clamp_min(1)
    spread = pooled * (1 / count + 1 / reference.count.clamp_min(1))
    shift = (x.mean(dim=0) - reference.mean).square()
    # A variance that is no more than rounding in numbers of this size is none.
    rounding = (torch.finfo(x.dtype).eps * x.abs().amax(dim=0)).square() * ROUNDING
    told = shift / (spread + EPS**2)
    dead = ~torch.isfinite(told) | (pooled <= rounding)
    told = told.mean() if not bool(dead.any()) else told.masked_fill(dead, 0).sum() / (~dead).sum().clamp_min(1)
    nothing = (freedom < LEAST_FREEDOM) | (reference.count == 0) | dead.all()
    return torch.where(nothing, torch.ones_like(told), told)


def merged(reference: ShiftReference, x: Tensor) -> ShiftReference:
    """The reference with a batch's images added (the pairwise update of Chan et al., 1979)."""
    count = len(x)
    before = reference.count.clamp_max(WINDOW - count).clamp_min(0)
    total = before + count
    step = x.mean(dim=0) - reference.mean
    squares = (before - 1).clamp_min(0) * reference.variance + x.var(dim=0, correction=0) * count
    squares = squares + step.square() * before * count / total
    return ShiftReference(total, reference.mean + step * count / total, squares / (total - 1).clamp_min(1))
