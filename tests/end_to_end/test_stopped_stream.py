"""``adapt/online.py`` stopped and gone on with: no answer is lost or given twice, whatever ended the process."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.cli.run_folder import RunFolder
from metaopt.evaluation import read_scalars
from metaopt.files import safe_load

from ..full_disk import file_size_limit
from .commands import TINY_STREAM, command
from .streams import FILES, same_runs

online = command("adapt/online.py")

STREAM = ["--policy", "ckpt.pt", *TINY_STREAM]  # two corruptions of three batches
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sends this process a signal, or an error, after so many batches of the next run."""
    answer = RunFolder.answer

    def plan(batches: int, number: int, times: int = 1) -> None:
        left = [batches]

        def answered(self: RunFolder, *arguments: Any) -> None:
            answer(self, *arguments)
            left[0] -= 1
            if left[0] == 0:
                for _ in range(times):
                    signal.raise_signal(number)

        monkeypatch.setattr(RunFolder, "answer", answered)

    before = {number: signal.getsignal(number) for number in CODES}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
    yield plan
    assert {number: signal.getsignal(number) for number in CODES} | {signal.SIGINT: before[signal.SIGINT]} == before
    signal.signal(signal.SIGINT, before[signal.SIGINT])


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("setting", ["reset", "continual"])
def test_a_signal_stops_after_the_batch_and_resume_goes_on(
    workspace: Path, number: int, setting: str, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*STREAM, f"setting={setting}"]
    assert online([*arguments, "out=whole"]) == 0
    for batches, where in ((2, "out=parts"), (2, "resume=parts")):
        stop_after(batches, number)
        capsys.readouterr()
        assert (
            online([*(arguments if batches and where.startswith("out") else []), where])
            == CODES[signal.Signals(number)]
        )
        err = capsys.readouterr().err.splitlines()
        done = 2 if where.startswith("out") else 4
        assert err[-1] == f"stopped after {done} of 6 batches; go on with: python adapt/online.py resume=parts"
        assert not any("Traceback" in line for line in err)
        assert len((workspace / "parts/predictions.csv").read_text().splitlines()) == 1 + (16 if done == 2 else 28)
        assert not (workspace / "parts/summary.json").exists()
    stop_after(100, number)
    assert online(["resume=parts"]) == 0
    assert same_runs(workspace / "parts", workspace / "whole")
    assert read_scalars("parts", "online/error") == read_scalars("whole", "online/error")
    assert online(["resume=parts/snapshot.pt"]) == 0, "nothing is left to do, and nothing changes"
    assert same_runs(workspace / "parts", workspace / "whole")


