"""What is told of a batch that was not updated on: by gate, guard or part, or by a method without a rule."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from metaopt.online import OnlineAdapter
from metaopt.policy import MethodConfig, build_method

from ..tiny import BARE, random_images, tiny_model

NOTHING_IS_RELIABLE = {"margin": 0.0}
EVERY = {"every": 2}


def adapter_with(parts: Mapping[str, Any], weight: float = 1.0) -> OnlineAdapter:
    config = MethodConfig("tent", update="adam", lr=0.01, objective={"entropy": weight}, parts={**BARE, **parts})
    return OnlineAdapter(tiny_model(), build_method(config))


@pytest.mark.parametrize(
    ("parts", "weight", "event"),
    [({}, 1e38, "nonfinite"), ({"sample_filter": NOTHING_IS_RELIABLE}, 1.0, "refused")],
    ids=["guard", "part"],
)
@pytest.mark.parametrize("gate", [False, True])
def test_a_refused_batch_is_not_updated_on_and_not_skipped(
    parts: dict[str, Any], weight: float, event: str, gate: bool
) -> None:
    adapter = adapter_with({**parts, "update_gate": {"every": 1}} if gate else parts, weight)
    output = adapter.step(random_images(8))
    assert not output.updated and output.loss is not None
    assert (adapter.steps, adapter.updates, adapter.events[event]) == (1, 0, 1)
    if gate:
        assert adapter.events["skipped"] == 0 and "skipped" not in output.events
        # Batches since the last update: one that is not finite is none.
        assert adapter.state["update_gate"].rest.item() == (event == "refused")


def test_a_closed_gate_skips_and_an_open_one_updates() -> None:
    adapter = adapter_with({"update_gate": EVERY})
    outputs = [adapter.step(random_images(8, seed)) for seed in range(3)]
    assert [output.updated for output in outputs] == [True, False, True]
    assert (adapter.updates, adapter.events["skipped"]) == (2, 1)


@pytest.mark.parametrize("method", ["source", "bn", "tent"])
def test_a_look_and_a_method_without_a_rule_update_nothing(method: str) -> None:
    parts = {} if method == "source" else BARE
    policy = build_method(MethodConfig(method, parts=dict(parts))) if method != "tent" else None
    adapter = adapter_with({}) if policy is None else OnlineAdapter(tiny_model(), policy)
    with adapter.frozen():
        assert not adapter.step(random_images(8)).updated
    assert adapter.step(random_images(8)).updated == (method == "tent") == bool(adapter.updates)


def test_updates_are_counted_across_files(tmp_path) -> None:
    first, second = (adapter_with({"update_gate": EVERY}) for _ in range(2))
    for seed in range(3):
        first.step(random_images(8, seed))
    first.step(torch.full_like(random_images(8), torch.nan))  # no batch at all
    first.step(random_images(8))  # the gate is closed
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    assert (first.steps, first.updates) == (second.steps, second.updates) == (4, 2)
    second.reset()
    assert second.updates == 0
