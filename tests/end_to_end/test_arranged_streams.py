"""``stream=NAME`` of ``adapt/online.py`` and ``adapt/benchmark.py``: what they write of arranged streams."""

import csv
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest

from metaopt import registry
from metaopt.cli.run_folder import RunFolder
from metaopt.data import load_digits
from metaopt.evaluation import read_scalars

from .commands import TINY, TINY_STREAM, command
from .streams import same_runs

online = command("adapt/online.py")
benchmark = command("adapt/benchmark.py")

TENT = ["method=tent", "method.lr=0.01", *TINY_STREAM]  # two corruptions, 20 images each, in batches of 8


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name", registry.ARRANGEMENTS)
def test_both_commands_meet_the_same_stream_and_say_so(workspace: Path, name: str) -> None:
    assert online([*TENT, f"stream={name}", "out=one"]) == 0
    assert benchmark(["methods=[source,tent]", "method.tent.lr=0.01", *TINY_STREAM, f"stream={name}", "out=many"]) == 0
    summary, answers = summary_of(workspace / "one"), table(workspace / "one/predictions.csv")
    assert summary["stream"]["name"] == name
    rows = table(workspace / "many/benchmark.csv")
    assert {row["stream"] for row in rows} == {name}
    told = [(row["name"], row["images"], row["error"]) for row in summary["domains"]]
    for method in ("source", "tent"):
        own = [row for row in rows if row["method"] == method]
        assert [(row["corruption"], int(row["images"])) for row in own] == [row[:2] for row in told]
        if method == "tent":
            assert [float(row["error"]) for row in own] == [error for *_, error in told]
    assert summary["images"] == len(answers)
    assert Counter(row["domain"] for row in answers) == sum((Counter({row[0]: row[1]}) for row in told), Counter())
    labels = load_digits().stream.labels
    assert labels is not None
    assert all(int(row["label"]) == int(labels[int(row["index"])]) for row in answers)
    assert read_scalars("one", "online/error")


def test_sorted_images_come_class_by_class(workspace: Path) -> None:
    assert online([*TENT, "stream=sorted", "out=one"]) == 0
    rows = table(workspace / "one/predictions.csv")
    for name in ("fog", "contrast"):
        labels = [row["label"] for row in rows if row["domain"] == name]
        assert len(labels) == 20
        assert sum(a != b for a, b in pairwise(labels)) == len(set(labels)) - 1


def test_the_default_is_shuffled(workspace: Path) -> None:
    for out, more in (("one", []), ("two", ["stream=shuffled"])):
        assert online([*TENT, *more, f"out={out}"]) == 0
    assert (workspace / "one/predictions.csv").read_bytes() == (workspace / "two/predictions.csv").read_bytes()
    assert summary_of(workspace / "one")["stream"] == {"name": "shuffled"}


@pytest.mark.parametrize("told", [["stream=few_classes", "stream.classes=3"], ["stream={name:few_classes,classes:3}"]])
def test_settings_of_a_stream(workspace: Path, told: list[str]) -> None:
    assert online([*TENT, *told, "out=one"]) == 0
    assert summary_of(workspace / "one")["stream"] == {"name": "few_classes", "classes": 3}
    assert len({row["label"] for row in table(workspace / "one/predictions.csv")}) == 3


@pytest.mark.parametrize("name", ["sorted", "mixed", "alternating", "long"])
def test_a_stopped_run_goes_on(workspace: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TENT, f"stream={name}", "setting=continual", "snapshot_every=1"]
    assert online([*arguments, "out=whole"]) == 0
    answer, left = RunFolder.answer, [3]

    def answered(self: RunFolder, *values: Any) -> None:
        answer(self, *values)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "answer", answered)
    assert online([*arguments, "out=parts"]) == 130
    assert online(["resume=parts"]) == 0
    assert same_runs(workspace / "parts", workspace / "whole")


def test_another_stream_does_not_go_on(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert online([*TENT, "stream=few_classes", "out=out"]) == 0
    for told in ("stream=sorted", "stream.classes=3"):
        assert online(["resume=out", told]) == 2
        assert "stream." in capsys.readouterr().err


@pytest.mark.parametrize("run", [online, benchmark])
@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["stream=srted"], "stream is 'srted'; allowed are shuffled, sorted, dirichlet, "),
        (["stream=null"], "stream is None; allowed are shuffled, "),
        (["stream.clases=2"], "stream.clases is an unknown setting; did you mean stream.classes?"),
        (["stream.classes=2"], "stream.classes is a setting of few_classes alone, and stream is shuffled"),
        (["stream=few_classes", "stream.classes=many"], "stream.classes='many' is not allowed"),
        (["stream=few_classes", "stream.classes=30"], "stream.classes is 30; allowed is [1, "),
        (["stream=gradual", "data.corruptions=[]"], "stream=gradual needs several severities"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    workspace: Path, run: Any, told: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["method=bn"] if run is online else ["methods=[bn]"]
    assert run([*more, *TINY_STREAM, "out=refused", *told]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1
    assert not (workspace / "refused").exists()


def test_unlabelled_images_are_refused_or_met(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy.save("images.npy", load_digits().stream.take(20).images.permute(0, 2, 3, 1).numpy())
    arguments = ["method=bn", "data=arrays", "data.images=images.npy", "data.corruptions=[fog,snow]", *TINY]
    assert online([*arguments, "stream=sorted", "out=refused"]) == 2
    assert "stream=sorted arranges images by their labels, and 'fog' has none" in capsys.readouterr().err
    assert online([*arguments, "stream=mixed", "out=met"]) == 0
    rows = table(workspace / "met/predictions.csv")
    assert sorted(int(row["index"]) for row in rows) == list(range(20))
    assert {row["domain"] for row in rows} == {"fog", "snow"} and {row["label"] for row in rows} == {""}


def test_severities_on_disk_rise_and_fall(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = load_digits().stream.take(50).images.permute(0, 2, 3, 1).numpy()
    numpy.save("labels.npy", numpy.arange(10))
    numpy.save("fog.npy", pixels)
    arguments = ["method=bn", "data=cifar_c", "data.root=.", "data.corruptions=[fog]", *TINY, "stream=gradual"]
    assert online([*arguments, "out=met"]) == 0
    rows = table(workspace / "met/predictions.csv")
    assert [row["severity"] for row in rows[::10]] == [*"123454321"]
    numpy.save("fog.npy", pixels[:10])
    assert online([*arguments, "out=refused"]) == 2
    assert "stream=gradual needs several severities, and 'fog' has 5 alone" in capsys.readouterr().err


def test_help_lists_the_streams(capsys: pytest.CaptureFixture[str]) -> None:
    for run in (online, benchmark):
        assert run(["--help"]) == 0
        out = capsys.readouterr().out
        assert "Streams:" in out and all(f"  {name} " in out for name in registry.ARRANGEMENTS)
