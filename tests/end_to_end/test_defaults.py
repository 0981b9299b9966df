"""The two commands with their defaults, and on real data."""

import json
import time
from pathlib import Path

import pytest

from metaopt.meta.report import AFTER

from .commands import command

meta_train = command("pretrain/meta_train.py")
online = command("adapt/online.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "rival"),
    # Batch statistics alone leave the digits' ResNet little to win (8 % error); the transformer has none to renew.
    [("cifar_resnet20", "source"), ("digits_vit", "bn")],
)
def test_defaults_learn_and_help_on_digits(
    model: str, rival: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert meta_train([f"model={model}"]) == 0
    assert online(["--policy", "ckpt.pt", f"model={model}", "out=policy"]) == 0
    with capsys.disabled():
        print(f" both commands with the source model's training: {time.monotonic() - start:.0f} s", end="")
    assert online([f"method={rival}", f"model={model}", "out=rival"]) == 0
    assert (tmp_path / "ckpt.pt").stat().st_size < 2**20
    (trained,) = (tmp_path / "runs/meta_train").glob("*/summary.json")
    drop = json.loads(trained.read_text())["report"]["drop"][AFTER]
    assert drop["high"] < 0, f"the meta-loss on unseen tasks did not fall: {drop}"
    errors = {
        name: json.loads((tmp_path / name / "summary.json").read_text())["mean_error"] for name in ("policy", "rival")
    }
    assert errors["policy"] < errors["rival"] - 1


def test_real_data(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = [f"model.checkpoint={real_data}/weights/cifar10_resnet20.pt", "batch_size=50"]
    clean = [f"source.images={real_data}/cifar10/train_images.npy", "meta.epochs=1", "meta.unrolls=1", "meta.steps=1"]
    assert meta_train([*model, "data=arrays", *clean, "meta.selection_tasks=1", "meta.report_tasks=0"]) == 0
    stream = ["data=cifar_c", f"data.root={real_data}/cifar10c", "data.corruptions=[brightness]", "data.limit=100"]
    for method in ("source", "policy"):
        policy = ["--policy", "ckpt.pt"] if method == "policy" else ["method=source"]
        assert online([*policy, *model, *stream, f"out={method}"]) == 0
        summary = json.loads((tmp_path / method / "summary.json").read_text())
        assert summary["images"] == 100
        assert 5 < summary["mean_error"] < 50, "brightness is the mildest of the corruptions"
