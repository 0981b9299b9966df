r"""How much a network's statistics differ between images and between classes, without any shift.

A few clean images tell it, by the classes that the network itself predicts for them. In units of the variance that a
BatchNorm layer has from the source, the means of a layer's channels over the positions of single images vary by

.. math:: A = \mathrm{mean}_c\, \mathrm{var}_i(m_{i,c}) / \sigma_{S,c}^2, \qquad
    C = \mathrm{mean}_c\, \mathrm{var}_k(\mathrm{E}[m_{i,c} \mid k]) / \sigma_{S,c}^2

between images i and between classes k. The mean of n images of one class is expected to have A / n + C of squared
distance from the mean of all; of n images in a random order, A / n (the design effect of a cluster sample: Kish, Survey
Sampling, 1965). The clean images' own distance F from the source's statistics comes on top: those were taken of other
images, at other weights.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from metaopt.models.source_model import SourceModel
from metaopt.models.source_prior import prior_layers
from metaopt.types import widened

LEAST = 3  # images of a class, below which it tells nothing of its mean


class ClassVariation(NamedTuple):
    """What clean images tell, at each layer of :func:`prior_layers`."""

    between_images: Tensor  # A, (L,)
    between_classes: Tensor  # C, (L,)
    offset: Tensor  # F, (L,)
    predicted: Tensor  # class of each image, (n,)


@torch.no_grad()
def class_variation(model: SourceModel, images: Tensor, batch_size: int = 64) -> ClassVariation:
    """Variation between clean images and between the classes predicted for them.

    Args:
        model: source model; a layer that it runs several times counts as at its first.
        images: clean, (n, 3, H, W) in [0, 1].
        batch_size: images at a time.
    """
    layers = [model.module.get_submodule(name) for name in prior_layers(model.module)]
    means: list[list[Tensor]] = [[] for _ in layers]
    predicted = []
    for part in images.split(batch_size):
        seen: set[int] = set()

        def noting(place: int, seen: set[int] = seen) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if place not in seen:
                    seen.add(place)
                    x = widened(inputs[0])
                    means[place].append(x.flatten(2).mean(dim=2) if x.ndim > 2 else x)

            return hook

        handles = [layer.register_forward_pre_hook(noting(place)) for place, layer in enumerate(layers)]
        try:
            with model.uncompiled():
                predicted.append(model(part).logits.argmax(dim=1))
        finally:
            for handle in handles:
                handle.remove()
    classes = torch.cat(predicted)
    rows = []
    for each, layer in zip(means, layers, strict=True):
        scale = widened(cast(Tensor, layer.running_var)) + cast(float, layer.eps)
        of_images = torch.cat(each) if each else widened(cast(Tensor, layer.running_mean)).expand(2, -1)
        offset = (of_images.mean(dim=0) - widened(cast(Tensor, layer.running_mean))).square() / scale
        rows.append(torch.stack([*variation(of_images, classes[: len(of_images)], scale), offset.mean()]))
    found = torch.stack(rows, dim=1) if rows else images.new_zeros(3, 0)
    return ClassVariation(found[0], found[1], found[2], classes)


def variation(values: Tensor, classes: Tensor, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """A and C of what each image gives, two scalars; C is A where no class has images enough.

    Args:
        values: (n, d).
        classes: of each image, (n,).
        scale: the variance that both are told in, (d,).
    """
    total = values.var(dim=0, correction=1 if len(values) > 1 else 0) / scale
    found = []
    for label in classes.unique():
        own = values[classes == label]
        if len(own) >= LEAST:
            # What the images of a class differ in by themselves is no difference between classes.
            chance = own.var(dim=0) / len(own)
            found.append(((own.mean(dim=0) - values.mean(dim=0)).square() - chance) / scale)
    between = torch.stack(found).mean(dim=0) if found else total
    return total.mean(), between.mean().clamp(0).minimum(total.mean())
