"""The verdict by command: what it writes, that no prediction changes by it, and what it is refused with."""

import json
from pathlib import Path
from typing import Any

import pytest

from metaopt.evaluation import read_scalars
from metaopt.policy import AdaptationPolicy

from .commands import TINY_META, TINY_STREAM, command

online = command("adapt/online.py")
meta_train = command("pretrain/meta_train.py")

VERDICT = "method.parts.verdict={cells: 8, every: 2}"
FEW = "n_unlabeled=16"


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_tells_its_error_without_labels(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tent = ["method=tent", "method.lr=0.01", FEW, *TINY_STREAM]
    assert online([*tent, VERDICT, "out=judged"]) == 0
    printed = capsys.readouterr().out
    assert online([*tent, "out=plain"]) == 0
    assert "estimated" not in capsys.readouterr().out and "estimated_error" not in summary_of(workspace / "plain")
    assert (workspace / "judged/predictions.csv").read_bytes() == (workspace / "plain/predictions.csv").read_bytes()
    summary = summary_of(workspace / "judged")
    for name in ("estimated", "source_estimated"):
        low, high = summary[f"{name}_interval"]
        told = [domain[f"{name}_error"] for domain in summary["domains"]]
        assert 0 < low < summary[f"{name}_error"] < high < 100
        assert summary[f"{name}_error"] == pytest.approx(sum(told) / 2)
        assert f"error {summary[f'{name}_error']:.1f} % (95 %: {low:.1f} to {high:.1f})" in printed
        curve = read_scalars("judged", f"online/{name}_error")
        assert [step for step, _ in curve] == list(range(1, 7))
        assert [curve[2][1], curve[5][1]] == pytest.approx(told, rel=1e-5)


def test_a_roll_back_brings_a_fitted_verdict_along(workspace: Path) -> None:
    parts = ["method.parts.rollback=true", VERDICT]
    assert online(["method=tent", "method.lr=0.01", FEW, *TINY_STREAM, *parts, "out=watched"]) == 0
    summary = summary_of(workspace / "watched")
    assert "estimated_error" in summary and {"rolled_back", "held"} <= set(summary["guard_events"])


def test_a_policy_keeps_what_was_fitted(workspace: Path) -> None:
    assert meta_train([*TINY_META, "parts.verdict={cells: 8}", "meta.report_tasks=0", "out=run"]) == 0
    policy = AdaptationPolicy.load("ckpt.pt")
    assert policy.part("verdict").fitted
    assert online(["--policy", "ckpt.pt", *TINY_STREAM, "out=out"]) == 0
    assert "estimated_error" in summary_of(workspace / "out")


def test_a_method_that_never_updates_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert online(["method=bn", "method.parts.verdict=true", FEW, *TINY_STREAM, "out=out"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'bn' never updates" in line and "set method.parts.verdict=false" in line
