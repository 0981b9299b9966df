"""``predictions.csv``: a row for each image, on the disk batch by batch."""

import csv
import io
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from metaopt.data import Batch
from metaopt.errors import CheckpointError, OutputError
from metaopt.evaluation.error import confidences

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

PREDICTIONS = "predictions.csv"  # in the run's folder
COLUMNS = ("index", "domain", "severity", "prediction", "confidence", "label")


class Predictions:
    """Rows in the order in which the images are met.

    Each batch is handed to the system whole, so that the end of this process loses none; :meth:`sync` brings them to
    the disk. Until the first batch comes, nothing in the folder changes.

    Args:
        folder: of the run.
        written: what :meth:`sync` said of the rows that a run that goes on begins with; what the file has beyond them
            is cut off. None: a new run, whose file takes the place of one that is there.
        begin: called before the first row is written.

    Raises:
        CheckpointError: the file to go on with is missing, or does not begin with those rows.
        OutputError: another process is writing the file.
    """

    def __init__(self, folder: Path, written: Mapping[str, Any] | None = None, begin: Callable[[], None] | None = None):
        self.path = folder / PREDICTIONS
        self._begin, self._begun = begin, False
        self._bytes, self._crc = (0, 0) if written is None else (written["bytes"], written["crc"])
        self._file: io.FileIO | None = None
        if written is not None:
            try:
                self._file = self._locked()
                known = _crc_of(self._file, self._bytes) == self._crc
            except OSError as error:
                raise CheckpointError(
                    f"cannot read '{self.path}' ({error.strerror or error}), which the run to resume wrote; put it "
                    "back, or start a new run"
                ) from error
            if not known:
                self.close()
                raise CheckpointError(
                    f"'{self.path}' is not as the run to resume left it ({self._bytes} bytes at least); put that file "
                    "back, or start a new run"
                )

    def add(self, domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
        """Take in one batch; logits without a softmax have confidence 0, and those with NaN no prediction.

        Args:
            domain: name of the domain of all its images, where the batch does not say it of each.
            severity: of that domain.
            batch: what was met.
            logits: (B, C).

        Raises:
            OutputError: it cannot be written, or another process is writing the file.
        """
        labels = [""] * len(batch.index) if batch.labels is None else batch.labels.tolist()
        confidence = [f"{value:.6f}" for value in confidences(logits).tolist()]
        unknown = logits.isnan().any(dim=1).tolist()
        predicted = ["" if nan else k for nan, k in zip(unknown, logits.argmax(dim=1).tolist(), strict=True)]
        origins = [(domain, severity)] * len(labels)
        if batch.source is not None:
            origins = [(batch.sources[k].name, batch.sources[k].severity) for k in batch.source.tolist()]
        columns = batch.index.tolist(), origins, predicted, confidence, labels
        rows = [
            (index, name, f"{strength:g}", prediction, sure, label)
            for index, (name, strength), prediction, sure, label in zip(*columns, strict=True)
        ]
        self._write(rows)

    def sync(self) -> dict[str, int]:
        """Bring all rows to the disk, and say what the file holds: its bytes, and their checksum.

        Raises:
            OutputError: that failed, or the file is not the one at its path any more.
        """
        try:
            file = self._ready()
            os.fsync(file.fileno())
            if not os.path.samestat(os.stat(self.path), os.fstat(file.fileno())):
                raise FileNotFoundError(0, "it was replaced while the run wrote it")
        except OSError as error:
            raise self._unwritten(error) from error
        return {"bytes": self._bytes, "crc": self._crc}

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Predictions":
        """The predictions themselves."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close, also after an error."""
        self.close()

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        try:
            file = self._ready()
            if not self._bytes:
                writer.writerow(COLUMNS)
            writer.writerows(rows)
            content = text.getvalue().encode()
            rest = memoryview(content)
            while rest:  # what a nearly full disk takes may be a part
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise self._unwritten(error) from error
        self._bytes += len(content)
        self._crc = zlib.crc32(content, self._crc)

    def _ready(self) -> io.FileIO:
        """The file, with the rows so far and nothing else in it."""
        if self._file is None:
            self._file = self._locked(os.O_CREAT)
        if not self._begun:
            if self._begin is not None:
                self._begin()
            self._file.truncate(self._bytes)
            self._file.seek(self._bytes)
            self._begun = True
        return self._file

    def _locked(self, flags: int = 0) -> io.FileIO:
        """Open the file, unbuffered, for this process alone: two would answer the same images twice."""
        file = io.FileIO(self.path, "r+", opener=lambda path, own: os.open(path, own | flags, 0o666))
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise OutputError(
                f"'{self.path}' is being written by another process; wait for its end, or give another folder: set "
                "out=FOLDER"
            ) from error
        except OSError:
            pass  # a file system without locks
        return file

    def _unwritten(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write '{self.path}' ({error.strerror or error}); make room there, and go on with "
            f"resume={self.path.parent}"
        )


def _crc_of(file: io.FileIO, size: int) -> int | None:
    """Checksum of the first ``size`` bytes; None where the file has fewer."""
    crc = 0
    while size:
        block = file.read(min(size, 1 << 20))
        if not block:
            return None
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc
