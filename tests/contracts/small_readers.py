"""Settings of every reader for a stream of a few images, and the files for it: what a new reader is enrolled with."""

from pathlib import Path
from typing import Any

import numpy

IMAGES = 6
FILES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "arrays": ("images.npy", "labels.npy"),
    "cifar_c": ("fog.npy", "snow.npy", "labels.npy"),
}
"""What each reader reads, in the folder."""


def write_files(folder: Path) -> None:
    """All of them."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=numpy.uint8)
    for file in ("images", "fog", "snow"):
        numpy.save(folder / f"{file}.npy", pixels)
    numpy.save(folder / "labels.npy", numpy.arange(IMAGES))


def reader_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of each reader for at most a few images of the folder's under fog and snow."""
    small = {"corruptions": ["fog", "snow"], "limit": 4}
    return {
        "digits": small,
        "arrays": {**small, "images": str(folder / "images.npy"), "labels": str(folder / "labels.npy")},
        "cifar_c": {**small, "root": str(folder)},
    }
