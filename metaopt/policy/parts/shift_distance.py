r"""How far a batch lies from those before it, told before the model runs on it.

What enters the first adapted layer depends on the images alone: no update has touched the layers before it. Each image
gives the mean and the log standard deviation of every channel there over its positions, 2C numbers x. The distance of a
batch B from the reference R (the images since the last restoration, of which at most ``WINDOW`` count) is

.. math:: D = \frac{1}{2C} \sum_c \frac{(\mu_{B,c} - \mu_{R,c})^2}{\sigma_c^2 \, (1/n_B + 1/n_R)}

with the variance :math:`\sigma_c^2` between images, pooled over B and R. Without a shift its expectation is 1 at every
batch size. That statistics of a network's first layers tell a change of domain: Niloy et al., WACV 2024.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaopt.models import SourceModel
from metaopt.parameters import norm_kind
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext
from metaopt.types import Parameters

WINDOW = 2000.0  # images; an older past fades, so that the reference follows a slow drift
LEAST_FREEDOM = 8.0  # degrees of freedom below which a variance tells nothing
EPS = 1e-6
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
        """No images yet, of the layer whose tensors come first."""
        first = next(iter(parameters.values())).detach()
        return init_reference(first.shape[-1], first)

    def observe(self, context: StepContext) -> None:
        """The batch's statistics and its distance, without gradients."""
        layer = next(iter(context.parameters)).rpartition(".")[0]
        statistics = image_statistics(context.model, layer, context.images)
        context.signals["image_statistics"] = statistics
        context.signals["shift_distance"] = distance(context.state[self.name], statistics)

    def restore(self, context: StepContext) -> None:
        """The batch joins those that the next ones are compared with."""
        merged_reference = merged(context.state[self.name], context.signals["image_statistics"])
        context.remember(self.name, merged_reference)


def init_reference(width: int, like: Tensor) -> ShiftReference:
    """No images yet, of a layer with ``width`` channels."""
    return ShiftReference(like.new_zeros(()), like.new_zeros(2 * width), like.new_zeros(2 * width))


def image_statistics(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """x of each image, (B, 2C), without gradients; the forward pass ends where the layer begins.

    Args:
        model: source model.
        layer: name of the normalisation layer whose input is watched.
        images: (B, 3, H, W) in [0, 1].
    """
    module = model.get_submodule(layer)
    # Layers whose name ends so (timm's LayerNorm2d) take maps with the channels first, whatever they compute.
    first = norm_kind(module) in ("batch_norm", "group_norm") or type(module).__name__.endswith("2d")
    pieces = images.split(PIECE) if images.device.type == "cpu" else [images]
    return torch.cat([_summary(_input_of(module, model, piece), channels_first=first) for piece in pieces])


def _input_of(module: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """What enters a module of a model."""
    found = []

    def reached(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].detach())
        raise _Reached

    handle = module.register_forward_pre_hook(reached)
    plainly = model.uncompiled() if isinstance(model, SourceModel) else nullcontext()
    try:
        with torch.no_grad(), plainly:
            model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _summary(x: Tensor, channels_first: bool) -> Tensor:
    """Mean and log standard deviation over the positions of each image, (B, 2C)."""
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
    told = ((x.mean(dim=0) - reference.mean).square() / (spread + EPS**2)).mean()
    return torch.where((freedom < LEAST_FREEDOM) | (reference.count == 0), torch.ones_like(told), told)


def merged(reference: ShiftReference, x: Tensor) -> ShiftReference:
    """The reference with a batch's images added (the pairwise update of Chan et al., 1979)."""
    count = len(x)
    before = reference.count.clamp_max(WINDOW - count).clamp_min(0)
    total = before + count
    step = x.mean(dim=0) - reference.mean
    squares = (before - 1).clamp_min(0) * reference.variance + x.var(dim=0, correction=0) * count
    squares = squares + step.square() * before * count / total
    return ShiftReference(total, reference.mean + step * count / total, squares / (total - 1).clamp_min(1))
