"""The policy's file: what goes in comes out, nothing unsafe or foreign comes in, and no write destroys."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.errors import CheckpointError, OutputError
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.optimizers.mgg import VARIANTS, GradientGenerator
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.restoration import Restoration, RestorationConfig
from metaopt.policy.parts.update_gate import UpdateGate

from ..tiny import random_images, statistics_of, tiny_model, tiny_net, tiny_policy, with_parts


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt.pt"
    tiny_policy(tiny_model()).save(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_comes_back_bit_equal(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = tiny_policy(tiny_model(dtype=dtype), variant)
    policy.save(tmp_path / "ckpt.pt")
    loaded = AdaptationPolicy.load(tmp_path / "ckpt.pt")
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    before, after = statistics_of(policy), statistics_of(loaded)
    assert before is not None and after is not None
    for kept, read in zip(before.mean + before.std, after.mean + after.std, strict=True):
        assert torch.equal(kept, read)
    assert loaded.source == policy.source
    assert loaded.training == policy.training
    assert (loaded.method, loaded.adapts) == (policy.method, policy.adapts)
    assert [part.to_dict() for part in loaded.listed] == [part.to_dict() for part in policy.listed]
    assert list(loaded.parts) == ["batch_statistics"]
    assert isinstance(loaded.rule, GradientGenerator) and isinstance(policy.rule, GradientGenerator)
    assert (loaded.rule.config, loaded.rule.tensors) == (policy.rule.config, policy.rule.tensors)
    assert loaded.objective is not None and policy.objective is not None
    assert loaded.objective.learned == policy.objective.learned
    assert loaded.objective.to_dict()["weights"] == policy.objective.to_dict()["weights"]


def test_a_loaded_policy_adapts_bit_equally(saved: Path) -> None:
    policy = tiny_policy(tiny_model())
    first, second = OnlineAdapter(tiny_model(), policy), OnlineAdapter(tiny_model(), AdaptationPolicy.load(saved))
    for seed in range(4):
        assert torch.equal(first(random_images(8, seed)), second(random_images(8, seed)))


def test_the_file_is_small_and_safe(saved: Path) -> None:
    assert saved.stat().st_size < 2**20
    values = torch.load(saved, weights_only=True)
    assert values["format"] == "metaopt-policy"
    assert values["source"]["sha256"] == tiny_model().weights_sha256()


class Explosive:
    """Pickles as a call that makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_a_file_is_refused_and_never_runs(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    for name, write in (
        ("torch.pt", lambda path: torch.save({"format": "metaopt-policy", "x": Explosive(trace)}, path)),
        ("plain.pt", lambda path: path.write_bytes(pickle.dumps(Explosive(trace)))),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match="was not loaded"):
            AdaptationPolicy.load(tmp_path / name)
    assert not trace.exists()


def test_unreadable_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(CheckpointError, match="no file"):
        AdaptationPolicy.load(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="folder"):
        AdaptationPolicy.load(tmp_path)
    for broken in (b"", b"no checkpoint at all", content[: len(content) // 2], content[:-30], content[200:]):
        saved.write_bytes(broken)
        with pytest.raises(CheckpointError, match="no readable file"):
            AdaptationPolicy.load(saved)


def test_flipped_bytes_are_refused(saved: Path) -> None:
    policy = AdaptationPolicy.load(saved)
    assert isinstance(policy.rule, GradientGenerator) and policy.rule.memory is not None
    payload = policy.rule.memory.initial_weight.detach().numpy().tobytes()
    content = saved.read_bytes()
    assert content.count(payload) == 1
    saved.write_bytes(content.replace(payload, bytes([payload[0] ^ 1]) + payload[1:]))
    with pytest.raises(CheckpointError, match="no readable file"):
        AdaptationPolicy.load(saved)


@pytest.mark.parametrize("foreign", [torch.zeros(3), [1, 2], {"conv.weight": torch.zeros(2)}, {"format": "other"}, 7])
def test_foreign_files_are_refused(foreign: object, tmp_path: Path) -> None:
    torch.save(foreign, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="is not a policy"):
        AdaptationPolicy.load(tmp_path / "foreign.pt")


@pytest.mark.parametrize("version", [0, 1, 3, None, "2"])
def test_another_version_is_refused(version: object) -> None:
    values = {**tiny_policy(tiny_model()).to_dict(), "version": version}
    with pytest.raises(CheckpointError, match=f"has version {version}; this release reads version 2"):
        AdaptationPolicy.from_dict(values)


@pytest.mark.parametrize("part", ["weights", "statistics"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(part: str, value: float) -> None:
    values = tiny_policy(tiny_model()).to_dict()
    known = values["objective"]["terms"]["discrepancy"]
    tensor = values["weights"]["rule.log_step_sizes"] if part == "weights" else known["std"][1]
    tensor[1] = value
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        AdaptationPolicy.from_dict(values)


def test_missing_or_unfit_parts_are_refused() -> None:
    good = tiny_policy(tiny_model()).to_dict()
    AdaptationPolicy.from_dict(good)
    for key in set(good) - {"format", "version"}:
        rest = {name: value for name, value in good.items() if name != key}
        if key in ("layers", "seed"):  # which files of older releases lack
            assert AdaptationPolicy.from_dict(rest).layers is None
        else:
            with pytest.raises(CheckpointError, match="is damaged"):
                AdaptationPolicy.from_dict(rest)
        with pytest.raises(CheckpointError, match="is damaged"):
            AdaptationPolicy.from_dict({**good, key: 3.5 if key != "method" else None} | _unset(key))
    for weights in (
        {},
        {**good["weights"], "extra": torch.zeros(1)},
        {**good["weights"], "rule.memory.key": torch.zeros(3)},
    ):
        with pytest.raises(CheckpointError, match="is damaged"):
            AdaptationPolicy.from_dict({**good, "weights": weights})
    with pytest.raises(CheckpointError, match="is damaged"):
        AdaptationPolicy.from_dict({**good, "seed": None})
    for key, value in (("variant", "other"), ("lr", -1.0), ("speed", 3)):
        with pytest.raises(CheckpointError, match="is damaged"):
            AdaptationPolicy.from_dict({**good, "generator": {**good["generator"], key: value}})


def _unset(key: str) -> dict[str, Any]:
    """A wrong name alone cannot be told from a right one; break something beside it."""
    return {"weights": None} if key == "method" else {}


def test_other_models_are_refused(saved: Path) -> None:
    policy = AdaptationPolicy.load(saved)
    policy.check_source(tiny_model())

    class OtherNet(type(tiny_net())):
        pass

    other = OtherNet()
    other.load_state_dict(tiny_net().state_dict())
    with pytest.raises(CheckpointError, match=r"trained on custom:TinyNet and the model is custom:OtherNet"):
        OnlineAdapter(SourceModel(other), policy)
    with pytest.raises(CheckpointError, match="trained on 10 classes and the model has 4"):
        OnlineAdapter(tiny_model(classes=4), policy)
    with pytest.raises(CheckpointError, match="trained on weights"):
        OnlineAdapter(tiny_model(seed=1), policy)
    with pytest.raises(CheckpointError, match="normalised images by"):
        OnlineAdapter(SourceModel(tiny_net(), mean=(0.5, 0.5, 0.5)), policy)
    OnlineAdapter(tiny_net(), policy)  # the plain module is the same model


def test_running_buffers_are_part_of_the_weights(saved: Path) -> None:
    net = tiny_net()
    assert net.bn1.running_var is not None
    net.bn1.running_var[0] += 1e-3
    with pytest.raises(CheckpointError, match="trained on weights"):
        OnlineAdapter(net, AdaptationPolicy.load(saved))


def test_a_method_that_was_never_trained_is_not_saved(tmp_path: Path) -> None:
    tent = build_method(MethodConfig("tent", update="adam", objective={"entropy": 1.0}))
    bn = build_method(MethodConfig("bn", parts={"batch_statistics": True}))
    for method in (tent, AdaptationPolicy("source"), bn):
        with pytest.raises(CheckpointError, match="cannot be saved as a policy"):
            method.save(tmp_path / "ckpt.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_write_keeps_the_old_file(saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OutputError, match="No space left"):
        tiny_policy(tiny_model(), seed=5).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_does_not_touch_the_policy() -> None:
    policy = tiny_policy(tiny_model())
    values = policy.to_dict()
    values["weights"]["rule.log_step_sizes"].fill_(7.0)
    assert not bool((policy.state_dict()["rule.log_step_sizes"] == 7.0).any())


def test_restoration_and_gate_come_back(tmp_path: Path) -> None:
    restoration, gate = Restoration(RestorationConfig(peak=0.6)), UpdateGate()
    policy = with_parts(tiny_policy(tiny_model()), restoration, gate)
    with torch.no_grad():
        restoration.log_width.add_(0.2)
        gate.bias.add_(0.3)
    policy.save(tmp_path / "ckpt.pt")
    loaded = AdaptationPolicy.load(tmp_path / "ckpt.pt")
    assert loaded.part("restoration").config == RestorationConfig(peak=0.6)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    values = policy.to_dict()
    for key in ("restoration", "update_gate"):
        with pytest.raises(CheckpointError, match="is damaged"):
            without = {name: part for name, part in values["parts"].items() if name != key}
            AdaptationPolicy.from_dict({**values, "parts": without})
        with pytest.raises(CheckpointError, match="is damaged"):
            AdaptationPolicy.from_dict({**values, "parts": {**values["parts"], key: 3.5}})
