"""``adapt/online.py`` killed outright, inside any write and at random moments: the run goes on byte for byte."""

import builtins
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaopt import files
from metaopt.files import safe_load
from metaopt.online import predictions

from .commands import ROOT, TINY_STREAM, command
from .streams import same_runs

online = command("adapt/online.py")

STREAM = ["--policy", "ckpt.pt", *TINY_STREAM, "snapshot_every=2"]  # saved after batches 1, 2, 4 and 6


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(call: Callable[..., Any], at: int, after: bool) -> Callable[..., Any]:
    """The function, which kills this process at its call number ``at``, before it does anything or when it has."""
    count = 0

    def killer(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and not after:
            die()
        found = call(*arguments, **options)
        if count == at:
            die()
        return found

    return killer


def half_written(kind: type[Any], at: int) -> type[Any]:
    """A kind of file that takes half of the write number ``at``, and then kills this process."""
    count = 0

    class HalfWritten(kind):
        def write(self, content: Any) -> int:
            nonlocal count
            count += 1
            if count == at:
                super().write(content[: len(content) // 2])
                self.flush()
                die()
            return super().write(content)

    return HalfWritten


def answers_cut(at: int) -> None:
    predictions.io = type("io", (), {"FileIO": half_written(io.FileIO, at), "StringIO": io.StringIO})  # type: ignore


def snapshot_cut(at: int) -> None:
    kind, count = half_written(io.FileIO, 1), 0

    def opened(path: Any, mode: str) -> Any:
        nonlocal count
        count += mode == "xb"
        return kind(path, "x") if count == at else builtins.open(path, mode)

    files.open = opened  # type: ignore[attr-defined]


def patched(name: str, after: bool = False) -> Callable[[int], None]:
    return lambda at: setattr(os, name, dying(getattr(os, name), at, after))


PLACES: dict[str, tuple[Callable[[int], None], tuple[int, ...]]] = {
    "in the answers": (answers_cut, (2, 3, 6)),  # batches; in the first, there is nothing to go on from
    "before answers or state reach the disk": (patched("fsync"), (4, 5, 6, 7, 9)),  # three for each snapshot
    "after answers or state reached the disk": (patched("fsync", after=True), (3, 4, 5, 6, 8)),
    "in the state": (snapshot_cut, (2, 3, 4)),
    "before the new state is in place": (patched("replace"), (2, 3, 4)),
    "after the new state is in place": (patched("replace", after=True), (1, 2, 4, 5)),  # 5: memory.csv
    "before the summary": (patched("replace"), (5, 6)),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("place", "at"), [(place, at) for place, (_, counts) in PLACES.items() for at in counts])
def test_killed_inside_a_write_nothing_is_lost(workspace: Path, place: str, at: int) -> None:
    child = os.fork()
    if child == 0:
        PLACES[place][0](at)
        online([*STREAM, "out=parts"])
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it came to its end"
    assert online([*STREAM, "out=whole"]) == 0
    assert online(["resume=parts"]) == 0
    assert same_runs(workspace / "parts", workspace / "whole")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_before_anything_was_answered_nothing_is_there_to_go_on_with(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = os.fork()
    if child == 0:
        answers_cut(1)
        online([*STREAM, "out=parts"])
        os._exit(1)
    os.waitpid(child, 0)
    assert online(["resume=parts"]) == 2
    assert "no 'parts/snapshot.pt' to go on from" in capsys.readouterr().err
    assert online([*STREAM, "out=parts"]) == 0


MOMENTS = 25
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONG = ["--policy", "ckpt.pt", "model.checkpoint=model.pt", "batch_size=4", "data.limit=160", "snapshot_every=3"]


def started(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    script = str(ROOT / "adapt/online.py")
    # A test that itself runs in the background hands down an ignored SIGINT.
    start = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv = [{script!r}, *sys.argv[1:]]; runpy.run_path({script!r}, run_name='__main__')"
    )
    with log.open("ab") as err:
        return subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},  # this checkout, whatever is installed
        )


@pytest.mark.slow
def test_killed_at_random_moments_the_answers_are_those_of_an_undisturbed_run(workspace: Path) -> None:
    began = time.monotonic()
    assert online([*LONG, "out=whole"]) == 0
    longest = (time.monotonic() - began) / MOMENTS  # so that they come to about half of the stream
    whole, answers = (workspace / "whole/predictions.csv").read_bytes(), workspace / "parts/predictions.csv"
    choose, ends, arguments = random.Random(0), [], [*LONG, "out=parts"]
    while len(ends) < MOMENTS:
        number = choose.choice(SIGNALS)
        size = answers.stat().st_size if answers.exists() else 0
        process = started(arguments, workspace / "log")
        while process.poll() is None and (not answers.exists() or answers.stat().st_size == size):
            time.sleep(0.001)  # until the first answer, or, beyond a snapshot, the rows that are cut off
        time.sleep(choose.uniform(0.0, longest))
        process.send_signal(number)
        code = process.wait(timeout=60)
        ends.append(code)
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], (
            workspace / "log"
        ).read_text()
        saved = safe_load(workspace / "parts/snapshot.pt", checksums=True)
        assert whole.startswith(answers.read_bytes()[: saved["predictions"]["bytes"]])
        arguments = ["resume=parts"]
    steps = saved["run"]["steps"]
    assert 0 < steps < 600, "they were killed while they worked"
    assert online(arguments) == 0
    assert same_runs(workspace / "parts", workspace / "whole")
    assert "Traceback" not in (workspace / "log").read_text()
    print(f"{len(ends)} ends: {ends}, the last after {steps} batches")
