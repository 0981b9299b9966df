"""``pretrain/meta_train.py``: what it leaves, and that a stopped run goes on as if it had not been stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from metaopt.cli.meta_train import RUNS, run_folder
from metaopt.evaluation import read_scalars
from metaopt.files import safe_load
from metaopt.meta import MetaTrainer
from metaopt.meta.report import AFTER, BEFORE, UNADAPTED
from metaopt.policy import AdaptationPolicy

from .commands import ROOT, TINY_META, command

meta_train = command("pretrain/meta_train.py")


def assert_same(left: Any, right: Any) -> None:
    """Bit-equal trees of tensors and primitives."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def assert_same_policy(left: AdaptationPolicy, right: AdaptationPolicy) -> None:
    assert_same(dict(left.state_dict()), dict(right.state_dict()))
    assert left.training == right.training


def test_a_run_leaves_a_small_policy_a_summary_and_curves(workspace: Path) -> None:
    assert (workspace / "ckpt.pt").stat().st_size < 2**20
    policy = AdaptationPolicy.load("ckpt.pt")
    assert policy.source is not None and policy.source.spec.name == "cifar_resnet20"
    summary = json.loads((workspace / "run/summary.json").read_text())
    assert summary["config"] == json.loads(json.dumps(policy.training["config"])) and summary["epochs"] == 2
    assert summary["config"]["flip"] is False, "a mirrored digit is another digit"
    report = summary["report"]
    assert (report["tasks"], report["steps"]) == (2, 2)
    assert set(report["meta_loss"]) == {UNADAPTED, BEFORE, AFTER, "Adam at 0.01"}
    drop = report["drop"][AFTER]
    assert drop["mean"] == pytest.approx(report["meta_loss"][AFTER] - report["meta_loss"][BEFORE], abs=1e-6)
    assert drop["low"] < drop["mean"] < drop["high"]
    assert [step for step, _ in read_scalars("run", "meta/loss")] == [1, 2, 3, 4]
    assert read_scalars("run", "meta/report/drop") == [(4, pytest.approx(drop["mean"], abs=1e-6))]


