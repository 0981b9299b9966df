"""Single corruptions against independent implementations and against what their names promise."""

import colorsys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from metaopt.data import shifts as corruptions
from metaopt.data.corruptions import blur, colour, weather
from metaopt.data.corruptions.spatter import FARTHEST, canny
from metaopt.data.corruptions.spatter import _distance as spatter_distance
from metaopt.data.images import to_bytes, to_float
from metaopt.data.seeding import generator_for


def noisy_images(count, height=32, width=32):
    return torch.randint(0, 256, (count, 3, height, width), generator=generator_for("bytes"), dtype=torch.uint8)


def apply(function, images, severity, seed=0):
    return to_bytes(function(to_float(images), severity, generator_for(seed)))


def test_hue_saturation_and_value_are_the_standard_librarys():
    images = noisy_images(1, 8, 8).double() / 255
    images[0, :, 0, :4] = torch.tensor([0.0, 0.5, 1.0, 0.25])  # greys
    hue, saturation, value = (part.flatten() for part in colour.to_hsv(images))
    pixels = images[0].flatten(1).T.tolist()
    expected = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
    np.testing.assert_allclose(torch.stack([hue, saturation, value], 1), expected, atol=1e-12)
    torch.testing.assert_close(colour.to_rgb(*colour.to_hsv(images)), images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56)])
def test_pixelate_is_pillows_box(severity, height, width):
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    images = noisy_images(3, height, width)
    shifted = apply(corruptions.pixelate, images, severity)
    for image, ours in zip(images, shifted, strict=True):
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (int(width * share), int(height * share)), Image.Resampling.BOX
        )
        expected = np.asarray(small.resize((width, height), Image.Resampling.BOX))
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), expected)


