"""The README's Python runs as it stands; only meta-training is cut short."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.data import shifts
from metaopt.meta import train as module

from ..tiny import tiny_config

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_there_is_an_example_for_ones_own_model() -> None:
    own = [block for block in BLOCKS if "meta_train(" in block and "OnlineAdapter(" in block]
    assert own
    for block in own:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("number", range(max(1, len(BLOCKS))))
def test_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shifts, "_SHIFTS", dict(shifts._SHIFTS))
    monkeypatch.setattr(module, "MetaTrainConfig", lambda: tiny_config(epochs=1))
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"{README.name}, example {number + 1}", "exec"), names)
    if "logits" in names:
        assert torch.isfinite(names["logits"]).all()
        assert names["adapter"].updates > 0
        assert (tmp_path / "ckpt.pt").stat().st_size < 2**20