def test_the_run_keeps_its_own_copy_of_the_policy(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_policy(AdaptationPolicy.load("run/ckpt.pt"), AdaptationPolicy.load("ckpt.pt"))
    first = Path("run/ckpt.pt").read_bytes()
    assert meta_train([*TINY_META, "seed=1", "out=other", "stop_after=1", "meta.report_tasks=0"]) == 0
    assert "other/ckpt.pt holds epoch" in capsys.readouterr().out
    assert Path("run/ckpt.pt").read_bytes() == first
    assert_same_policy(AdaptationPolicy.load("other/ckpt.pt"), AdaptationPolicy.load("ckpt.pt"))


def test_runs_that_start_in_one_second_share_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(6) as threads:
        folders = list(threads.map(run_folder, [None] * 12))
    assert len(set(folders)) == 12 and all(folder.is_dir() for folder in folders)
    assert {folder.parent for folder in folders} == {RUNS}
    assert run_folder("asked") == run_folder("asked") == Path("asked")


def test_nothing_is_written_elsewhere(workspace: Path) -> None:
    assert {path.name for path in workspace.iterdir()} == {"model.pt", "ckpt.pt", "run"}
    # TensorBoard's names go on with the time, the host, the process and the number of its file in that process.
    names = {path.name.partition(".tfevents")[0] for path in (workspace / "run").iterdir()}
    assert names == {"ckpt.pt", "last.pt", "summary.json", "events.out"}
    assert len(list((workspace / "run").iterdir())) == 4


def test_stopped_and_resumed_equals_uninterrupted(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = AdaptationPolicy.load("ckpt.pt")
    assert meta_train([*TINY_META, "out=parts", "stop_after=1", "meta.report_tasks=0"]) == 0
    assert AdaptationPolicy.load("ckpt.pt").training["epochs"] == 1
    out = capsys.readouterr().out
    assert "1 epochs are left" in out and "resume=parts/last.pt" in out and "stop_after" not in out
    assert meta_train([*TINY_META, "resume=parts/last.pt"]) == 0
    assert_same_policy(AdaptationPolicy.load("ckpt.pt"), whole)
    assert_same(safe_load("parts/last.pt"), safe_load("run/last.pt"))
    for tag in ("meta/loss", "meta/grad_norm", "meta/selection_loss"):
        assert read_scalars("parts", tag) == read_scalars("run", tag), tag


def test_interrupt_in_the_middle_of_an_unroll_loses_that_unroll_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = AdaptationPolicy.load("ckpt.pt")
    earlier = (workspace / "ckpt.pt").read_bytes()
    update, calls = MetaTrainer._update, 0

    def interrupted(self: MetaTrainer, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt  # after the task was drawn, in the middle of the first epoch
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "_update", interrupted)
        assert meta_train([*TINY_META, "out=parts"]) == 130
    assert (workspace / "ckpt.pt").read_bytes() == earlier
    err = capsys.readouterr().err
    assert "saved parts/last.pt; go on with: python pretrain/meta_train.py" in err and "Traceback" not in err
    saved = safe_load("parts/last.pt")["trainer"]["progress"]
    assert (saved["epoch"], saved["unroll"], saved["updates"]) == (0, 1, 1)
    assert meta_train([*TINY_META, "resume=parts/last.pt"]) == 0
    assert_same_policy(AdaptationPolicy.load("ckpt.pt"), whole)


def test_ctrl_c_saves_and_says_how_to_resume(workspace: Path) -> None:
    arguments = [*TINY_META, "meta.epochs=1000", "out=a run"]
    script = str(ROOT / "pretrain/meta_train.py")
    # A test that itself runs in the background hands down an ignored SIGINT.
    start = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv = [{script!r}, *sys.argv[1:]]; runpy.run_path({script!r}, run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},  # this checkout, whatever is installed
    )
    try:
        # After an epoch all that is imported on the way has been: an interrupt while a library in C loads may be lost.
        wait_for(lambda: (workspace / "a run/last.pt").exists() or process.poll() is not None)
        err = interrupted(process)
        assert process.returncode == 130, err
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in err
    assert f"python pretrain/meta_train.py {' '.join(arguments[:-1])} 'out=a run' 'resume=a run/last.pt'" in err
    assert safe_load("a run/last.pt")["trainer"]["progress"]["updates"] >= 2  # the epoch that it was waited for


def wait_for(happened: Callable[[], bool], seconds: float = 300.0) -> None:
    """However busy the machine is, within reason."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def interrupted(process: subprocess.Popen[str]) -> str:
    """What the process says on stderr until Ctrl-C ends it; another one, where the first was lost in a finalizer."""
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=100)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("Ctrl-C does not end it")


@pytest.mark.parametrize("setting", ["generator=step_sizes", "generator=published", "meta.loss=unsupervised"])
def test_variants_run(workspace: Path, setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert meta_train([*TINY_META, "meta.epochs=1", "meta.unrolls=1", setting, "out=other"]) == 0
    config = AdaptationPolicy.load("ckpt.pt").training["config"]
    found = config["loss"] if setting.startswith("meta.loss") else config["generator"]["variant"]
    assert found == setting.partition("=")[2]
    out = capsys.readouterr().out
    assert "Adam at 0.01" in out
    assert out.splitlines()[-1] == "Next: python adapt/online.py --policy ckpt.pt model.checkpoint=model.pt"


def test_own_images_and_a_choice_of_them(workspace: Path) -> None:
    import numpy

    from metaopt.data import load_digits

    numpy.save("clean.npy", load_digits().unlabeled.images.permute(0, 2, 3, 1).numpy())
    few = [*TINY_META, "meta.epochs=1", "meta.unrolls=1", "meta.report_tasks=0", "out=own"]
    assert meta_train([*few, "data=arrays", "source.images=clean.npy"]) == 0
    summary = json.loads((workspace / "own/summary.json").read_text())
    assert "report" not in summary and summary["config"]["flip"] is True


def test_the_gate_recipe_learns_a_gate_on_top_of_a_policy_that_stays(workspace: Path) -> None:
    (workspace / "ckpt.pt").rename("start.pt")
    assert meta_train([*TINY_META, "recipe=gate", "start=start.pt", "meta.report_tasks=0", "out=gate"]) == 0
    start, policy = AdaptationPolicy.load("start.pt").state_dict(), AdaptationPolicy.load("ckpt.pt").state_dict()
    assert sorted(set(policy) - set(start)) == ["parts.update_gate.bias", "parts.update_gate.weights"]
    assert_same({name: policy[name] for name in start}, dict(start))
