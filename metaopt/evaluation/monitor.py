"""TensorBoard: scalars and figures out, scalars back in."""

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from metaopt.errors import DataError
from metaopt.files import ensure_writable_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# Chart groups of TensorBoard's "Custom scalars" tab: group -> chart -> patterns of the tags it draws.
_CHARTS = {
    "Meta": {
        "loss": [r"meta/loss.*"],
        "gradient norm": [r"meta/grad_norm"],
        "selection loss": [r"meta/selection_loss"],
        "unroll steps, skipped updates": [r"meta/steps", r"meta/skipped"],
        "bytes over budget": [r"meta/bytes_over_budget"],
    },
    "Policy": {
        "keep ratio": [r"policy/keep_ratio/.*"],
        "bits kept": [r"policy/bits/.*"],
        "expert usage": [r"policy/expert_usage/.*"],
    },
    "Online": {
        "error": [r"online/error"],
        "entropy": [r"online/entropy"],
        "activation MiB": [r"online/activation_mib"],
        "step ms": [r"online/step_ms"],
        "guard": [r"online/guard/.*"],
    },
}
LAYOUT = {group: {chart: ["Multiline", tags] for chart, tags in charts.items()} for group, charts in _CHARTS.items()}

_EVENT_PREFIX = "events.out.tfevents."

_LOG = logging.getLogger(__name__)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """TensorBoard imports TensorFlow where that is installed, and both greet with logs and deprecation warnings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet_reading() -> Iterator[None]:
    """TensorBoard warns of every purge, and one is asked for at each start of a run."""
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mute_writer_threads() -> None:
    """TensorBoard writes in a thread, whose errors Python would print; the caller of the writer is told of them too."""
    report = threading.excepthook
    if getattr(report, "mutes_tensorboard", False):
        return

    def excepthook(arguments: threading.ExceptHookArgs, /) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            report(arguments)

    excepthook.mutes_tensorboard = True  # pyright: ignore[reportFunctionMemberAccess]
    threading.excepthook = excepthook


def _wait_for_later_file_name(folder: Path) -> None:
    """Event files are read in the order of their names, which begin with the second they were made in."""
    made = (path.name.removeprefix(_EVENT_PREFIX).split(".")[0] for path in folder.glob(f"{_EVENT_PREFIX}*"))
    if str(int(time.time())) in made:
        time.sleep(1.0 - math.modf(time.time())[0])


class Monitor:
    """Writes a run's curves where TensorBoard finds them; with no folder it takes everything and does nothing.

    What cannot be written, on a full disk or in a folder that is gone, never stops the run: the log says so once, and
    the run goes on without curves.

    Args:
        folder: of the event files, made when missing; None for a monitor that writes nothing.
        resume_step: the first step that will be written. What the folder holds from that step on is dropped from the
            curves: everything for a new run in an old folder (0), only the lost steps for a run that goes on.

    Raises:
        OutputError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path | None, *, resume_step: int = 0) -> None:
        self.folder = None if folder is None else ensure_writable_folder(Path(folder))
        self._writer: SummaryWriter | None = None
        if self.folder is not None:
            _wait_for_later_file_name(self.folder)
            _mute_writer_threads()
            with _quiet_import():
                # What draws, too: an interrupt while a library in C loads can end the process without being told of.
                import matplotlib.backends.backend_agg  # noqa: F401
                from torch.utils import tensorboard

            with self._writing(), _quiet_import():
                self._writer = tensorboard.SummaryWriter(str(self.folder), purge_step=resume_step, flush_secs=10)
            self._write(lambda writer: writer.add_custom_scalars(LAYOUT))

    def scalar(self, tag: str, value: Any, step: int) -> None:
        """One point of a curve; ``value`` is a number or a tensor of one element."""
        if self._writer is not None:
            number = float(value)
            self._write(lambda writer: writer.add_scalar(tag, number, step))

    def text(self, tag: str, text: str, step: int) -> None:
        """A line of text."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """A matplotlib figure, drawn as an image."""
        if self._writer is None:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]  # (H, W, 3), uint8
        self._write(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def flush(self) -> None:
        """Bring what was written so far to the disk."""
        self._write(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close; what comes afterwards is ignored."""
        self._write(lambda writer: writer.close())
        self._writer = None

    def _write(self, act: "Callable[[SummaryWriter], None]") -> None:
        """Let the writer act, if there is still one."""
        if self._writer is not None:
            with self._writing():
                act(self._writer)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside it, an error of the writer ends the curves and not the run."""
        try:
            yield
        except Exception as error:  # where TensorFlow is installed, its file errors are no OSErrors
            self._writer = None
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            _LOG.warning("cannot write curves in '%s' (%s); the run goes on without them", self.folder, reason)

    def __enter__(self) -> "Monitor":
        """The monitor itself."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close, also after an error."""
        self.close()


def read_scalars(folder: str | Path, tag: str) -> list[tuple[int, float]]:
    """A curve back from the event files of a folder, as (step, value) in the order of writing.

    Raises:
        DataError: the folder holds no such curve.
    """
    with _quiet_import():
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    with _quiet_reading():
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0 keeps every point
    tags = events.Tags()[SCALARS]
    if tag not in tags:
        raise DataError(
            f"no curve {tag!r} in {folder}: it holds {', '.join(sorted(tags)) or 'none'}; name one of those"
        )
    return [(event.step, event.value) for event in events.Scalars(tag)]


def curve_figure(values: Sequence[float], title: str, xlabel: str, ylabel: str) -> "Figure":
    """A line through ``values`` at positions 1, 2, ..."""
    return curves_figure({"": [(place, float(value)) for place, value in enumerate(values, 1)]}, title, xlabel, ylabel)


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, xlabel: str, ylabel: str
) -> "Figure":
    """A line for each name through its points (x, y), which are sorted first; pyplot's global state stays untouched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if any(curves):
        axes.legend()
    return figure
