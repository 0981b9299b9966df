"""What a run shows in the terminal: a progress bar while it works, a table when it is done."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

Cell = str | int | float | None


def closing_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], file: IO[str] | None = None
) -> None:
    """Print a table: plain, as wide as it needs, outside a terminal; folded to the window inside one.

    Args:
        title: line above the table.
        columns: headings.
        rows: one cell per column; floats get two decimals, None a dash. A column without strings is right-aligned.
        file: where to print; None: standard output.
    """
    from rich.box import ASCII, SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file or sys.stdout, highlight=False)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else ASCII)
    for index, heading in enumerate(columns):
        numeric = not any(isinstance(row[index], str) for row in rows)
        table.add_column(Text(heading), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = ("-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        table.add_row(*map(Text, cells))  # Text, so that [brackets] stay
    if not console.is_terminal:
        unlimited = console.options.update(width=100_000)
        console.width = Measurement.get(console, unlimited, table).maximum
    console.print(Text(title), soft_wrap=True)
    console.print(table)


class ProgressBar:
    """A bar with the latest loss and the time left; outside a terminal, a line every few seconds instead.

    Use it as a context and call :meth:`update` after each piece of work. A terminal that is gone stops nothing.

    Args:
        total: number of pieces.
        description: what is being done.
        quiet: show nothing at all.
        completed: pieces that were done before, for a run that goes on; they do not count in the time left.
        seconds_between_lines: how often a line is printed outside a terminal. The first and last update always get one.
        file: where to show it; standard error when None.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        quiet: bool = False,
        completed: int = 0,
        seconds_between_lines: float = 10.0,
        file: IO[str] | None = None,
    ) -> None:
        self.total, self.description, self.completed = total, description, completed
        self.loss: float | None = None
        self._quiet, self._file, self._started_with = quiet, file or sys.stderr, completed
        self._seconds_between_lines = seconds_between_lines
        self._start = time.monotonic()
        self._last_line: float | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressBar":
        """Show the empty bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=self._file, highlight=False)
        self._start = time.monotonic()
        if console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}", markup=False),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar.add_task(self.description, total=self.total, completed=self.completed, loss="")
            self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None

    def update(self, loss: Any = None, *, advance: int = 1) -> None:
        """Some more work is done.

        Args:
            loss: the latest loss, a number or a tensor of one element; None leaves the one that is shown.
            advance: pieces done since the last call.
        """
        self.completed += advance
        if self._quiet:
            return
        if loss is not None:
            self.loss = float(loss)
        shown = "" if self.loss is None else f" loss {self.loss:.4f}"
        with suppress(OSError):
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self.completed, loss=shown.lstrip())
            else:
                self._print_line_when_due(shown)

    def _print_line_when_due(self, shown: str) -> None:
        now = time.monotonic()
        early = self._last_line is not None and now - self._last_line < self._seconds_between_lines
        if early and self.completed != self.total:
            return
        self._last_line = now
        line = f"{self.description} {self.completed}/{self.total}{shown}"
        done = self.completed - self._started_with
        if done > 0 and self.completed < self.total:
            left = round((now - self._start) / done * (self.total - self.completed))
            line += f" ETA {timedelta(seconds=left)}"
        print(line, file=self._file, flush=True)


progress = ProgressBar
"""``with progress(100, "Meta-training") as bar: ...; bar.update(loss=loss)``."""
