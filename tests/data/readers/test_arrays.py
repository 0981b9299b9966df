import tracemalloc
from pathlib import Path

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
        (np.array([{"a": 1}], dtype=object), "it holds Python objects"),
        (np.uint8(3), "a single number"),
        (np.array(["a", "b"]), "it holds values of type <U1"),
        (np.zeros(2, [("a\n", "u1"), ("b", "f4")]), "it holds values of type"),
        (np.zeros(3, "M8[s]"), "values of type datetime64"),
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


def written(path: Path, header: str | bytes, values: bytes = b"\0" * 192, version: bytes = b"\x01\0") -> Path:
    """A ``.npy`` file with a header of one's own."""
    text = header.encode("latin1") if isinstance(header, str) else header
    length = len(text).to_bytes(2 if version == b"\x01\0" else 4, "little")
    path.write_bytes(b"\x93NUMPY" + version + length + text + values)
    return path


GOOD = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 8, 8, 3), }\n"
HEADERS = {
    "no Python": "{'descr': '|u1', ",
    "null byte": GOOD.replace("8", "\0"),
    "a call": "open('/etc/passwd')",
    "huge number": GOOD.replace("8, 8", "8" + "0" * 5000 + ", 8"),
    "nested": "[" * 5000,
    "operators": "-" * 9000 + "1",
    "bytes for a key": GOOD.replace("'shape'", "b'shape'"),
    "shape no tuple": GOOD.replace("(1, 8, 8, 3)", "3"),
    "shape of text": GOOD.replace("(1, 8, 8, 3)", "('a', 8)"),
    "shape of nothing": GOOD.replace("(1, 8, 8, 3)", "(None, 8, 8, 3)"),
    "negative": GOOD.replace("(1, 8, 8, 3)", "(-1, -8, 8, 3)"),
    "empty": GOOD.replace("(1, 8, 8, 3)", "(0, 99999999999999999999999, 8, 3)"),
    "too large": GOOD.replace("(1,", "(99999999999999999999999,"),
    "four exabytes": GOOD.replace("(1,", f"({2**54},"),
    "too many axes": GOOD.replace("(1,", "(" + "1," * 100),
    "another type": GOOD.replace("|u1", "|V0"),
    "no type": GOOD.replace("'|u1'", "'none'"),
    "a type of itself": GOOD.replace("'|u1'", "[('a', ('u1', (1000000000000,)))]"),
    "longer than allowed": GOOD.rstrip() + " " * 20_000 + "\n",
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers_are_one_line(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load_arrays(written(tmp_path / "images.npy", HEADERS[name]))
    message = str(caught.value)
    assert "\n" not in message and "images.npy" in message and len(message) < 400


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot read"),
        (b"\x93NUMPY", "cannot read"),
        (b"\x93NUMPY\x09\x00" + bytes(64), "cannot read"),
        (b"PK\x03\x04 and no archive", "holds several arrays"),
        (b"\x80\x04.", "pickled Python objects"),
    ],
)
def test_files_of_something_else_are_one_line(tmp_path, content, says):
    (tmp_path / "images.npy").write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_arrays(tmp_path / "images.npy")


@pytest.mark.parametrize("version", [b"\x01\0", b"\x02\0", b"\x03\0"])
def test_every_version_of_the_format_is_read(tmp_path, version):
    assert load_arrays(written(tmp_path / "images.npy", GOOD, version=version)).images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("values", [191, 193, 384])
def test_more_or_less_values_than_declared_are_refused(tmp_path, values):
    with pytest.raises(DataError, match=f"declares 192 bytes of values and {values} follow"):
        load_arrays(written(tmp_path / "images.npy", GOOD, bytes(values)))


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    path = written(tmp_path / "images.npy", GOOD, version=b"\x02\0")
    content = bytearray(path.read_bytes())
    content[8:12] = (2**31).to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(2**32)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(DataError, match="cannot read"):
        load_arrays(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_paths_that_cannot_be_looked_at_are_one_line(tmp_path):
    for path, says in (
        (tmp_path / ("x" * 300), "File name too long"),
        ("a\0b", "null"),
        (tmp_path, "no plain file"),
        (tmp_path / "images.npy" / "x", "no file"),
    ):
        (tmp_path / "images.npy").touch()
        with pytest.raises(DataError, match=says):
            load_arrays(path)


@pytest.mark.parametrize("labels", [np.array([0, -1]), np.array([0, 2**64 - 1], np.uint64)])
def test_labels_below_zero_or_beyond_int64_are_refused(files, tmp_path, labels):
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match="has the label"):
        load_arrays(files[0] / "images.npy", tmp_path / "labels.npy")
