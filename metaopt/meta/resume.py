"""The file that a stopped meta-training goes on from."""

from pathlib import Path
from typing import Any

from metaopt.errors import CheckpointError
from metaopt.files import atomic_save, safe_load, says, weights_sha256
from metaopt.meta.trainer import MetaTrainer

FORMAT = "metaopt-meta-training"
VERSION = 1


def save_run(trainer: MetaTrainer, state: dict[str, Any], path: str | Path) -> None:
    """Write a state of the trainer atomically.

    Args:
        trainer: gives the fingerprint of the images.
        state: its ``state_dict()``, of now or of an earlier moment.
        path: the file.

    Raises:
        OutputError: the file cannot be written.
    """
    atomic_save({"format": FORMAT, "version": VERSION, "images": _images(trainer), "trainer": state}, path)


def load_run(trainer: MetaTrainer, path: str | Path) -> None:
    """Put the trainer where :func:`save_run` left off.

    Raises:
        CheckpointError: the file is missing, unsafe, foreign or damaged, or was written under other settings, with
            another model or other images.
    """
    values = safe_load(path, checksums=True)
    if not says(values, "format", FORMAT) or not says(values, "version", VERSION):
        raise CheckpointError(
            f"'{path}' holds no meta-training to resume; allowed is a last.pt of pretrain/meta_train.py: give one"
        )
    if not says(values, "images", _images(trainer)):
        raise CheckpointError(
            "the run to resume had other unlabeled images; allowed are the same ones: repeat its overrides of "
            "source.images and n_unlabeled, or start a new run"
        )
    if not isinstance(values.get("trainer"), dict):
        raise CheckpointError(f"'{path}' is damaged (it holds no trainer); start a new run")
    trainer.load_state_dict(values["trainer"])


def _images(trainer: MetaTrainer) -> str:
    return weights_sha256({"images": trainer.images})
