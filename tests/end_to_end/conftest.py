"""A workspace with a source model and a policy, as earlier commands have left them."""

import os
import shutil
from pathlib import Path

import pytest

from .commands import TINY_META, command, write_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.pt``, and what a whole meta-training by the command leaves: ``ckpt.pt`` and the folder ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    write_model(folder / "model.pt")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert command("pretrain/meta_train.py")([*TINY_META, "out=run"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of ``trained`` of its own."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, corrupted images and weights."""
    root = os.environ.get("METAOPT_TEST_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("METAOPT_TEST_DATA names no folder with cifar10/, cifar10c/ and weights/")
    return Path(root)
