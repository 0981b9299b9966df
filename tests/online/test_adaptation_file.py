"""An adaptation's file that is damaged, nonsense, or of another policy: one line, and the adapter is as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.errors import CheckpointError
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method

from ..tiny import CLASSES, random_images, tiny_model, tiny_policy
from .methods import BATCHES, default_policy, run, same

BN1 = "module.bn1.weight"


def method(lr: float = 1e-2, objective: str = "entropy", update: str = "adam", **parts: Any) -> AdaptationPolicy:
    chosen = {"batch_statistics": True, "sample_filter": {"margin": 1.0, "similarity": 1.0}, "recovery": 0.0, **parts}
    return build_method(MethodConfig("mine", update=update, lr=lr, objective={objective: 1.0}, parts=chosen))


@pytest.fixture
def adapter() -> OnlineAdapter:
    adapter = OnlineAdapter(tiny_model(), method())
    run(adapter, BATCHES[:3])
    return adapter


def stored(adapter: OnlineAdapter, path: Path) -> dict[str, Any]:
    adapter.save(path)
    return torch.load(path, weights_only=True)


def changed(name: str, index: int, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What puts another tensor into the state of a part or the rule."""

    def put(values: dict[str, Any]) -> dict[str, Any]:
        tensors = list(values["state"][name])
        tensors[index] = change(tensors[index])
        return {**values, "state": {**values["state"], name: tensors}}

    return put


def with_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def parameter(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {**values, "parameters": {**values["parameters"], BN1: change(values["parameters"][BN1])}}


MOMENTUM, SECOND_MOMENT, STEP = 0, 1, 2  # of Adam's state
NONSENSE: dict[str, Any] = {
    "parameters with NaN": parameter(with_first(float("nan"))),
    "parameters with infinity": parameter(with_first(float("inf"))),
    "parameters in float64": parameter(torch.Tensor.double),
    "parameters of integers": parameter(torch.Tensor.int),
    "parameters of numbers": parameter(torch.Tensor.tolist),
    "parameters without one": lambda values: {**values, "parameters": {BN1: values["parameters"][BN1]}},
    "momentum with NaN": changed("rule", MOMENTUM, with_first(float("nan"))),
    "momentum in float64": changed("rule", MOMENTUM, torch.Tensor.double),
    "negative squares": changed("rule", SECOND_MOMENT, with_first(-1e-3)),
    "negative updates": changed("rule", STEP, lambda step: -step),
    "updates as a fraction": changed("rule", STEP, torch.Tensor.float),
    "no tensor": changed("rule", STEP, int),
    "too few tensors": lambda values: {**values, "state": {**values["state"], "rule": values["state"]["rule"][:2]}},
    "tensors alone": lambda values: {**values, "state": {**values["state"], "rule": torch.zeros(3)}},
    "filter of other classes": changed("sample_filter", 0, lambda mean: torch.full((CLASSES + 1,), 0.1)),
    "filter of a scalar": changed("sample_filter", 0, lambda mean: torch.tensor(0.1)),
    "filter of no probabilities": changed("sample_filter", 0, lambda mean: torch.full((CLASSES,), -0.1)),
    "loss of several": changed("recovery", 0, lambda loss: torch.zeros(3)),
    "steps below 0": lambda values: {**values, "steps": -3},
    "steps as text": lambda values: {**values, "steps": "3"},
    "steps as truth": lambda values: {**values, "steps": True},
    "steps not whole": lambda values: {**values, "steps": 2.5},
    "events below 0": lambda values: {**values, "events": {"nonfinite": -1}},
    "events as text": lambda values: {**values, "events": {"nonfinite": "1"}},
    "events listed": lambda values: {**values, "events": [("nonfinite", 1)]},
    "events of no name": lambda values: {**values, "events": {3: 1}},
    "more events than batches": lambda values: {**values, "events": {"nonfinite": 4}},
    "an earlier version": lambda values: {**values, "version": 2},
    "a version of the future": lambda values: {**values, "version": [3]},
    "passes below 0": lambda values: {**values, "passes": -1.0},
    "passes without end": lambda values: {**values, "passes": float("inf")},
    "images as text": lambda values: {**values, "images": "3"},
    "a dial as text": lambda values: {**values, "dial": "1.3"},
    "a dial of no price": lambda values: {**values, "dial": {"saved": 0.0, "price": -1.0, "age": 1}},
    "another policy": lambda values: {**values, "policy": "0" * 64},
    "no policy": lambda values: {name: value for name, value in values.items() if name != "policy"},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_and_changes_nothing(name: str, adapter: OnlineAdapter, tmp_path: Path) -> None:
    undisturbed = OnlineAdapter(tiny_model(), method())
    run(undisturbed, BATCHES[:3])
    torch.save(NONSENSE[name](stored(adapter, tmp_path / "good.pt")), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as caught:
        adapter.load(tmp_path / "bad.pt")
    message = str(caught.value)
    assert "\n" not in message and "bad.pt" in message and len(message) < 500
    assert same(run(adapter, BATCHES[3:]), run(undisturbed, BATCHES[3:]))


OTHERS: dict[str, Callable[[], AdaptationPolicy]] = {
    "another rate": lambda: method(lr=2e-2),
    "another term": lambda: method(objective="slr"),
    "another setting of a part": lambda: method(sample_filter={"margin": 0.9, "similarity": 1.0}),
    "another count": lambda: method(batch_statistics=16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adaptation_of_other_settings_is_refused(name: str, adapter: OnlineAdapter, tmp_path: Path) -> None:
    OnlineAdapter(tiny_model(), OTHERS[name]()).save(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="another policy of that name"):
        adapter.load(tmp_path / "other.pt")


def test_an_adaptation_of_another_policy_is_refused(tmp_path: Path) -> None:
    first, second = (OnlineAdapter(tiny_model(), tiny_policy(tiny_model(), seed=seed)) for seed in (0, 1))
    run(second, BATCHES[:2])
    second.save(tmp_path / "second.pt")
    with pytest.raises(CheckpointError, match="another policy of that name"):
        first.load(tmp_path / "second.pt")


def test_a_policys_own_file_leads_to_the_same_fingerprint(tmp_path: Path) -> None:
    policy = default_policy(gate_bias=0.8)
    policy.save(tmp_path / "ckpt.pt")
    first = OnlineAdapter(tiny_model(), policy)
    second = OnlineAdapter(tiny_model(), AdaptationPolicy.load(tmp_path / "ckpt.pt"))
    run(first, BATCHES[:3])
    first.save(tmp_path / "stream.pt")
    second.load(tmp_path / "stream.pt")
    assert same(run(second, BATCHES[3:]), run(first, BATCHES[3:]))


def test_what_was_taken_of_other_clean_images_is_no_other_policy(tmp_path: Path) -> None:
    adapters = []
    for seed in (0, 1):
        policy = method(fisher=1.0)
        policy.prepare(tiny_model(), lambda seed=seed: random_images(16, seed))
        adapters.append(OnlineAdapter(tiny_model(), policy))
    run(adapters[0], BATCHES[:2])
    adapters[0].save(tmp_path / "stream.pt")
    adapters[1].load(tmp_path / "stream.pt")
    assert adapters[1].steps == 2
