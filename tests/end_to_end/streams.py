"""What two runs over the same stream are compared by."""

import json
from pathlib import Path
from typing import Any

import torch

from metaopt.files import safe_load

FILES = {"predictions.csv", "memory.csv", "summary.json", "snapshot.pt"}


def untimed(folder: Path) -> dict[str, Any]:
    """The summary without what the clock says."""
    found = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in found.items() if "_ms" not in key and "ratio" not in key}


def same_runs(folder: Path, other: Path) -> bool:
    """Whether two runs gave the same answers, figures and state."""
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events")} == FILES
    assert untimed(folder) == untimed(other)
    for name in ("predictions.csv", "memory.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    one, two = (safe_load(each / "snapshot.pt")["run"]["adapter"] for each in (folder, other))
    assert repr(one) == repr(two)
    return all(torch.equal(one["parameters"][name], tensor) for name, tensor in two["parameters"].items())
