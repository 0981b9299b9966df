import os
from pathlib import Path

import pytest

from metaopt.data.images import ImageSet
from metaopt.data.readers.digits import load_digits


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, corrupted images and weights."""
    root = os.environ.get("METAOPT_TEST_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("METAOPT_TEST_DATA names no folder with cifar10/, cifar10c/ and weights/")
    return Path(root)


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    """Forty labelled digits, (40, 3, 32, 32)."""
    return load_digits().stream.take(40)
