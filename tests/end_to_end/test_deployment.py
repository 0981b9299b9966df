"""``adapt/online.py`` and ``adapt/benchmark.py``: what they write, and that it is consistent."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from metaopt.data import load_digits
from metaopt.evaluation import read_scalars
from metaopt.online.benchmark import Results

from .commands import TINY_STREAM, command, write_model

online = command("adapt/online.py")
benchmark = command("adapt/benchmark.py")

SUMMARY = [
    *(
        "method",
        "setting",
        "stream",
        "model",
        "seed",
        "batch_size",
        "images",
        "mean_error",
        "mean_ece",
        "pass_errors",
        "held_mib",
    ),
    "state_mib",
    *(
        "cuda_peak_mib",
        "step_ms_p50",
        "step_ms_p99",
        "forward_ms_p50",
        "ratio_to_forward",
        "mean_ratio_to_forward",
        "mean_forwards",
        "updates",
        "guard_events",
        "warnings",
    ),
    "domains",
]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["source", "bn", "tent", "adam", "mgtta", "policy"])
def test_every_method_predicts_and_accounts_for_itself(workspace: Path, method: str) -> None:
    policy = ["--policy", "ckpt.pt"] if method in ("adam", "mgtta", "policy") else []
    assert online([*policy, f"method={method}", *TINY_STREAM, "out=out"]) == 0
    summary, rows = summary_of(workspace / "out"), table(workspace / "out/predictions.csv")
    assert list(summary) == SUMMARY
    events = {"nonfinite": 0, "restored": 0, "anchored": 0, "skewed": 0} if method == "policy" else {"nonfinite": 0}
    assert (summary["method"], summary["images"], summary["guard_events"]) == (method, 40, events)
    assert [domain["name"] for domain in summary["domains"]] == ["fog", "contrast"]
    assert list(rows[0]) == ["index", "domain", "severity", "prediction", "confidence", "label"]
    labels = load_digits().stream.take(20).labels
    assert labels is not None
    for domain in summary["domains"]:
        own = [row for row in rows if row["domain"] == domain["name"]]
        assert sorted(int(row["index"]) for row in own) == list(range(20))
        assert all(int(row["label"]) == labels[int(row["index"])] for row in own)
        assert all(0.1 <= float(row["confidence"]) <= 1 for row in own)
        wrong = sum(row["prediction"] != row["label"] for row in own)
        assert domain["error"] == pytest.approx(100 * wrong / 20, abs=1e-4)
    adapts = method not in ("source", "bn")
    assert summary["updates"] == (6 if adapts else 0)
    assert (summary["held_mib"] > 0) == adapts
    assert [step for step, _ in read_scalars("out", "online/error")] == list(range(1, 7))


def test_a_score_on_shifts_of_meta_training_is_called_unfair(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    known = ["data.corruptions=[fog,gamma,spatter]"]
    assert online(["--policy", "ckpt.pt", *TINY_STREAM, *known, "out=out"]) == 0
    note = "not a fair test of the policy: it was meta-trained or selected on gamma, spatter"
    assert note in capsys.readouterr().out
    assert benchmark(["methods=[policy]", "policy_path=[ckpt.pt]", *TINY_STREAM, *known, "out=bench"]) == 0
    assert f"ckpt.pt: {note}" in capsys.readouterr().out
    assert online(["method=bn", *TINY_STREAM, *known, "out=out"]) == 0
    assert online(["--policy", "ckpt.pt", *TINY_STREAM, "out=out"]) == 0
    assert "fair" not in capsys.readouterr().out


def test_reset_and_continual_part_at_the_second_corruption(workspace: Path) -> None:
    for setting in ("reset", "continual"):
        assert online(["--policy", "ckpt.pt", *TINY_STREAM, f"setting={setting}", f"out={setting}"]) == 0
    first, second = (table(workspace / setting / "predictions.csv") for setting in ("reset", "continual"))
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]


def test_a_stream_of_several_passes_tells_the_error_of_each(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = [*TINY_STREAM, "data.passes=2", "setting=continual", "out=out"]
    assert online(["method=tent", "method.lr=0.01", *twice]) == 0
    errors = summary_of(workspace / "out")["pass_errors"]
    assert f"error of each pass: {errors[0]:.2f} %, {errors[1]:.2f} %" in capsys.readouterr().out
    assert len(table(workspace / "out/predictions.csv")) == 2 * 2 * 20
    bench = ["methods=[tent]", "method.tent.lr=0.01", *TINY_STREAM, "data.passes=2", "settings=[continual]"]
    assert benchmark([*bench, "out=bench"]) == 0
    assert f"{errors[0]:.2f}, {errors[1]:.2f}" in capsys.readouterr().out
    rows = table(workspace / "bench/benchmark.csv")
    assert [row["pass"] for row in rows] == ["1"] * 2 + ["2"] * 2
    assert online(["method=bn", *TINY_STREAM, "data.passes=0"]) == 2


def test_the_same_command_gives_the_same_predictions(workspace: Path) -> None:
    for out in ("one", "two"):
        assert online(["method=tent", "method.lr=0.01", *TINY_STREAM, f"out={out}"]) == 0
    assert (workspace / "one/predictions.csv").read_text() == (workspace / "two/predictions.csv").read_text()


def test_a_policy_runs_on_another_model_where_it_is_told_to(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(workspace / "other.pt", seed=1)
    arguments = ["--policy", "ckpt.pt", *TINY_STREAM, "model.checkpoint=other.pt", "out=out"]
    assert online(arguments) == 2
    assert "transfer=generator" in capsys.readouterr().err
    assert online([*arguments, "transfer=generator"]) == 0
    out = capsys.readouterr().out
    assert "transferred from cifar_resnet20 to cifar_resnet20:" in out and "gradient memory: as learned" in out
    assert summary_of(workspace / "out")["updates"] == 6
    assert benchmark(["methods=[policy]", "policy_path=[ckpt.pt]", *arguments[2:], "transfer=generator"]) == 0
    assert online([*arguments, "transfer=weights"]) == 2
    assert "transfer is 'weights'; allowed are generator" in capsys.readouterr().err


def test_own_images_without_labels(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy.save("images.npy", load_digits().stream.take(20).images.permute(0, 2, 3, 1).numpy())
    arguments = ["data=arrays", "data.images=images.npy", "model.checkpoint=model.pt", "batch_size=8", "out=out"]
    assert online(["--policy", "ckpt.pt", *arguments]) == 0
    summary = summary_of(workspace / "out")
    assert summary["mean_error"] is None and summary["domains"][0]["error"] is None
    assert {row["label"] for row in table(workspace / "out/predictions.csv")} == {""}
    assert "arrays" in capsys.readouterr().out


def test_a_diverged_model_is_not_confident(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.load("model.pt")
    weights["linear.weight"][0] = 3e38  # files with NaN are refused
    torch.save(weights, "model.pt")
    assert online(["method=tent", *TINY_STREAM, "out=out"]) == 0
    assert {row["confidence"] for row in table(workspace / "out/predictions.csv")} == {"0.000000"}
    summary = summary_of(workspace / "out")
    assert (summary["mean_error"], summary["updates"], summary["guard_events"]) == (100.0, 0, {"nonfinite": 6})
    assert "updates: 0, nonfinite 6" in capsys.readouterr().out


def test_benchmark_crosses_methods_rates_policies_settings_and_seeds(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "other.pt").write_bytes((workspace / "ckpt.pt").read_bytes())
    arguments = ["methods=[bn,tent,policy]", "rates=[0.001,0.01]", "policy_path=[ckpt.pt,other.pt]", "seeds=[0,1]"]
    assert benchmark([*arguments, *TINY_STREAM, "batch_size=4", "out=out"]) == 0
    rows = table(workspace / "out/benchmark.csv")
    arms = {(row["method"], row["lr"], row["policy"]) for row in rows}
    assert arms == {
        ("bn", "", ""),
        ("tent", "0.001", ""),
        ("tent", "0.01", ""),
        ("policy", "", "ckpt.pt"),
        ("policy", "", "other.pt"),
    }
    assert len(rows) == 5 * 2 * 2
    one, other = ([row["error"] for row in rows if row["policy"] == name] for name in ("ckpt.pt", "other.pt"))
    assert one == other
    assert all(row["error_after_batch_5"] == row["error"] for row in rows), "20 images are 5 batches of 4"
    out = capsys.readouterr().out
    assert "all 2" in out and "±" in out


def test_benchmark_agrees_with_online(workspace: Path) -> None:
    assert benchmark(["methods=[tent]", "settings=[continual]", *TINY_STREAM, "out=many"]) == 0
    assert online(["method=tent", "setting=continual", *TINY_STREAM, "out=one"]) == 0
    errors = [float(row["error"]) for row in table(workspace / "many/benchmark.csv")]
    assert errors == [domain["error"] for domain in summary_of(workspace / "one")["domains"]]


def test_rates_can_be_chosen_on_training_images(workspace: Path) -> None:
    stream = ["data.part=source", "data.corruptions=[saturate]", "data.limit=20", *TINY_STREAM[:2]]
    assert benchmark(["methods=[tent]", "rates=[0.001,0.01]", *stream, "out=out"]) == 0
    rows = table(workspace / "out/benchmark.csv")
    assert [(row["lr"], row["corruption"]) for row in rows] == [("0.001", "saturate"), ("0.01", "saturate")]


def test_a_stopped_benchmark_keeps_its_rows(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = Results.add, 0

    def interrupted(self: Results, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Results, "add", interrupted)
    assert benchmark(["methods=[bn,tent]", *TINY_STREAM, "out=out"]) == 130
    assert {row["method"] for row in table(workspace / "out/benchmark.csv")} == {"bn"}


def test_a_picture_that_cannot_be_drawn_costs_no_benchmark(
    workspace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (workspace / "out/error_against_held.png").mkdir(parents=True)
    assert benchmark(["methods=[tent]", "budgets=[1]", *TINY_STREAM, "out=out"]) == 0
    assert "cannot write 'out/error_against_held.png'" in caplog.text
    assert len(table(workspace / "out/benchmark.csv")) == 2


def test_the_compute_dial_goes_from_forward_passes_to_all_updates(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["method=tent", "setting=continual", "model.checkpoint=model.pt", "batch_size=4", "data.limit=40"]
    updates, spent = [], []
    for setting in ("budget_mib=0", "compute=1.3", "compute=9"):
        assert online([*given, "data.corruptions=[fog]", setting, "out=out"]) == 0
        found = summary_of(workspace / "out")
        updates.append(found["updates"])
        spent.append(found["mean_forwards"])
        assert (found["held_mib"] == 0) == (setting == "budget_mib=0")
    assert updates[0] == 0 < updates[1] < updates[2] == 10 and spent[0] == 1 and spent[2] == 2
    assert spent[1] == 1 + updates[1] / 10 <= 1.6
    assert "forward passes a batch, counted: 2.00 of compute=9" in capsys.readouterr().out


def test_a_benchmark_has_a_row_for_each_turn_of_the_dial(workspace: Path) -> None:
    given = ["methods=[source,tent]", "compute=[1,2]", "budgets=[0]", *TINY_STREAM, "out=out"]
    assert benchmark(given) == 0
    rows = table(workspace / "out/benchmark.csv")
    assert [(row["method"], row["compute"], row["budget_mib"]) for row in rows[::2]] == [
        ("source", "", ""),
        ("tent", "1.0", "0.0"),
        ("tent", "2.0", "0.0"),
    ]
    assert all(float(row["mean_forwards"]) == 1 and float(row["held_mib"]) == 0 for row in rows)


def test_a_dial_out_of_its_range_is_refused_in_a_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, given in ((online, "compute=0.5"), (benchmark, "compute=[0.5]")):
        assert run([given, "model.checkpoint=model.pt", "out=out"]) == 2
        told = capsys.readouterr().err.strip()
        assert "compute is 0.5; allowed are finite values of at least 1" in told and "\n" not in told
    assert online(["method=bn", "compute=1.5", *TINY_STREAM, "out=out"]) == 2
    assert "compute=1.5 does not go with method 'bn'" in capsys.readouterr().err
