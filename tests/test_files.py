"""Atomic writes, safe loading and fingerprints."""

import io
import math
import multiprocessing
import os
import pickle
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from metaopt.errors import CheckpointError, OutputError
from metaopt.files import (
    atomic_save,
    atomic_write_bytes,
    atomic_write_text,
    ensure_writable_folder,
    is_finite,
    new_folder,
    safe_load,
    weights_sha256,
)


def test_saved_tensors_come_back(tmp_path: Path):
    saved = {"weights": torch.arange(6.0).view(2, 3), "name": "net", "steps": [1, 2]}
    atomic_save(saved, tmp_path / "new" / "file.pt")
    loaded = safe_load(tmp_path / "new" / "file.pt")
    assert torch.equal(loaded["weights"], saved["weights"])
    assert loaded["name"] == "net" and loaded["steps"] == [1, 2]


def test_nothing_else_is_left_in_the_folder(tmp_path: Path):
    atomic_write_text("é\n", tmp_path / "a.txt")
    atomic_write_bytes(b"two", tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"two"


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "a.txt"
    atomic_write_text("old", target)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text("new", target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_object_that_cannot_be_saved_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "a.pt"
    atomic_save({"value": 1}, target)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        atomic_save({"value": lambda: 1}, target)
    assert safe_load(target) == {"value": 1}


def test_writing_under_a_file_is_an_output_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        atomic_write_text("x", tmp_path / "file" / "a.txt")
    with pytest.raises(OutputError, match="give a folder that can be written"):
        ensure_writable_folder(tmp_path / "file" / "folder")


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path):
    folder = ensure_writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not list(folder.iterdir())


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, legacy: bool):
    torch.save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="only tensors and primitives are allowed"):
        safe_load(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="state_dict"):
        safe_load(tmp_path / "a.pt")


def test_a_plain_pickle_is_refused(tmp_path: Path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="only tensors and primitives are allowed"):
        safe_load(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 and no more", b"\x80\x02."])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no readable file of torch\.save") as caught:
        safe_load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path):
    atomic_save(torch.zeros(1000), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="no readable file"):
        safe_load(tmp_path / "a.pt")


def test_missing_files_and_folders_are_told_apart(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no file"):
        safe_load(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        safe_load(tmp_path)


def test_paths_that_cannot_be_looked_at_are_one_line(tmp_path: Path):
    for path, says in ((tmp_path / ("x" * 300), "File name too long"), (tmp_path / "a\0b", "null")):
        with pytest.raises(CheckpointError, match=says) as caught:
            safe_load(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(OutputError, match=says):
            ensure_writable_folder(path)
        with pytest.raises(OutputError, match=says):
            atomic_write_text("x", path)
    with pytest.raises(CheckpointError, match="no plain file"):
        safe_load("/dev/null")


def packed(path: Path, pickled: bytes, data: bytes = b"\0" * 16) -> Path:
    """A file as of torch.save, with right checksums, whose pickle says what it likes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "data/0": data, "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.fixture
def four_floats() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(4), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.parametrize("stored", [b"K\x04\x85", b"K\x04t"])
def test_a_file_that_declares_more_than_it_holds_is_refused_at_once(tmp_path: Path, four_floats: bytes, stored: bytes):
    assert torch.equal(safe_load(packed(tmp_path / "a.pt", four_floats)), torch.zeros(4))
    huge = stored.replace(b"K\x04", b"\x8a\x05\0\0\0\0\x04")  # 2 ** 34 elements
    with pytest.raises(CheckpointError, match="no readable file"):
        safe_load(packed(tmp_path / "a.pt", four_floats.replace(stored, huge)))


def test_views_of_far_more_than_is_stored_are_refused(tmp_path: Path):
    atomic_save({"a": [torch.ones(1).expand(1000)]}, tmp_path / "a.pt")
    assert torch.equal(safe_load(tmp_path / "a.pt")["a"][0], torch.ones(1000))
    atomic_save({"a": [torch.ones(1).expand(10**12)]}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no readable file"):
        safe_load(tmp_path / "a.pt")


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.eye(3, device="meta")])
def test_tensors_without_dense_values_are_refused(tmp_path: Path, tensor: torch.Tensor):
    atomic_save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="dense ones are allowed"):
        safe_load(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_value_that_is_not_finite_is_found(dtype: torch.dtype, place: int):
    values = torch.arange(-3.0, 4.0)
    assert is_finite(values.to(dtype)) and is_finite(values[:0].to(dtype))
    for value in (math.nan, math.inf, -math.inf):
        spoiled = values.clone()
        spoiled[place] = value
        assert not is_finite(spoiled.to(dtype))
    assert is_finite(torch.tensor([2**62]))


def test_millions_of_names_are_refused_at_once(tmp_path: Path):
    atomic_save({f"a name of a tensor {index}": None for index in range(200_000)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="bytes of names"):
        safe_load(tmp_path / "a.pt")


def test_files_without_checksums_have_none_to_compare(tmp_path: Path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        atomic_save(torch.arange(9), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(safe_load(tmp_path / "a.pt", checksums=True), torch.arange(9))


def make_folder(parent: Path) -> Path:
    return new_folder(parent, "run")


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path):
    with ThreadPoolExecutor(8) as threads:
        first = list(threads.map(make_folder, [tmp_path / "runs"] * 40))
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as processes:
        second = list(processes.map(make_folder, [tmp_path / "runs"] * 12))
    assert len({*first, *second}) == 52 == len(list((tmp_path / "runs").iterdir()))
    assert {path.name for path in first} == {"run", *(f"run-{number}" for number in range(2, 41))}


def test_a_new_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for parent, name in ((tmp_path / "file", "run"), (tmp_path, "x" * 300), (tmp_path, "a/b")):
        with pytest.raises(OutputError, match="cannot write in the folder"):
            new_folder(parent, name)


class TestFingerprint:
    """`weights_sha256`."""

    def test_depends_on_names_types_shapes_and_values(self):
        base = {"a": torch.zeros(4)}
        others = [
            {"b": torch.zeros(4)},
            {"a": torch.zeros(2, 2)},
            {"a": torch.zeros(4, dtype=torch.int32)},
            {"a": torch.tensor([0.0, 0.0, 0.0, 1e-45])},
        ]
        assert len({weights_sha256(state) for state in [base, *others]}) == 5

    def test_ignores_order_counters_and_memory_format(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        before = weights_sha256(net)
        net[1].num_batches_tracked += 1  # pyright: ignore[reportOperatorIssue, reportArgumentType]
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        assert weights_sha256(dict(reversed(net.state_dict().items()))) == before
        net[1].running_mean += 1  # pyright: ignore[reportOperatorIssue, reportArgumentType]
        assert weights_sha256(net) != before

    def test_takes_bfloat16_and_scalars(self):
        state = {"a": torch.tensor(1.5, dtype=torch.bfloat16), "b": torch.ones(3, dtype=torch.bool)}
        assert len(weights_sha256(state)) == 64
