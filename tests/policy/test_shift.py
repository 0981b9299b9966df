"""The distance between batches: its definition, its expectation without a shift, and what it sees."""

import pytest
import torch
from torch import Tensor, nn

from metaopt.models import SourceModel
from metaopt.policy.parts.shift_distance import (
    PIECE,
    WINDOW,
    ShiftReference,
    distance,
    image_statistics,
    init_reference,
    merged,
)

from ..tiny import random_images, tiny_model


def reference_of(x: Tensor) -> ShiftReference:
    return ShiftReference(torch.tensor(float(len(x)), dtype=x.dtype), x.mean(dim=0), x.var(dim=0))


def drawn(count: int, seed: int, width: int = 16) -> Tensor:
    return torch.randn(count, 2 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_the_squared_difference_of_means_over_what_chance_gives() -> None:
    before, batch = drawn(20, 0), 0.3 + drawn(12, 1)
    pooled = (19 * before.var(dim=0) + 11 * batch.var(dim=0)) / 30
    expected = ((batch.mean(dim=0) - before.mean(dim=0)) ** 2 / (pooled * (1 / 20 + 1 / 12))).mean()
    torch.testing.assert_close(distance(reference_of(before), batch), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [8, 64, 200])
def test_is_one_on_average_without_a_shift_at_every_batch_size(size: int) -> None:
    found = [float(distance(reference_of(drawn(2 * size, seed)), drawn(size, 1000 + seed))) for seed in range(60)]
    assert sum(found) / len(found) == pytest.approx(1.0, abs=0.1)


def test_merging_batches_gives_the_statistics_of_all_images() -> None:
    x = drawn(60, 0)
    reference = init_reference(16, x)
    for part in x.split([10, 1, 49]):
        reference = merged(reference, part)
    for found, expected in zip(reference, reference_of(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_old_past_fades() -> None:
    reference = reference_of(drawn(200, 0))._replace(count=torch.tensor(WINDOW, dtype=torch.float64))
    for seed in range(40):
        reference = merged(reference, 2.0 + drawn(200, 1 + seed))
    assert float(reference.count) == WINDOW
    torch.testing.assert_close(reference.mean, torch.full_like(reference.mean, 2.0), rtol=0.05, atol=0.0)


def test_too_few_images_tell_nothing() -> None:
    empty = init_reference(16, drawn(1, 0))
    assert float(distance(empty, 5.0 + drawn(100, 0))) == 1.0
    few = merged(empty, drawn(2, 0))
    assert float(distance(few, 5.0 + drawn(3, 1))) == 1.0


def test_flat_images_give_a_finite_distance() -> None:
    model = tiny_model()
    x = image_statistics(model, "module.bn1", torch.zeros(12, 3, 16, 16))
    assert torch.isfinite(distance(merged(init_reference(8, x), x), x))


class Watched(nn.Module):
    """A stem, a watched layer, and a rest that must not run."""

    num_classes = 2

    def __init__(self, norm: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), norm
        self.weight, self.channels_last = nn.Parameter(torch.ones(())), channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x.flatten(2).transpose(1, 2) if self.channels_last else x)
        raise AssertionError("the forward pass went on behind the watched layer")


@pytest.mark.parametrize("count", [5, 2 * PIECE + 3])
@pytest.mark.parametrize(
    ("norm", "channels_last"),
    [(nn.BatchNorm2d(8), False), (nn.GroupNorm(2, 8), False), (nn.LayerNorm(8), True), (nn.RMSNorm(8), True)],
)
def test_reads_mean_and_deviation_of_what_enters_the_layer_and_stops_there(
    norm: nn.Module, channels_last: bool, count: int
) -> None:
    module = Watched(norm, channels_last).eval()
    model, images = SourceModel(module), random_images(count)
    hidden = module.stem((images - model.mean) / model.std).flatten(2)
    found = image_statistics(model, "module.norm", images)
    torch.testing.assert_close(found[:, :8], hidden.mean(dim=2))
    torch.testing.assert_close(found[:, 8:], hidden.std(dim=2, correction=0).log(), rtol=1e-3, atol=1e-3)
    assert not found.requires_grad and not norm._forward_pre_hooks