def test_a_second_signal_ends_at_once(workspace: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert online([*STREAM, "out=whole"]) == 0
    stop_after(3, signal.SIGTERM, times=2)
    assert online([*STREAM, "out=parts", "snapshot_every=2"]) == 143
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert safe_load("parts/snapshot.pt")["run"]["steps"] == 2
    stop_after(100, signal.SIGTERM)
    assert online(["resume=parts"]) == 0
    assert same_runs(workspace / "parts", workspace / "whole")


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one(workspace: Path, stop_after: Any) -> None:
    assert online(["method=tent", *TINY_STREAM, "out=out"]) == 0
    earlier = {path.name: path.read_bytes() for path in (workspace / "out").iterdir() if path.name in FILES}
    assert online([*STREAM, "budget_mib=0.0001", "out=out"]) == 2
    assert earlier == {name: (workspace / "out" / name).read_bytes() for name in FILES}, "it answered no batch"
    stop_after(1, signal.SIGTERM)
    assert online([*STREAM, "snapshot_every=0", "out=out"]) == 143
    assert {path.name for path in (workspace / "out").iterdir() if path.name in FILES} == {
        "predictions.csv",
        "snapshot.pt",
    }
    assert len((workspace / "out/predictions.csv").read_text().splitlines()) == 9


def test_resume_takes_the_settings_of_the_run_and_refuses_others(
    workspace: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert online([*STREAM, "method.parts.class_balance=false", "out=whole"]) == 0
    stop_after(2, signal.SIGTERM)
    arguments = [*STREAM, "method.parts.class_balance=false"]
    assert online([*arguments, "out=parts", "snapshot_every=3"]) == 143
    earlier = {path.name: path.read_bytes() for path in (workspace / "parts").iterdir()}
    refused = {
        "batch_size=4": "batch_size would be another; allowed is what the run had (batch_size=8)",
        "seed=1": "seed",
        "method=tent": "method",
        "data=arrays": "data",
        "--policy=other.pt": "policy_path",
        "setting=continual": "setting=reset",
        "out=elsewhere": "out=elsewhere does not go with resume=parts",
        "sede=1": "sede is an unknown setting",
    }
    for argument, message in refused.items():
        capsys.readouterr()
        assert online([argument, "resume=parts"]) == 2, argument
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    assert earlier == {path.name: path.read_bytes() for path in (workspace / "parts").iterdir()}
    policy = (workspace / "ckpt.pt").read_bytes()
    (workspace / "ckpt.pt").write_bytes((workspace / "model.pt").read_bytes())
    assert online(["resume=parts"]) == 2
    torch.save(torch.load("model.pt"), workspace / "ckpt.pt")
    assert online(["resume=parts"]) == 2
    (workspace / "ckpt.pt").write_bytes(policy)
    stop_after(100, signal.SIGTERM)
    assert online([*arguments, "resume=parts", "snapshot_every=1", "out=parts"]) == 0, "they may be repeated"
    assert same_runs(workspace / "parts", workspace / "whole")


def spoiled(name: str, folder: Path) -> None:
    path = folder / "snapshot.pt"
    content, values = path.read_bytes(), safe_load(path)
    if name == "missing":
        path.unlink()
    elif name == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif name == "flipped":
        at = content.index(b"metaopt-stream")  # not in the padding between tensors, which nobody reads
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif name == "policy":
        path.write_bytes(Path("ckpt.pt").read_bytes())
    else:
        torch.save({key: value for key, value in values.items() if key != name}, path)


@pytest.mark.parametrize(
    "name", ["missing", "cut", "flipped", "policy", "arguments", "settings", "predictions", "run", "version"]
)
def test_a_damaged_snapshot_is_refused_in_one_line(
    workspace: Path, name: str, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2, signal.SIGTERM)
    assert online(["method=bn", *TINY_STREAM, "out=parts"]) == 143
    spoiled(name, workspace / "parts")
    before = {path.name: path.read_bytes() for path in (workspace / "parts").iterdir()}
    capsys.readouterr()
    assert online(["resume=parts"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in (workspace / "parts").iterdir()}
    assert online(["resume=nowhere"]) == 2 and not (workspace / "nowhere").exists()


def test_other_answers_are_not_gone_on_with(workspace: Path, stop_after: Any, capsys: Any) -> None:
    stop_after(2, signal.SIGTERM)
    assert online(["method=bn", *TINY_STREAM, "out=parts"]) == 143
    path = workspace / "parts/predictions.csv"
    path.write_text(path.read_text().replace("fog", "fig"))
    capsys.readouterr()
    assert online(["resume=parts"]) == 2
    assert "is not as the run to resume left it" in capsys.readouterr().err


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["method=source", *TINY_STREAM, "data.limit=660", "batch_size=16", "snapshot_every=5"]
    assert online([*arguments, "out=whole"]) == 0
    sizes = {name: (workspace / "whole" / name).stat().st_size for name in ("snapshot.pt", "predictions.csv")}
    assert sizes["snapshot.pt"] < sizes["predictions.csv"] - 2000, sizes
    with file_size_limit(sizes["predictions.csv"] - 1000):
        capsys.readouterr()
        assert online([*arguments, "out=parts"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: cannot write 'parts/predictions.csv' (")
    assert "go on with resume=parts" in err.splitlines()[-1]
    assert online(["resume=parts"]) == 0
    assert same_runs(workspace / "parts", workspace / "whole")


def test_a_state_that_does_not_fit_on_the_disk_is_told_once_and_costs_no_answer(
    workspace: Path, caplog: pytest.LogCaptureFixture, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert online([*STREAM, "out=whole"]) == 0
    with file_size_limit(20_000):
        assert online([*STREAM, "out=parts", "snapshot_every=1"]) == 0
        assert len([record for record in caplog.records if "snapshot.pt" in record.message]) == 1
        stop_after(2, signal.SIGTERM)
        assert online([*STREAM, "out=parts", "snapshot_every=1"]) == 143
    assert "stopped after 2 of 6 batches; its state could not be saved" in capsys.readouterr().err
    stop_after(100, signal.SIGTERM)
    assert online([*STREAM, "out=parts", "snapshot_every=1"]) == 0
    assert same_runs(workspace / "parts", workspace / "whole")
