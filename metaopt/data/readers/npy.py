"""``.npy`` files, whose header is read and compared with the file before anything of the size it names is made."""

import io
import math
import os
import stat
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np

from metaopt.errors import DataError

PathLike = str | os.PathLike[str]

LARGEST_HEADER = 10_000  # characters, as numpy's own limit: its parser is not safe with longer ones
NUMBERS = "biufc"  # kinds of numpy's types


class _Header(NamedTuple):
    """What a file says of the array in it."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int  # byte at which the values begin


def open_array(path: PathLike) -> np.ndarray:
    """A ``.npy`` file of numbers, with at least one axis and one value, mapped into memory; nothing is read yet.

    Raises:
        DataError: the file is missing, closed, damaged, empty, cut short or too long, or holds other things.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path} is no plain file: a .npy array is needed; check the path")
        with open(path, "rb") as file:
            header = _read_header(file, path)
            _check(header, os.fstat(file.fileno()).st_size, path)
            order = "F" if header.fortran_order else "C"
            return np.memmap(file, header.dtype, "r", header.start, header.shape, order)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"no file {path}: a .npy array is needed; check the path") from error
    except (OSError, ValueError, OverflowError) as error:  # too long a path, a closed one, more axes than numpy has
        raise _unreadable(path, error) from error


def _read_header(file: BinaryIO, path: PathLike) -> _Header:
    start = file.read(LARGEST_HEADER + 12)  # with magic string, version and length; no more, whatever length it says
    if start[:2] == b"PK":
        raise DataError(f"{path} holds several arrays: one .npy array is needed; save the images alone")
    if start[:1] == b"\x80":
        raise DataError(f"cannot read {path} (it holds pickled Python objects): a .npy array of numbers is needed")
    try:
        top = io.BytesIO(start)
        version = np.lib.format.read_magic(top)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"format {version}")
        # Version 3 differs from 2 in the encoding of field names alone, and none are allowed.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old Python's integers, and of what damage makes of a literal
            return _Header(*read(top, max_header_size=LARGEST_HEADER), top.tell())
    except Exception as error:  # numpy parses the header as Python, and damaged Python can raise nearly anything
        raise _unreadable(path, error) from error


def _check(header: _Header, size: int, path: PathLike) -> None:
    """Compare what a header says with the size of its file, bytes."""
    shape, dtype = header.shape, header.dtype
    if dtype.kind not in NUMBERS:
        held = "Python objects" if dtype.hasobject else f"values of type {str(dtype)[:40]}"
        raise DataError(f"cannot read {path} (it holds {held}): a .npy array of numbers is needed; save it again")
    if any(length < 0 for length in shape):
        raise DataError(f"{path} has shape {shape}: no axis is shorter than 0; the file is damaged, save it again")
    if not shape:
        raise DataError(f"{path} holds a single number: an array of at least one axis is needed; save it again")
    if 0 in shape:
        raise DataError(f"{path} has shape {shape}: at least one image is needed; the file is empty")
    declared, held = math.prod(shape) * dtype.itemsize, size - header.start
    if declared != held:
        raise DataError(
            f"cannot read {path} (its header declares {declared} bytes of values and {held} follow): it is cut short "
            "or damaged, or holds more than one array; save one array again"
        )


def _unreadable(path: PathLike, error: Exception) -> DataError:
    reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return DataError(f"cannot read {path} ({reason}): a .npy array of numbers is needed; save it again")
