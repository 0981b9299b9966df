"""Reader of a folder in the form of CIFAR-10-C: one ``<corruption>.npy`` per corruption, and ``labels.npy``.

A published file (D. Hendrycks and T. Dietterich, ICLR 2019) stacks five severities of 10,000 rows each, severity s in
the rows (s - 1) * 10000 to s * 10000. A file with as many rows as there are distinct images holds severity 5 alone.
"""

import difflib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from metaopt.data.images import ImageSet
from metaopt.data.readers.arrays import images_tensor, labels_tensor
from metaopt.data.readers.base import Reader
from metaopt.data.readers.npy import open_array
from metaopt.data.shifts import TEST, shift_names
from metaopt.data.stream import Domain, Stream
from metaopt.errors import DataError
from metaopt.settings import PathSetting

SEVERITIES = 5
PUBLISHED_ROWS = 10_000  # of one severity
SINGLE_SEVERITY = 5  # of a file that holds one severity alone
LABELS = "labels.npy"


@dataclass
class CifarC(Reader):
    """One domain per severity and corruption, corruptions innermost.

    A missing folder or file, a wrong shape, type or number of rows, and a severity that a file lacks raise `DataError`
    before the first domain is met.

    Attributes:
        corruptions: names of files without ``.npy``; None: the fifteen in their usual order.
        severities: whole numbers 1 to 5.
        limit: images of each corruption, from the top of each severity; None: all.
        root: the folder.
    """

    name = "cifar_c"
    required = ("root", "reads a folder")

    root: PathSetting | None = None

    def _domains(self, seed: int) -> Stream:
        folder = Path(self.root or "")
        if not os.path.isdir(folder):  # False for a path that cannot be looked at, where Path.is_dir raises
            raise DataError(f"no folder {folder}: data.root must hold CIFAR-C files; check the path")
        names = shift_names(TEST) if self.corruptions is None else self.corruptions
        if not names:
            raise DataError(f"0 corruptions at {len(self.severities)} severities: at least one of each is needed")
        rows = len(labels_tensor(open_array(folder / LABELS), folder / LABELS))
        return [_domain(folder, name, severity, rows, self.limit) for severity in self.severities for name in names]


def _domain(folder: Path, name: str, severity: float, label_rows: int, limit: int | None) -> Domain:
    """One lazy domain; shapes and rows are checked at once."""
    if severity not in range(1, SEVERITIES + 1):
        raise DataError(f"severity {severity}: CIFAR-C files hold 1, 2, 3, 4 and 5; change data.severities")
    array = open_array(_find(folder, name))
    start, count = _rows(folder / f"{name}.npy", len(array), label_rows, int(severity))
    size = count if limit is None else min(limit, count)
    images_tensor(array[start : start + 1], folder / f"{name}.npy")
    return Domain(
        name,
        float(severity),
        size,
        partial(_read, folder, name, slice(start, start + size), size),
        partial(_labels, folder, size),
        lambda index: _read(folder, name, start + index.numpy(), size, index),
        lambda other: _domain(folder, name, other, label_rows, limit),
    )


def _find(folder: Path, name: str) -> Path:
    """The file of a corruption, which is one of the folder's own: a name is no path."""
    known = sorted(file.stem for file in folder.glob("*.npy") if file.name != LABELS)
    if name in known:
        return folder / f"{name}.npy"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    raise DataError(
        f"unknown corruption '{name}': "
        + (f"did you mean '{near[0]}'? {folder} has {', '.join(known)}" if near else f"{folder} has no CIFAR-C files")
    )


def _rows(path: Path, rows: int, label_rows: int, severity: int) -> tuple[int, int]:
    """First row and number of rows of a severity.

    A file holds one severity, or five; the labels are those of one severity, or the same repeated five times. Where
    both have as many rows, only the published size tells the two apart.
    """
    stacked = rows == SEVERITIES * label_rows or (rows == label_rows and rows == SEVERITIES * PUBLISHED_ROWS)
    if stacked:
        count = rows // SEVERITIES
        return (severity - 1) * count, count
    if rows not in (label_rows, label_rows / SEVERITIES):
        raise DataError(f"{path} has {rows} rows and labels.npy {label_rows}: they must be equal or 5 to 1; check both")
    if severity != SINGLE_SEVERITY:
        raise DataError(f"severity {severity}: {path} holds severity {SINGLE_SEVERITY} alone; set data.severities=[5]")
    return 0, rows


def _read(
    folder: Path, name: str, rows: slice | np.ndarray, size: int, index: slice | Tensor = slice(None)
) -> ImageSet:
    """Images of a domain by the rows of its file, and their labels, which repeat with every severity.

    Args:
        folder: of the files.
        name: of the corruption.
        rows: of its file.
        size: images of the domain.
        index: positions of the rows in the domain.
    """
    images = open_array(folder / f"{name}.npy")[rows]
    return ImageSet(images_tensor(images, folder / f"{name}.npy"), _labels(folder, size)[index])


def _labels(folder: Path, size: int) -> Tensor:
    return labels_tensor(open_array(folder / LABELS)[:size], folder / LABELS)
