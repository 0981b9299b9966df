"""Images and labels from ``.npy`` files."""

from dataclasses import dataclass

import numpy as np
import torch

from metaopt.data.images import ImageSet
from metaopt.data.readers.base import Reader
from metaopt.data.readers.npy import PathLike, open_array
from metaopt.data.stream import Stream, shifted_stream
from metaopt.errors import DataError
from metaopt.settings import PathSetting

LOOKED_AT = 2**20
"""Numbers of a file of the wrong type that are searched for NaN, which the message then names too."""


def load_arrays(images: PathLike, labels: PathLike | None = None) -> ImageSet:
    """Images (N, H, W, 3) uint8 and, where given, labels (N,) of any integer type.

    Raises:
        DataError: a file is missing or no ``.npy`` array, holds another shape or type, is empty, or the numbers differ.
    """
    pixels = images_tensor(open_array(images), images)
    return ImageSet(pixels, None if labels is None else labels_tensor(open_array(labels), labels))


@dataclass
class Arrays(Reader):
    """The images of a ``.npy`` file, as they are (one domain, "arrays") or under corruptions of the registry.

    Attributes:
        corruptions: none at all takes the images as they are.
        images: file of (N, H, W, 3) uint8.
        labels: file of (N,) integers; without it nothing can be scored.
    """

    name = "arrays"
    required = ("images", "reads .npy files")

    images: PathSetting | None = None
    labels: PathSetting | None = None

    def _domains(self, seed: int) -> Stream:
        assert self.images is not None
        clean = load_arrays(self.images, self.labels).take(self.limit)
        return shifted_stream(clean, self.corruptions or (), self.severities, name=self.name, seed=seed)


def images_tensor(array: np.ndarray, path: PathLike) -> torch.Tensor:
    """(N, H, W, 3) uint8 as a tensor (N, 3, H, W) of its own memory."""
    if array.dtype != np.uint8:
        raise DataError(f"{path} holds {array.dtype}{_not_finite(array)}: images are uint8 in 0..255; convert and save")
    if array.ndim != 4 or array.shape[3] != 3:
        raise DataError(f"{path} has shape {array.shape}: images are (N, H, W, 3); transpose and save")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def labels_tensor(array: np.ndarray, path: PathLike) -> torch.Tensor:
    """(N,) integers of 0 or more as int64."""
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{path} holds {array.dtype}{_not_finite(array)}: labels are integers; convert and save")
    if array.ndim != 1:
        raise DataError(f"{path} has shape {array.shape}: labels are (N,); flatten and save")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most > np.iinfo(np.int64).max:
        raise DataError(f"{path} has the label {least if least < 0 else most}: class indices start at 0; renumber them")
    return torch.from_numpy(array.astype(np.int64))


def _not_finite(array: np.ndarray) -> str:
    """A word on NaN and infinity, which a conversion would turn into arbitrary numbers."""
    floating = np.issubdtype(array.dtype, np.floating)
    return " with NaN or infinity" if floating and not np.isfinite(array.flat[:LOOKED_AT]).all() else ""
