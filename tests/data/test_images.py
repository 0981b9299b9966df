import pytest
import torch

from metaopt.data.images import ImageSet, to_bytes, to_float, validate_images
from metaopt.errors import DataError


def test_bytes_survive_the_way_to_floats_and_back():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(to_bytes(to_float(images)), images)
    assert to_float(images).max() == 1.0


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), r"shape \(2, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "divide bytes by 255"),
        (torch.full((2, 3, 8, 8), 2.0), r"\[2, 2\]"),
        (torch.full((2, 3, 8, 8), -0.1), r"\[0, 1\] is needed"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN"),
        (torch.full((2, 3, 8, 8), float("inf")), "infinity"),
    ],
)
def test_images_that_no_model_takes_are_refused(images, says):
    with pytest.raises(DataError, match=says):
        validate_images(images)


def test_one_nan_among_good_pixels_is_found():
    images = torch.full((2, 3, 8, 8), 0.5)
    assert validate_images(images) is images
    images[1, 2, 3, 4] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        validate_images(images)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.zeros(3, dtype=torch.int64), r"labels have shape \(3,\)"),
        (torch.zeros(2, dtype=torch.int32), "int64"),
        (torch.tensor([0, -1]), "-1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, says):
    with pytest.raises(DataError, match=says):
        ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), labels)


def test_float_images_are_no_image_set():
    with pytest.raises(DataError, match="uint8"):
        ImageSet(torch.zeros(2, 3, 8, 8))


def test_taking_keeps_images_and_labels_together():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    part = ImageSet(images, torch.arange(4)).take(2)
    assert part.labels is not None and part.labels.tolist() == [0, 1]
    assert part.images[:, 0, 0, 0].tolist() == [0, 1]
    assert len(ImageSet(images).take(9)) == 4
    with pytest.raises(DataError, match="limit is 0"):
        part.take(0)


def test_labels_beyond_the_model_are_refused():
    data = ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 9]))
    data.check_classes(10)
    with pytest.raises(DataError, match=r"label is 9: the model has classes 0\.\.4"):
        data.check_classes(5)