def test_jpeg_is_pillows_at_the_published_quality():
    images = noisy_images(2)
    for image, ours in zip(images, apply(corruptions.jpeg_compression, images, 3), strict=True):
        buffer = BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=58)
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(Image.open(buffer)))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_noise_has_the_published_size(severity):
    grey = torch.full((24, 3, 32, 32), 128, dtype=torch.uint8)
    level = 128 / 255
    expected = {
        corruptions.gaussian_noise: (0.04, 0.08, 0.10)[severity // 2],
        corruptions.shot_noise: (level / (500, 100, 50)[severity // 2]) ** 0.5,
        corruptions.speckle_noise: level * (0.06, 0.12, 0.20)[severity // 2],
    }
    for function, spread in expected.items():
        shifted = apply(function, grey, severity).double() / 255
        assert shifted.std().item() == pytest.approx(spread, rel=0.03), function
        assert shifted.mean().item() == pytest.approx(level - 0.5 / 255, abs=2e-3), function  # truncation costs a half


def test_impulse_noise_replaces_its_share_by_black_and_white():
    grey = torch.full((24, 3, 32, 32), 128, dtype=torch.uint8)
    shifted = apply(corruptions.impulse_noise, grey, 5)
    assert set(shifted.unique().tolist()) == {0, 128, 255}
    for value in (0, 255):
        assert (shifted == value).double().mean().item() == pytest.approx(0.035, rel=0.05)


def test_glass_blur_takes_pixels_from_above_and_left_alone(monkeypatch):
    monkeypatch.setattr(blur, "GLASS", ((0.0, 1, 1),) * 6)  # no blur, one move
    rows = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(4, 3, 32, 32)
    columns = rows.transpose(2, 3)
    for images in (rows, columns):
        moved = images.int() - apply(corruptions.glass_blur, images, 5).int()
        assert set(moved.unique().tolist()) == {0, 1}
        assert not moved[:, :, :2].any() and not moved[:, :, :, :2].any()
        assert moved[:, :, 2:, 2:].double().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("severity", [0.4, 1, 2.5, 4, 5])
def test_blurs_keep_a_flat_image_flat(severity):
    flat = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    for function in (
        *(corruptions.gaussian_blur, corruptions.glass_blur, corruptions.defocus_blur),
        *(corruptions.motion_blur, corruptions.zoom_blur, corruptions.elastic_transform),
    ):
        # Cutting to bytes, as published, loses at most one each time, and glass blur cuts twice.
        cuts = 2 if function is corruptions.glass_blur else 1
        assert (apply(function, flat, severity).int() - 100).abs().max() <= cuts, function


def test_fog_brightens_the_dark_and_keeps_the_brightest_value_in_reach():
    image = noisy_images(8) // 4 * 3
    foggy = apply(corruptions.fog, image, 5)
    assert (foggy.amax((1, 2, 3)) <= image.amax((1, 2, 3))).all()
    assert foggy.float().std() < image.float().std()


def test_plasma_fills_zero_to_one_and_is_rougher_where_the_noise_decays_slowly():
    like = torch.zeros(1, dtype=torch.float64)
    smooth, rough = (weather.plasma(16, 32, decay, like, generator_for(0)) for decay in (3.0, 1.5))
    for maps in (smooth, rough):
        assert maps.shape == (16, 1, 32, 32)
        assert torch.equal(maps.amin((1, 2, 3)), torch.zeros(16).double())
        assert torch.equal(maps.amax((1, 2, 3)), torch.ones(16).double())
    assert rough.diff(dim=3).abs().mean() > 1.5 * smooth.diff(dim=3).abs().mean()


def test_water_and_mud_have_their_colours():
    black, white = torch.zeros(32, 3, 32, 32, dtype=torch.uint8), torch.full((32, 3, 32, 32), 255, dtype=torch.uint8)
    water = apply(corruptions.spatter, black, 2).flatten(2).amax(2).float()
    torch.testing.assert_close(water.mean(0), torch.tensor([87.0, 119.0, 119.0]), rtol=0, atol=1)
    mud = apply(corruptions.spatter, white, 5).flatten(2).amin(2).float().amin(0)
    torch.testing.assert_close(mud, torch.tensor([63.0, 42.0, 20.0]), rtol=0, atol=12)


def test_canny_finds_the_outline_of_a_square_and_drops_what_is_faint():
    layer = torch.zeros(1, 1, 16, 16)
    layer[..., 4:12, 4:12] = 200
    edges = canny(layer)[0, 0]
    assert edges[4:12, 7].nonzero().flatten().tolist() in ([0, 7], [0], [7])
    assert not edges[6:10, 6:10].any() and not edges[:3].any()
    assert edges.sum() >= 24
    assert not canny(layer / 20).any()


def test_saturate_at_2_takes_colour_away_and_at_5_adds_it():
    images = noisy_images(4)
    chroma = [
        (shifted.amax(1) - shifted.amin(1)).float().mean()
        for shifted in (apply(corruptions.saturate, images, 2), images, apply(corruptions.saturate, images, 5))
    ]
    assert chroma[0] < 0.2 * chroma[1] and chroma[1] < chroma[2]


def test_occlusion_covers_a_share_of_the_image_that_grows_with_strength():
    black = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    covered = [(apply(corruptions.occlusion, black, strength) > 0).any(1).float().mean() for strength in (1, 5)]
    assert covered[0].item() == pytest.approx(0.13, abs=0.03)
    assert covered[1].item() == pytest.approx(0.45, abs=0.05)


def test_random_convolution_is_scipys_with_the_mean_and_the_spread_of_the_image():
    images = to_float(noisy_images(2, 12, 16))
    shifted = to_bytes(corruptions.random_convolution(images, 3.0, generator_for("kernels")))
    kernels = torch.randn(6, 1, 5, 5, generator=generator_for("kernels")).numpy()
    for image, ours, kernel in zip(images.flatten(0, 1), shifted.flatten(0, 1), kernels, strict=True):
        values = image.double().numpy()
        filtered = ndimage.correlate(values, kernel[0].astype(float), mode="nearest")
        filtered = (filtered - filtered.mean()) / filtered.std() * values.std() + values.mean()
        expected = np.clip(0.52 * values + 0.48 * filtered, 0, 1) * 255  # 0.8 of 3/5
        np.testing.assert_allclose(ours.numpy(), expected, atol=1.01)


def test_coloured_noise_has_the_spread_of_its_strength_and_mostly_low_frequencies():
    grey = torch.full((64, 3, 32, 32), 0.5)
    weak, strong = (
        corruptions.coloured_noise(grey, strength, generator_for("noise")) - grey for strength in (1.0, 5.0)
    )
    assert weak.std((2, 3)).mean().item() == pytest.approx(0.026, abs=0.001)
    assert strong.std((2, 3)).mean().item() == pytest.approx(0.13, abs=0.003)
    power = torch.fft.rfft2(strong).abs().square().mean((0, 1))
    assert power[1:4, 1:4].mean() > 20 * power[12:16, 12:16].mean()  # white noise: 1


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05])
def test_distances_are_scipys_up_to_where_they_are_cut(share):
    edges = torch.rand(3, 1, 32, 40, generator=torch.Generator().manual_seed(0)) < share
    ours = spatter_distance(edges)
    for ours_of_one, image in zip(ours[:, 0], edges[:, 0], strict=True):
        exact = ndimage.distance_transform_edt(~image) if image.any() else np.full(image.shape, FARTHEST)
        expected = torch.from_numpy(exact).float().clamp_max(FARTHEST)
        torch.testing.assert_close(ours_of_one, expected, rtol=1e-6, atol=0)
