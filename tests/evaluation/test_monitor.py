import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from metaopt.errors import DataError, OutputError
from metaopt.evaluation import Monitor, curve_figure, read_scalars
from metaopt.evaluation.monitor import LAYOUT

from ..full_disk import file_size_limit


def test_scalars_come_back(tmp_path: Path):
    with Monitor(tmp_path / "runs") as monitor:
        monitor.scalar("meta/loss", 2.5, 0)
        monitor.scalar("meta/loss", torch.tensor([1.25]), 1)
        monitor.scalar("online/error", 40, 7)
    assert read_scalars(tmp_path / "runs", "meta/loss") == [(0, 2.5), (1, 1.25)]
    assert read_scalars(tmp_path / "runs", "online/error") == [(7, 40.0)]


def test_every_point_of_a_long_curve_comes_back(tmp_path: Path):
    with Monitor(tmp_path) as monitor:
        for step in range(12_000):  # TensorBoard's reader keeps a sample of 10,000 unless told otherwise
            monitor.scalar("online/step_ms", step, step)
    assert read_scalars(tmp_path, "online/step_ms") == [(step, float(step)) for step in range(12_000)]


def test_flushed_scalars_can_be_read_while_the_run_goes_on(tmp_path: Path):
    with Monitor(tmp_path) as monitor:
        monitor.scalar("meta/loss", 1.0, 0)
        monitor.flush()
        assert read_scalars(tmp_path, "meta/loss") == [(0, 1.0)]


def test_a_resumed_run_replaces_the_steps_it_writes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with Monitor(tmp_path) as monitor:
        for step in range(5):
            monitor.scalar("meta/loss", 1.0, step)
    with Monitor(tmp_path, resume_step=3) as monitor:
        for step in range(3, 6):
            monitor.scalar("meta/loss", 2.0, step)
    expected = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert read_scalars(tmp_path, "meta/loss") == expected
    assert caplog.records == []


def test_a_new_run_in_an_old_folder_starts_its_curves_anew(tmp_path: Path):
    for value in (1.0, 2.0):
        with Monitor(tmp_path) as monitor:
            monitor.scalar("meta/loss", value, 0)
    assert read_scalars(tmp_path, "meta/loss") == [(0, 2.0)]


def test_a_missing_curve_is_refused_with_the_names_of_the_others(tmp_path: Path):
    with Monitor(tmp_path) as monitor:
        monitor.scalar("meta/loss", 1.0, 0)
    with pytest.raises(DataError, match=r"no curve 'meta/los' .* meta/loss"):
        read_scalars(tmp_path, "meta/los")


def test_the_custom_scalars_tab_groups_the_tags(tmp_path: Path):
    Monitor(tmp_path).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()  # pyright: ignore[reportAttributeAccessIssue]
    layout.ParseFromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT) == ["Meta", "Policy", "Online"]
    patterns = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert {"meta/loss.*", "policy/keep_ratio/.*", "online/error", "online/guard/.*"} <= patterns


def test_a_figure_is_written_as_an_image(tmp_path: Path):
    with Monitor(tmp_path) as monitor:
        monitor.figure("meta/loss_over_unroll", curve_figure([3.0, 2.0, 1.5], "Meta-loss", "step", "loss"), 4)
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("meta/loss_over_unroll")
    assert (image.step, image.width, image.height) == (4, 600, 400)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_curve_figure_draws_the_values_without_pyplot():
    figure = curve_figure([3.0, 2.0], "Meta-loss", "position", "loss")
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_xydata() == pytest.approx(numpy.array([[1, 3.0], [2, 2.0]]))
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Meta-loss", "position", "loss")


def test_no_folder_means_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with Monitor(None) as monitor:
        monitor.scalar("meta/loss", 1.0, 0)
        monitor.figure("meta/figure", curve_figure([1.0], "", "", ""), 0)
        monitor.flush()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_and_writing_after_closing_do_nothing(tmp_path: Path):
    monitor = Monitor(tmp_path)
    monitor.scalar("meta/loss", 1.0, 0)
    monitor.close()
    monitor.scalar("meta/loss", 9.0, 1)
    monitor.close()
    assert read_scalars(tmp_path, "meta/loss") == [(0, 1.0)]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(OutputError):
        Monitor(tmp_path / "runs")


@pytest.mark.slow
def test_a_monitor_makes_no_noise(tmp_path: Path):
    code = (
        "import sys; from metaopt.evaluation import Monitor, curve_figure, read_scalars\n"
        "for start in (0, 1):\n"
        "    with Monitor(sys.argv[1], resume_step=start) as m:\n"
        "        m.scalar('a', 1.0, start); m.figure('f', curve_figure([1.0], 't', 'x', 'y'), 0)\n"
        "assert len(read_scalars(sys.argv[1], 'a')) == 2\n"
        "from matplotlib import pyplot; assert pyplot.get_fignums() == []\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("trouble", ["full", "gone"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "at the end"])
def test_curves_that_cannot_be_written_stop_nothing_and_are_told_once(
    tmp_path: Path, trouble: str, late: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    with Monitor(folder) as monitor:
        monitor.flush()
        if trouble == "gone":
            shutil.rmtree(folder)
        with file_size_limit(1024 if trouble == "full" else None):
            for step in range(1 if late else 60):
                monitor.scalar("a", 1.0, step)
                monitor.figure("f", curve_figure([1.0], "t", "x", "y"), step) if step == 0 else None
                None if late else monitor.flush()
            monitor.close()
    assert len(caplog.records) == 1
    assert f"cannot write curves in '{folder}' (" in caplog.text and "the run goes on without them" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_whose_curves_cannot_even_be_begun_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file_size_limit(0), Monitor(tmp_path) as monitor:
        monitor.scalar("a", 1.0, 0)
    assert len(caplog.records) == 1 and "cannot write curves" in caplog.text
