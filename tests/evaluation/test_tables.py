import io

import pytest
import torch

from metaopt.evaluation import ProgressBar, closing_table, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_outside_a_terminal_the_table_is_plain_and_complete(capsys: pytest.CaptureFixture[str]):
    long_name = "gaussian_noise[5]" * 10
    closing_table("Digits [all]", ["domain", "error %", "n"], [[long_name, 12.345, 669], ["mean", None, 1]])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert text.isascii() and "\x1b" not in text
    assert lines[0] == "Digits [all]"
    assert len({len(line) for line in lines[1:]}) == 1  # every line of the box is as wide as the others
    (row,) = [line for line in lines if long_name in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [long_name, "12.35", "669"]
    (mean,) = [line for line in lines if "mean" in line]
    assert mean.strip("|").split("|")[1].endswith("      - ")  # numbers to the right


def test_inside_a_narrow_terminal_the_table_folds_and_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "30")
    screen = Terminal()
    closing_table("Title", ["domain", "error"], [["abcdefghijklmnopqrstuvwxyz" * 2, 1.0]], file=screen)
    letters = [c for c in screen.getvalue() if c in "bfjkquvwxyz"]
    assert "…" not in screen.getvalue() and letters.count("z") == 2 and letters.count("q") == 2


def test_a_table_without_rows_has_its_headings(capsys: pytest.CaptureFixture[str]):
    closing_table("Nothing", ["domain", "error"], [])
    assert "domain" in capsys.readouterr().out


def test_outside_a_terminal_progress_prints_the_first_and_last_line(capsys: pytest.CaptureFixture[str]):
    with progress(50, "Meta-training") as bar:
        for step in range(50):
            bar.update(loss=torch.tensor(1.0 / (step + 1)))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0].startswith("Meta-training 1/50 loss 1.0000 ETA 0:00:")
    assert lines[-1] == "Meta-training 50/50 loss 0.0200"
    assert len(lines) == 2 and captured.out == ""


def test_a_line_appears_every_so_often_with_the_time_left(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("metaopt.evaluation.tables.time.monotonic", lambda: clock[0])
    log = io.StringIO()
    with ProgressBar(100, "Run", completed=40, seconds_between_lines=10.0, file=log) as bar:
        for _ in range(6):
            clock[0] += 6.0
            bar.update()
    assert log.getvalue().splitlines() == [
        "Run 41/100 ETA 0:05:54",  # 59 left at 6 s each: what was done before counts as done, not as fast
        "Run 43/100 ETA 0:05:42",
        "Run 45/100 ETA 0:05:30",
    ]


def test_inside_a_terminal_the_bar_shows_loss_and_count():
    screen = Terminal()
    with ProgressBar(3, "Run [x]", file=screen) as bar:
        bar.update(loss=0.5)
        bar.update(advance=2)
    text = screen.getvalue()
    assert "loss 0.5000" in text and "3/3" in text and "Run [x]" in text


@pytest.mark.parametrize("screen", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_quiet_shows_nothing(screen: io.StringIO):
    with ProgressBar(3, "Run", quiet=True, file=screen) as bar:
        for _ in range(3):
            bar.update(loss=1.0)
    assert screen.getvalue() == ""


def test_progress_passes_its_options_on(capsys: pytest.CaptureFixture[str]):
    with progress(3, "Run", quiet=True) as quiet, progress(3, "Run", completed=2) as bar:
        quiet.update()
        bar.update()
    assert capsys.readouterr().err == "Run 3/3\n"


class Closed(io.StringIO):
    """A screen that can be closed under its user."""

    open = True

    def write(self, text: str) -> int:
        if not self.open:
            raise OSError(5, "Input/output error")
        return super().write(text)


class ClosedTerminal(Closed, Terminal):
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of rich's thread that draws
@pytest.mark.parametrize("kind", [Closed, ClosedTerminal])
def test_a_screen_that_is_gone_stops_no_work(kind: type[Closed]):
    screen = kind()
    with ProgressBar(3, "Run", seconds_between_lines=0.0, file=screen) as bar:
        screen.open = False
        for _ in range(3):
            bar.update()
    assert bar.completed == 3
