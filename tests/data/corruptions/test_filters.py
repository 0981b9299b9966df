import numpy as np
import pytest
import torch
from scipy import ndimage

from metaopt.data.corruptions.filters import (
    bilinear,
    border_index,
    clipped_zoom,
    correlate,
    drawing_size,
    enlarge,
    gaussian,
    motion,
)
from metaopt.data.seeding import generator_for

SCIPY = {"nearest": "nearest", "mirror": "mirror", "symmetric": "reflect"}  # SciPy's names of the borders


@pytest.fixture
def images():
    return torch.rand(2, 3, 13, 17, generator=generator_for("filters"), dtype=torch.float64)


@pytest.mark.parametrize("border", SCIPY)
@pytest.mark.parametrize("size", [1, 4, 7])
def test_borders_are_scipys(border, size):
    line = np.arange(size, dtype=float)
    far = np.arange(-3 * size, 4 * size)
    expected = ndimage.map_coordinates(line, far[None], order=0, mode=SCIPY[border])
    assert border_index(torch.from_numpy(far), size, border).tolist() == expected.tolist()


@pytest.mark.parametrize("border", SCIPY)
@pytest.mark.parametrize(("sigma", "cut"), [(0.05, 4.0), (0.7, 4.0), (1.0, 3.0), (6.4, 3.0)])
def test_gaussian_filter_is_scipys(images, border, sigma, cut):
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode=SCIPY[border], truncate=cut)
    np.testing.assert_allclose(gaussian(images, sigma, border, cut).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("border", SCIPY)
def test_correlation_is_scipys(images, border):
    kernel = torch.rand(5, 5, generator=generator_for("kernel"), dtype=torch.float64)
    expected = ndimage.correlate(images.numpy(), kernel.numpy()[None, None], mode=SCIPY[border])
    np.testing.assert_allclose(correlate(images, kernel, border).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("border", SCIPY)
def test_bilinear_sampling_is_scipys(images, border):
    y, x = 40 * torch.rand(2, 2, 5, 6, generator=generator_for("points"), dtype=torch.float64) - 15
    sampled = bilinear(images, y, x, border).numpy()
    for image in range(2):
        for channel in range(3):
            expected = ndimage.map_coordinates(
                images[image, channel].numpy(), np.stack([y[image], x[image]]), order=1, mode=SCIPY[border]
            )
            np.testing.assert_allclose(sampled[image, channel], expected, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.07, 1.25, 1.75, 2.25])
def test_zoom_is_scipys_cut_to_the_middle(factor):
    images = torch.rand(1, 1, 32, 32, generator=generator_for("zoom"), dtype=torch.float64)
    crop = int(np.ceil(32 / factor))
    top = (32 - crop) // 2
    large = np.asarray(ndimage.zoom(images[0, 0, top : top + crop, top : top + crop].numpy(), factor, order=1))
    trim = (large.shape[0] - 32) // 2
    expected = large[trim : trim + 32, trim : trim + 32]
    np.testing.assert_allclose(clipped_zoom(images, factor)[0, 0].numpy(), expected, atol=1e-9)


def test_motion_trails_a_point_along_each_images_own_direction():
    points = torch.zeros(2, 1, 15, 15, dtype=torch.float64)
    points[:, :, 7, 7] = 1
    trails = motion(points, 3, 1.5, torch.tensor([0.0, 90.0], dtype=torch.float64))[:, 0]
    weights = np.exp(-0.5 * (np.arange(7) / 1.5) ** 2)
    weights /= weights.sum()
    np.testing.assert_allclose(trails[0, 7, 1:8].flip(0).numpy(), weights)  # what lies to the right moves left
    np.testing.assert_allclose(trails[1, 1:8, 7].flip(0).numpy(), weights)  # what lies below moves up
    assert trails[0].sum().item() == pytest.approx(1) and int((trails[0] > 0).sum()) == 7


def test_layers_are_drawn_at_32_pixels_and_enlarged():
    for size, drawn in {(32, 32): (32, 32), (64, 96): (32, 48), (20, 28): (20, 28)}.items():
        images = torch.zeros(1, 3, *size)
        assert drawing_size(images) == drawn
        layer = torch.rand(1, 1, *drawn, generator=generator_for("layer"))
        assert enlarge(layer, images).shape == (1, 1, *size)
        assert size != drawn or enlarge(layer, images) is layer
