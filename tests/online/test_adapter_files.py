"""The adapter's files: a stream saved in the middle goes on unbroken; what does not fit changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.errors import CheckpointError, OutputError
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter

from ..tiny import tiny_model, tiny_net, tiny_policy
from .methods import BATCHES, DEFAULT, METHODS, new_adapter, run, same

CUTS = [
    *(pytest.param(method, cut, False) for method in METHODS for cut in (3, 5)),
    *(pytest.param(method, 3, True) for method in METHODS),
]


@pytest.mark.parametrize(("method", "cut", "spoiled"), CUTS)
def test_saved_and_loaded_in_mid_stream_is_unbroken(method: str, cut: int, spoiled: bool, tmp_path: Path) -> None:
    whole, first, second = (new_adapter(method) for _ in range(3))
    expected = run(whole)
    logits = run(first, BATCHES[:cut])
    if spoiled:
        first(BATCHES[0] * float("nan"))
    first.save(tmp_path / "stream.pt")
    run(second, BATCHES[5:])  # whatever it has done before is forgotten
    second.load(tmp_path / "stream.pt")
    assert (second.steps, second.updates) == (first.steps, first.updates)
    assert second.events == first.events
    assert same(logits + run(second, BATCHES[cut:]), expected)
    assert same(list(second.parameters.values()), list(whole.parameters.values()))
    torch.load(tmp_path / "stream.pt", weights_only=True)
    second.reset()
    assert same(run(second), expected)


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
def test_files_that_do_not_fit_are_refused_and_change_nothing(method: str, tmp_path: Path) -> None:
    adapter, undisturbed = new_adapter(method), new_adapter(method)
    run(adapter, BATCHES[:2])
    run(undisturbed, BATCHES[:2])
    wide = SourceModel(type(tiny_net())(width=6))
    tent = METHODS["tent"]()
    cases: dict[str, tuple[OnlineAdapter, str]] = {
        "method.pt": (new_adapter("tent"), "it is of method 'tent', not 'policy'"),
        "rule.pt": (new_adapter("step_sizes"), "another rule" if method == "residual" else "other parts"),
        "parts.pt": (new_adapter("residual" if method in ("default", "default, skewed") else "default"), "other parts"),
        "shapes.pt": (OnlineAdapter(wide, tent), "its parameters are of another model"),
        "weights.pt": (OnlineAdapter(tiny_model(seed=1), tiny_policy(tiny_model(seed=1))), "other weights"),
    }
    for name, (other, message) in cases.items():
        other.save(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            adapter.load(tmp_path / name)
    tiny_policy(tiny_model()).save(tmp_path / "policy.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    for name, message in (("policy.pt", "holds no online"), ("garbage.pt", "no readable"), ("missing.pt", "no file")):
        with pytest.raises(CheckpointError, match=message):
            adapter.load(tmp_path / name)
    assert same(run(adapter, BATCHES[2:]), run(undisturbed, BATCHES[2:]))


@pytest.mark.parametrize("method", ["residual", *DEFAULT])
def test_damaged_files_are_refused(method: str, tmp_path: Path) -> None:
    adapter = new_adapter(method)
    adapter.save(tmp_path / "good.pt")
    values: dict[str, Any] = torch.load(tmp_path / "good.pt", weights_only=True)
    for key in values:
        torch.save({name: value for name, value in values.items() if name != key}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError):
            adapter.load(tmp_path / "bad.pt")
        torch.save({**values, key: None}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError):
            adapter.load(tmp_path / "bad.pt")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        adapter.save(tmp_path / "file" / "stream.pt")
