import pytest
import torch

from metaopt.data import shifts
from metaopt.data.images import to_float
from metaopt.data.seeding import generator_for
from metaopt.data.shifts import Shift, get_shift, register_shift, shift_names
from metaopt.errors import DataError


@pytest.fixture
def registry(monkeypatch):
    """The registry, restored after the test."""
    monkeypatch.setattr(shifts, "_SHIFTS", dict(shifts._SHIFTS))


def test_families_hold_what_the_protocol_says():
    assert shift_names("test") == (
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    assert set(shift_names("meta")) == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}
    assert set(shift_names("wide")) == {"random_convolution", "coloured_noise"}
    families = [set(shift_names(name)) for name in ("test", "meta", "wide", "selection", "report", "extra")]
    assert sum(map(len, families)) == len(set.union(*families)) == len(shift_names())


@pytest.mark.parametrize("name", shift_names())
@pytest.mark.parametrize("strength", [0.3, 3.6, 5.0])
def test_every_shift_keeps_shape_type_and_range_and_follows_its_seed(digits, name, strength):
    images = to_float(digits.images[:6])
    kept = images.clone()
    first, again, other = (get_shift(name)(images, strength, generator_for(seed)) for seed in (0, 0, 1))
    assert torch.equal(images, kept)  # the clean images are still needed
    assert first.shape == images.shape and first.dtype == images.dtype
    assert torch.equal(first, again)
    drawless = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    drawless |= {"gaussian_blur", "saturate", "posterise"}
    if strength == 5.0:
        assert torch.equal(first, other) == (name in drawless)
        assert not torch.equal(first, images)
    assert torch.equal((first * 255).round() / 255, first)  # whole bytes


@pytest.mark.parametrize("name", shift_names())
@pytest.mark.parametrize("size", [(28, 28), (64, 48)])
def test_every_shift_takes_images_of_other_sizes(name, size):
    images = torch.rand(2, 3, *size, generator=generator_for("size"))
    shifted = get_shift(name)(images, 4.0, generator_for(0))
    assert shifted.shape == images.shape
    assert (shifted - images).abs().mean() > 0.01


@pytest.mark.parametrize("name", shift_names())
def test_every_shift_takes_single_black_white_and_double_images(name):
    for value in (0.0, 1.0):
        image = torch.full((1, 3, 32, 32), value, dtype=torch.float64)
        shifted = get_shift(name)(image, 5.0, generator_for(0))
        assert shifted.dtype == torch.float64 and bool(shifted.isfinite().all())


@pytest.mark.parametrize("name", [name for name in shift_names() if name not in ("saturate", "elastic_transform")])
def test_more_strength_shifts_more(digits, name):
    images = to_float(digits.images[:12])
    weak, strong = (
        (get_shift(name)(images, strength, generator_for(0)) - images).abs().mean() for strength in (0.5, 5.0)
    )
    assert weak < strong


@pytest.mark.parametrize("strength", [0.0, -1.0, 5.01, float("nan")])
def test_a_strength_out_of_range_is_refused(digits, strength):
    with pytest.raises(DataError, match=r"\(0, 5\]"):
        get_shift("fog")(to_float(digits.images), strength, generator_for(0))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(DataError, match="'gausian_noise': did you mean 'gaussian_noise'"):
        get_shift("gausian_noise")


def test_a_users_shift_is_found_and_its_name_cannot_be_taken_twice(registry, digits):
    def invert(images, strength, generator):
        return 1 - images

    register_shift("invert", invert, family="meta")
    images = to_float(digits.images)
    assert torch.equal(get_shift("invert")(images, 1.0, generator_for(0)), 1 - images)
    assert "invert" in shift_names("meta")
    register_shift("invert", invert, family="meta")
    with pytest.raises(DataError, match="'invert' exists"):
        register_shift("invert", lambda images, strength, generator: images, family="meta")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda images, strength, generator: images[:, :1], r"gave \(40, 1, 32, 32\)"),
        (lambda images, strength, generator: images.double(), "float64"),
        (lambda images, strength, generator: None, "gave NoneType"),
        (lambda images, strength, generator: images * float("nan"), "'bad' at strength 2: images hold NaN"),
        (lambda images, strength, generator: images + 1, r"needed"),
    ],
)
def test_what_a_users_shift_gives_is_checked(digits, function, says):
    with pytest.raises(DataError, match=says):
        Shift("bad", function, "meta")(to_float(digits.images), 2.0, generator_for(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", shift_names())
def test_a_seed_means_the_same_on_another_device(digits, name):
    images = to_float(digits.images)
    here = get_shift(name)(images, 5.0, generator_for(0))
    there = get_shift(name)(images.cuda(), 5.0, generator_for(0))
    assert there.is_cuda
    assert ((here - there.cpu()).abs() > 1.5 / 255).float().mean() < 1e-3
