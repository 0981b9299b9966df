"""Augmented views: in range, drawn from their generator alone, and near the image that they show."""

import pytest
import torch
from torch import Tensor

from metaopt.objectives.views import _moved, _recoloured, augmented_view


def photograph(height: int = 32, width: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth colours, (2, 3, height, width)."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    one = torch.stack([0.5 + 0.3 * torch.sin(x), 0.5 + 0.3 * torch.sin(y), 0.5 + 0.3 * torch.sin(x + y)])
    return torch.stack([one, one.flip(0)]).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (24, 40)])
def test_shape_type_and_range_are_kept(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    images = photograph(*shape, dtype=dtype).requires_grad_()
    for seed in range(8):
        view = augmented_view(images, seeded(seed))
        assert view.shape == images.shape and view.dtype == dtype and not view.requires_grad
        assert view.min() >= 0 and view.max() <= 1 and torch.isfinite(view).all()


def test_the_generator_alone_decides() -> None:
    images = photograph()
    torch.manual_seed(0)
    first = augmented_view(images, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(augmented_view(images, seeded(3)), first)
    assert not torch.equal(augmented_view(images, seeded(4)), first)
    state = torch.get_rng_state()
    augmented_view(images, seeded(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_extreme_images_stay_finite() -> None:
    for value in (0.0, 1.0, -3.0, 7.0):
        assert torch.isfinite(augmented_view(torch.full((1, 3, 16, 16), value), seeded(0))).all()


def test_half_of_the_views_are_mirrored_unless_it_is_forbidden() -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[..., 20:] = 1.0  # bright on the right

    def bright_on_the_left(seed: int, flip: bool) -> bool:
        view = augmented_view(images, seeded(seed), flip=flip)
        return bool(view[..., :8].mean() > view[..., -8:].mean())

    assert 10 < sum(bright_on_the_left(seed, True) for seed in range(40)) < 30
    assert not any(bright_on_the_left(seed, False) for seed in range(40))


def test_a_move_is_small_and_shows_no_black_corner() -> None:
    images = torch.full((1, 3, 32, 32), 0.5)
    images[..., 12:20, 12:20] = 1.0
    for seed in range(20):
        moved = _moved(images, seeded(seed))
        assert moved.min() > 0.49
        bright = (moved[0, 0] > 0.75).nonzero().float().mean(dim=0)
        # At most 4 pixels each way, after a turn and a scaling about the middle.
        assert (bright - 15.5).abs().max() < 5.0


def test_colours_change_one_by_one_within_their_ranges() -> None:
    grey = torch.full((1, 3, 4, 4), 0.5)
    values = [_recoloured(grey, seeded(seed)) for seed in range(50)]
    for value in values:
        assert torch.allclose(value, value.mean().expand_as(value), atol=1e-5)  # saturation and hue leave grey grey
        assert value.mean() + 1e-6 > (0.5 * 0.6) ** 1.3 and value.mean() < 0.5**0.7 * 1.4
    assert torch.stack(values).mean(dim=(1, 2, 3, 4)).std() > 0.05
