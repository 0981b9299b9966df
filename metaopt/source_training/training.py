"""Supervised training of a classifier on a small labelled image set that fits in memory, and its recipes."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaopt.data.images import ImageSet, to_float
from metaopt.errors import DataError
from metaopt.evaluation import ProgressBar


@dataclass(frozen=True)
class Recipe:
    """One training run: optimizer, schedule and augmentation.

    The learning rate rises over the first fifth of the steps to ``lr`` and falls to zero along a cosine (Smith and
    Topin 2019, "Super-Convergence").
    """

    optimizer: str  # "sgd" (Nesterov momentum 0.9) or "adamw" (betas 0.9, 0.99)
    lr: float  # highest learning rate
    epochs: int
    batch_size: int = 50
    weight_decay: float = 5e-4  # of weights with more than one axis: neither norm layers nor biases
    label_smoothing: float = 0.05
    max_shift: float = 2.0  # pixels, in each direction
    max_rotation: float = 10.0  # degrees, both ways
    max_scale: float = 0.1  # relative, both ways
    max_gradient_norm: float = 1.0


RECIPES = {
    "cifar_resnet20": Recipe(optimizer="sgd", lr=0.1, epochs=20),
    "cifar_resnet56": Recipe(optimizer="sgd", lr=0.1, epochs=15),
    "digits_vit": Recipe(optimizer="adamw", lr=1e-3, epochs=50, weight_decay=0.05),
}
"""Recipe of every model that can be trained on the digits, by its name."""


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Shift, turn and scale each image by its own small random amounts; edges are repeated outwards.

    Args:
        images: (B, 3, H, W) in [0, 1].
        recipe: the largest amounts.
        generator: on the CPU, so that the draws do not depend on the device.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    count, _, height, width = images.shape
    draws = torch.rand(count, 4, generator=generator).mul(2).sub(1).to(images)  # in [-1, 1)
    angle = draws[:, 0] * math.radians(recipe.max_rotation)
    zoom = 1 + draws[:, 1] * recipe.max_scale
    # Half the image is one unit of the sampling grid.
    right, down = draws[:, 2] * recipe.max_shift * 2 / width, draws[:, 3] * recipe.max_shift * 2 / height
    cosine, sine = angle.cos() / zoom, angle.sin() / zoom
    rows = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(count, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(
    module: nn.Module,
    data: ImageSet,
    recipe: Recipe,
    *,
    mean: Tensor,
    std: Tensor,
    generator: torch.Generator,
    channels_last: bool = False,
    title: str = "training",
    progress: bool = True,
) -> None:
    """Train ``module`` in place on the device that it is on, and leave it in ``eval()``.

    Args:
        module: takes normalised (B, 3, H, W), gives (B, C) logits.
        data: images and labels.
        recipe: how.
        mean, std: (1, 3, 1, 1), of images in [0, 1].
        generator: on the CPU; of the order of images and of the augmentation.
        channels_last: memory format of the batches, which is to be that of the module's weights.
        title: text beside the progress bar, which shows the loss and the time left.
        progress: show it.

    Raises:
        DataError: the images have no labels.
    """
    if data.labels is None:
        raise DataError(f"{len(data)} images without labels; supervised training needs a label for each: give labels")
    device = mean.device
    images, labels = to_float(data.images, device), data.labels.to(device)
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch_size)
    optimizer = _optimizer(module, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.train()
    with ProgressBar(steps, title, quiet=not progress) as bar:
        for _ in range(recipe.epochs):
            for index in torch.randperm(len(data), generator=generator).split(recipe.batch_size):
                chosen = index.to(device)
                batch = (augment(images[chosen], recipe, generator) - mean) / std
                logits = module(batch.contiguous(memory_format=layout))
                loss = F.cross_entropy(logits, labels[chosen], label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), recipe.max_gradient_norm)
                optimizer.step()
                schedule.step()
                bar.update(loss=loss.detach())
    module.eval()


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99))
