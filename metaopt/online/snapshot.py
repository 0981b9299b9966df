"""The file that a stopped run over a stream goes on from."""

from pathlib import Path
from typing import Any

from metaopt.errors import CheckpointError
from metaopt.files import atomic_save, safe_load

FORMAT = "metaopt-stream"
VERSION = 1
SNAPSHOT = "snapshot.pt"  # in the run's folder


def save_snapshot(values: dict[str, Any], folder: Path) -> None:
    """Write tensors and primitives atomically.

    Raises:
        OutputError: the file cannot be written; an earlier one is still there.
    """
    atomic_save({"format": FORMAT, "version": VERSION, **values}, folder / SNAPSHOT)


def load_snapshot(folder: Path) -> dict[str, Any]:
    """What :func:`save_snapshot` wrote.

    Raises:
        CheckpointError: there is none, or the file is unsafe, foreign or damaged.
    """
    path = folder / SNAPSHOT
    if not path.exists():
        raise CheckpointError(
            f"no '{path}' to go on from; allowed is the folder of an adaptation that has answered a batch: give one, "
            "or start the run anew"
        )
    values = safe_load(path, checksums=True)
    if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"'{path}' holds no adaptation to resume; allowed is a {SNAPSHOT} of adapt/online.py: give its folder"
        )
    return values
