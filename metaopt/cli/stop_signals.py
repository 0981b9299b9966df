"""Signals that ask a command to stop: the first lets it finish what it has in hand, a second ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, what systems send before they kill, and a terminal that is closed, which Windows does not tell.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StoppedBySignal(KeyboardInterrupt):
    """A command ends because of a signal.

    Args:
        number: of the signal.
        message: the line that is printed.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def stop_signals(ask: Callable[[], None]) -> Iterator[list[int]]:
    """Inside it, the first signal calls ``ask``, and a second raises `StoppedBySignal`; gives the signals met so far.

    A signal that was ignored, as under nohup, stays ignored. Only the main thread may handle signals: in any other,
    nothing is changed.
    """
    met: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        met.append(number)
        if len(met) > 1:
            raise StoppedBySignal(number, "interrupted")
        ask()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    # None: handled by something that is not Python.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield met
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
