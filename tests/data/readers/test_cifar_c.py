import numpy as np
import pytest

from metaopt.data.readers import cifar_c
from metaopt.data.readers.cifar_c import CifarC
from metaopt.errors import DataError

COUNT = 6


def write(root, rows, labels):
    """A folder of two corruptions; the pixels of row r are r."""
    for name in ("fog", "snow"):
        pixels = np.arange(rows, dtype=np.uint8).reshape(-1, 1, 1, 1)
        np.save(root / f"{name}.npy", np.broadcast_to(pixels, (rows, 4, 4, 3)))
    np.save(root / "labels.npy", np.arange(labels, dtype=np.uint8) % COUNT)


@pytest.mark.parametrize("rows", [COUNT, 5 * COUNT])
def test_severities_are_stacked_or_alone(tmp_path, rows):
    write(tmp_path, rows, COUNT)
    fog, snow = CifarC(["fog", "snow"], root=str(tmp_path)).stream()
    assert (fog.name, fog.severity, fog.size, snow.name) == ("fog", 5.0, COUNT, "snow")
    assert fog.images.images[:, 0, 0, 0].tolist() == list(range(rows - COUNT, rows))
    assert fog.images.labels is not None and fog.images.labels.tolist() == list(range(COUNT))


def test_each_severity_has_its_rows(tmp_path):
    write(tmp_path, 5 * COUNT, COUNT)
    stream = CifarC(["fog"], [1, 3], limit=2, root=str(tmp_path)).stream()
    assert [domain.images.images[:, 0, 0, 0].tolist() for domain in stream] == [[0, 1], [12, 13]]
    assert [domain.severity for domain in stream] == [1.0, 3.0]


def test_labels_may_repeat_with_every_severity(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_c, "PUBLISHED_ROWS", COUNT)
    write(tmp_path, 5 * COUNT, 5 * COUNT)
    (domain,) = CifarC(["fog"], [2], root=str(tmp_path)).stream()
    assert domain.size == COUNT
    assert domain.images.images[0, 0, 0, 0] == COUNT
    assert domain.images.labels is not None and domain.images.labels.tolist() == list(range(COUNT))


@pytest.mark.parametrize(
    ("rows", "labels", "arguments", "says"),
    [
        (COUNT, COUNT, {"severities": [3]}, "holds severity 5 alone"),
        (COUNT, COUNT, {"severities": [2.5]}, "severity 2.5: CIFAR-C files hold 1, 2, 3, 4 and 5"),
        (COUNT, COUNT, {"corruptions": ["fogg"]}, "'fogg': did you mean 'fog'"),
        (COUNT, COUNT, {"corruptions": []}, "0 corruptions"),
        (COUNT, COUNT - 1, {}, "has 6 rows and labels.npy 5"),
        (COUNT, COUNT, {"corruptions": ["../x"]}, "unknown corruption '../x'"),
        (COUNT, COUNT, {"corruptions": ["labels"]}, "unknown corruption 'labels'"),
        (COUNT, COUNT, {"corruptions": ["/etc/x"]}, "unknown corruption"),
        (COUNT, COUNT, {"corruptions": ["f\0g", ""]}, "unknown corruption"),
        (COUNT, COUNT, {"root": "x" * 300}, "no folder"),
    ],
)
def test_what_the_folder_cannot_give_is_refused_at_once(tmp_path, rows, labels, arguments, says):
    write(tmp_path, rows, labels)
    np.save(tmp_path.parent / "x.npy", np.load(tmp_path / "fog.npy"))
    with pytest.raises(DataError, match=says):
        CifarC(**{"corruptions": ["fog"], "root": str(tmp_path), **arguments}).stream()


def test_a_missing_folder_or_missing_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        CifarC(root=str(tmp_path / "none")).stream()
    with pytest.raises(DataError, match=r"no file .*labels\.npy"):
        CifarC(root=str(tmp_path)).stream()


def test_files_of_another_shape_are_refused(tmp_path):
    write(tmp_path, COUNT, COUNT)
    np.save(tmp_path / "fog.npy", np.zeros((COUNT, 3, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"images are \(N, H, W, 3\)"):
        CifarC(["fog"], root=str(tmp_path)).stream()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.zeros(COUNT), "labels are integers"),
        (np.zeros((COUNT, 1), np.int64), r"labels are \(N,\)"),
        (np.int64(3), "a single number"),
        (np.arange(COUNT) - 1, "has the label -1"),
    ],
)
def test_labels_of_no_use_are_refused_before_the_first_domain(tmp_path, labels, says):
    write(tmp_path, COUNT, COUNT)
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match=says):
        CifarC(["fog"], root=str(tmp_path)).stream()


def test_real_files_give_the_fifteen(real_data):
    stream = CifarC(limit=50, root=str(real_data / "cifar10c")).stream()
    assert len(stream) == 15
    assert {(domain.size, domain.severity, len(domain.images)) for domain in stream} == {(50, 5.0, 50)}
