import numpy as np
import pytest
import torch

from metaopt.data.readers.arrays import Arrays, load_arrays
from metaopt.errors import DataError


@pytest.fixture
def files(tmp_path):
    """Six images (H != W) and their labels, on disk."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    np.save(tmp_path / "labels.npy", np.arange(6, dtype=np.uint8))
    return tmp_path, pixels


def test_images_and_labels_come_as_tensors(files):
    root, pixels = files
    data = load_arrays(root / "images.npy", root / "labels.npy")
    assert data.images.shape == (6, 3, 8, 10)
    assert torch.equal(data.images[2, 1], torch.from_numpy(pixels[2, :, :, 1].copy()))
    assert data.labels is not None and data.labels.dtype == torch.int64
    assert load_arrays(root / "images.npy").labels is None


def test_without_corruptions_the_images_stay_as_they_are(files):
    root, _ = files
    stream = Arrays(limit=4, images=str(root / "images.npy"), labels=str(root / "labels.npy")).stream()
    assert [(domain.name, domain.severity, domain.size) for domain in stream] == [("arrays", 0.0, 4)]
    assert torch.equal(stream[0].images.images, load_arrays(root / "images.npy").images[:4])


def test_corruptions_of_the_registry_can_be_laid_over(files):
    root, _ = files
    stream = Arrays(["contrast"], images=str(root / "images.npy")).stream()
    spread = stream[0].images.images.float().std(), load_arrays(root / "images.npy").images.float().std()
    assert spread[0] < 0.3 * spread[1]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "holds float32: images are uint8"),
        (np.full((2, 8, 8, 3), np.nan), "float64 with NaN"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"shape \(2, 3, 8, 8\): images are \(N, H, W, 3\)"),
        (np.zeros((2, 8, 8), np.uint8), r"shape \(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one image"),
        (np.array([{"a": 1}], dtype=object), "cannot read"),
    ],
)
def test_an_array_of_something_else_is_refused(tmp_path, array, says):
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(DataError, match=says) as caught:
        load_arrays(tmp_path / "images.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.arange(5), "6 images need"),
        (np.zeros((6, 10)), "holds float64: labels are integers"),
        (np.zeros((6, 10), int), r"labels are \(N,\)"),
        (np.array([0, 1, 2, 3, 4, -1]), "-1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(files, labels, says):
    root, _ = files
    np.save(root / "labels.npy", labels)
    with pytest.raises(DataError, match=says):
        load_arrays(root / "images.npy", root / "labels.npy")


def test_a_missing_and_a_damaged_file_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no file"):
        load_arrays(tmp_path / "none.npy")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'")
    with pytest.raises(DataError, match="cannot read"):
        load_arrays(tmp_path / "broken.npy")
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    with pytest.raises(DataError, match="several arrays"):
        load_arrays(tmp_path / "many.npz")
