"""Draw our corruptions beside the published files, to be looked at.

    METAOPT_TEST_DATA=... python tests/data/corruptions/draw_beside_published.py FOLDER [CORRUPTION ...]

writes FOLDER/<corruption>.png for frost and snow, or for the named ones: published on the left, ours on the right.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metaopt.data.readers.arrays import load_arrays
from metaopt.data.shifts import get_shift
from metaopt.data.stream import corrupt

ROWS, COLUMNS, ZOOM, GAP = 5, 8, 3, 12


def grid(images: Tensor) -> Tensor:
    """The first images (N, 3, H, W) as one enlarged picture (3, h, w)."""
    tiles = images[: ROWS * COLUMNS].unflatten(0, (ROWS, COLUMNS))  # (rows, columns, 3, H, W)
    picture = tiles.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return picture.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2)


def draw(root: Path, folder: Path, name: str) -> Path:
    """Write one picture and say where."""
    clean = load_arrays(root / "cifar10/test_images.npy").take(ROWS * COLUMNS)
    published = load_arrays(root / f"cifar10c/{name}.npy").take(ROWS * COLUMNS)
    ours = corrupt(clean, get_shift(name), 5.0)
    picture = torch.cat([F.pad(grid(published.images), (0, GAP)), grid(ours.images)], dim=2)
    path = folder / f"{name}.png"
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) < 2 or "METAOPT_TEST_DATA" not in os.environ:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for corruption in sys.argv[2:] or ["frost", "snow"]:
        print(draw(Path(os.environ["METAOPT_TEST_DATA"]), target, corruption))
