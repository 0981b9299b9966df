"""``adapt/footprint.py``: what it measures of one step."""

from pathlib import Path

import pytest
import torch

from metaopt.models import load_source_model
from metaopt.online.footprint import Case, measure_footprint
from metaopt.policy import MethodConfig, build_method

from .commands import command

footprint = command("adapt/footprint.py")


def test_less_is_held_for_a_gradient_that_is_nearly_the_same() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = load_source_model("cifar_resnet20"), torch.rand(8, 3, 32, 32)
    tent = build_method(MethodConfig("tent", update="adam", objective={"entropy": 1.0}))
    cases = [
        Case("dense"),
        Case("exact"),
        Case("compact", bits=8),
        Case("compact", bits=2),
        Case("pruned", budget_mib=2.0),
    ]
    dense, exact, fine, coarse, bounded = measure_footprint(model, tent, images, cases, repeats=1)
    assert dense.held_mib > 1.7 * exact.held_mib > 3 * fine.held_mib > 1.5 * 3 * coarse.held_mib
    assert bounded.held_mib <= 2.0 < fine.held_mib * 2
    assert dense.cosine == pytest.approx(1, abs=1e-9) and exact.cosine == pytest.approx(1, abs=1e-6)
    assert fine.cosine > 1 - 1e-3 and 0.5 < coarse.cosine < fine.cosine


def test_the_command_ends_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert footprint(["batch_size=2", "bits=[4]", "repeats=1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "compact" in line or "exact" in line]
    assert ["4 bits" in row for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits=[9]", "bits=9; allowed are"),
        ("method=bn", "method=bn is not one whose step can be measured"),
        ("budgets=[0.001]", "budget"),
        ("repeats=0", "repeats is 0; allowed"),
    ],
)
def test_bad_values_are_refused_in_one_line(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert footprint(["batch_size=2", "bits=[]", "repeats=1", override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error:")
