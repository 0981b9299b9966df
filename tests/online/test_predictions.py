"""``predictions.csv`` grows batch by batch, is cut back where a run goes on, and refused where it is not its own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaopt.data import Batch
from metaopt.errors import CheckpointError, OutputError
from metaopt.online.predictions import Predictions

from ..full_disk import file_size_limit

HEAD = "index,domain,severity,prediction,confidence,label\n"


def batch(first: int, labels: Tensor | None = None) -> tuple[str, float, Batch, Tensor]:
    """Two images, predicted as class 1 and, with NaN in the logits, not at all."""
    logits = torch.tensor([[0.0, 0.0], [torch.nan, 0.0]]) + torch.tensor([0.0, 1.0])
    return "fog", 2.5, Batch(torch.zeros(2, 3, 4, 4), labels, torch.tensor([first, first + 1])), logits


def rows(*firsts: int) -> str:
    return "".join(f"{first},fog,2.5,1,0.731059,\n{first + 1},fog,2.5,,0.000000,\n" for first in firsts)


def test_each_batch_is_in_the_file_at_once(tmp_path: Path) -> None:
    with Predictions(tmp_path) as predictions:
        assert not [*tmp_path.iterdir()]
        for count in range(1, 4):
            predictions.add(*batch(2 * count))
            assert (tmp_path / "predictions.csv").read_text() == HEAD + rows(*range(2, 2 * count + 1, 2))
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(7, torch.tensor([1, 0])))
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1:] == [
        "7,fog,2.5,1,0.731059,1",
        "8,fog,2.5,,0.000000,0",
    ]


@pytest.mark.parametrize("beyond", ["", "5,fo", rows(4), rows(4, 6) + "1,f", "\0" * 5000])
def test_what_is_beyond_the_snapshot_is_cut_off_with_the_first_batch(tmp_path: Path, beyond: str) -> None:
    path = tmp_path / "predictions.csv"
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))
        written = predictions.sync()
    assert written["bytes"] == path.stat().st_size
    with path.open("a") as file:
        file.write(beyond)
    called: list[str] = []
    with Predictions(tmp_path, written, lambda: called.append(path.read_text())) as predictions:
        assert path.read_text() == HEAD + rows(2) + beyond, "a run that is refused after all leaves it alone"
        predictions.add(*batch(4))
        predictions.add(*batch(6))
    assert called == [HEAD + rows(2) + beyond]
    assert path.read_text() == HEAD + rows(2, 4, 6)


def test_a_whole_run_that_goes_on_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))
        written = predictions.sync()
    with Predictions(tmp_path, written) as predictions:
        assert predictions.sync() == written
    assert (tmp_path / "predictions.csv").read_text() == HEAD + rows(2)


@pytest.mark.parametrize(
    "content", [None, "", HEAD + rows(2)[:-1], HEAD + rows(3), (HEAD + rows(2)).replace("\n", "\r\n")]
)
def test_a_file_that_is_not_as_the_run_left_it_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "predictions.csv"
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))
        written = predictions.sync()
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode())
    with pytest.raises(CheckpointError, match=r"put it back|not as the run to resume left it"):
        Predictions(tmp_path, written)
    assert not path.exists() if content is None else path.read_bytes() == content.encode()


@pytest.mark.parametrize("more", range(0, 60, 7))  # in the middle of a row, and at its end
def test_a_full_disk_is_an_output_error_and_costs_no_row_that_was_there(tmp_path: Path, more: int) -> None:
    path = tmp_path / "predictions.csv"
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))
        written = predictions.sync()
        with file_size_limit(written["bytes"] + more), pytest.raises(OutputError, match=r"cannot write .*resume="):
            predictions.add(*batch(4))
            predictions.add(*batch(6))
    with Predictions(tmp_path, written) as predictions:
        predictions.add(*batch(4))
    assert path.read_text() == HEAD + rows(2, 4)


def test_a_device_without_room_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="cannot write"), Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))
        written = predictions.sync()
        with pytest.raises(OutputError, match="is being written by another process"):
            Predictions(tmp_path, written)
        with pytest.raises(OutputError, match="is being written by another process"), Predictions(tmp_path) as other:
            other.add(*batch(9))
        predictions.add(*batch(4))
    assert (tmp_path / "predictions.csv").read_text() == HEAD + rows(2, 4)
    Predictions(tmp_path, written).close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_gone_is_noticed(tmp_path: Path, replaced: bool) -> None:
    with Predictions(tmp_path) as predictions:
        predictions.add(*batch(2))
        (tmp_path / "predictions.csv").unlink()
        if replaced:
            (tmp_path / "predictions.csv").write_text(HEAD)
        with pytest.raises(OutputError, match=r"No such file|it was replaced while the run wrote it"):
            predictions.sync()
