"""MoASE and CoTTA by command on digits, and every ablation by configuration alone."""

import csv
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaopt.errors import DataError
from metaopt.evaluation import read_scalars

from .commands import TINY_META, TINY_STREAM, command

meta_train = command("pretrain/meta_train.py")
online = command("adapt/online.py")
benchmark = command("adapt/benchmark.py")

# Wide experts, so that ASG's small changes of a share move a whole activation; a view, so that there is a gradient.
MOASE = ["method=moase", "method.lr=0.01", "method.parts.experts.bottleneck=64", "method.parts.teacher.views=1"]


def confidences(out: str, *argv: str) -> list[str]:
    """What a run predicts, to six digits."""
    assert online([*TINY_STREAM, f"out={out}", *argv]) == 0
    with Path(out, "predictions.csv").open() as file:
        return [row["confidence"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", ["moase", "cotta"])
def test_the_method_runs_and_tells_what_it_costs(
    method: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = ["method.parts.teacher.views=1"]
    assert online([*TINY_STREAM, f"method={method}", *views, "memory=exact", "out=run"]) == 0
    summary = json.loads((workspace / "run/summary.json").read_text())
    assert (summary["method"], summary["images"], summary["updates"]) == (method, 40, 6)
    assert summary["state_mib"] > 0 and summary["held_mib"] > 0
    assert f"{method} on cifar_resnet20" in capsys.readouterr().out


def test_the_benchmark_takes_them_as_arms(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*TINY_STREAM, "data.corruptions=[fog]", "method.cotta.parts.teacher.views=0", "out=bench"]
    assert benchmark([*few, "methods=[bn,moase,cotta]"]) == 0
    rows = list(csv.DictReader((workspace / "bench/benchmark.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["bn", "moase", "cotta"]
    assert "moase" in capsys.readouterr().out


@pytest.mark.slow
def test_each_ablation_changes_what_is_predicted(workspace: Path) -> None:
    settings = [
        "experts.sdd=false",
        "experts.dag=false",
        "experts.asg=false",
        "teacher.proximal=0",
        "teacher.restore=0",
    ]
    parts = [f"parts.{setting}" for setting in settings]
    sizes = [f"parts.experts.experts={count}" for count in (2, 4, 8, 16)]
    adapts = [f"adapts={kind}" for kind in ("all", "experts", "norm")]
    runs = {part: confidences(part, *MOASE, f"method.{part}") for part in [*parts, *sizes, *adapts]}
    assert runs["parts.experts.experts=4"] == confidences("whole", *MOASE)
    assert len({tuple(run) for run in runs.values()}) == len(runs)
    assert runs["adapts=norm"][:8] == runs["adapts=experts"][:8]  # the first batch is before any update


@pytest.mark.slow
def test_experts_are_meta_trained_and_deployed_by_their_checkpoint_alone(workspace: Path) -> None:
    small = ["recipe=experts", "parts.experts.experts=2", "parts.experts.bottleneck=4"]
    small += ["parts.experts.gates=frozen", "out=trained"]
    assert meta_train([*TINY_META, *small]) == 0
    assert online([*TINY_STREAM, "--policy", "ckpt.pt", "memory=exact", "out=deployed"]) == 0
    summary = json.loads((workspace / "deployed/summary.json").read_text())
    assert (summary["method"], summary["updates"]) == ("policy", 6)
    for expert in ("low_0", "high_1"):
        weights = [value for _, value in read_scalars(workspace / "deployed", f"policy/expert_usage/{expert}")]
        assert len(weights) == 6 and all(0 <= weight <= 1 for weight in weights)
    shown = EventAccumulator(str(workspace / "deployed")).Reload().Tags()["images"]
    assert shown == ["policy/expert_usage_by_domain"]
    assert read_scalars(workspace / "trained", "meta/grad_norm/experts")
    with pytest.raises(DataError, match="no curve"):
        read_scalars(workspace / "trained", "meta/grad_norm/gates")
