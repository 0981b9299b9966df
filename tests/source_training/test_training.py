"""Augmentation and the training loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from metaopt.data.images import ImageSet
from metaopt.errors import DataError
from metaopt.source_training.training import Recipe, augment, train_classifier

STILL = Recipe("sgd", lr=0.1, epochs=1, max_shift=0, max_rotation=0, max_scale=0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_augmentation_by_nothing_is_the_image():
    images = torch.rand(3, 3, 8, 8, generator=generator())
    torch.testing.assert_close(augment(images, STILL, generator()), images)


def test_shifts_are_in_pixels_both_ways_and_within_the_largest():
    column = torch.zeros(200, 3, 16, 16, dtype=torch.float64)
    column[:, :, :, 8] = 1
    moved = augment(column, replace(STILL, max_shift=2), generator())
    centre = (moved[:, 0, 8] * torch.arange(16.0, dtype=torch.float64)).sum(dim=1) / moved[:, 0, 8].sum(dim=1)
    offset = centre - 8
    assert offset.abs().max() <= 2 + 1e-6
    assert offset.min() < -1.5 and offset.max() > 1.5


def test_rotation_is_within_the_largest():
    row = torch.zeros(100, 3, 33, 33, dtype=torch.float64)
    row[:, :, 16] = 1
    turned = augment(row, replace(STILL, max_rotation=10), generator())
    height = torch.arange(33.0, dtype=torch.float64)[:, None]
    right = (turned[:, 0, :, 26:27] * height).sum(dim=(1, 2)) / turned[:, 0, :, 26:27].sum(dim=(1, 2)) - 16
    degrees = torch.rad2deg(torch.atan2(right, torch.tensor(10.0, dtype=torch.float64)))
    assert degrees.abs().max() <= 10.5
    assert degrees.min() < -7 and degrees.max() > 7


def test_augmented_images_stay_in_range_and_follow_the_generator():
    images = torch.rand(20, 3, 32, 32, generator=generator())
    recipe = Recipe("sgd", lr=0.1, epochs=1)
    first, second = augment(images, recipe, generator()), augment(images, recipe, generator())
    assert torch.equal(first, second)
    assert first.min() >= 0 and first.max() <= 1
    assert (first - images).abs().max() > 0.1


def stripes() -> ImageSet:
    """Two classes: bright on top, or bright below."""
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 0, :, :4] = 200
    images[labels == 1, :, 4:] = 200
    return ImageSet(images, labels)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns_and_leaves_eval(optimizer: str):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    recipe = Recipe(optimizer, lr=0.05, epochs=8, batch_size=16)
    data, zero, one = stripes(), torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    train_classifier(module, data, recipe, mean=zero, std=one, generator=generator(), progress=False)
    assert not module.training
    assert torch.equal(module(data.images.float() / 255).argmax(1), data.labels)  # pyright: ignore[reportArgumentType]


def test_images_without_labels_are_refused():
    data = ImageSet(stripes().images)
    with pytest.raises(DataError, match="64 images without labels"):
        train_classifier(
            nn.Linear(2, 2),
            data,
            STILL,
            mean=torch.zeros(1, 3, 1, 1),
            std=torch.ones(1, 3, 1, 1),
            generator=generator(),
            progress=False,
        )


def test_steps_cover_a_short_last_batch(capsys: pytest.CaptureFixture[str]):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    recipe = replace(STILL, epochs=2, batch_size=24)
    zero, one = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    train_classifier(module, stripes(), recipe, mean=zero, std=one, generator=generator(), title="two epochs")
    printed = capsys.readouterr()
    steps = 2 * math.ceil(64 / 24)
    assert f"{steps}/{steps}" in printed.out + printed.err
    assert "two epochs" in printed.out + printed.err
