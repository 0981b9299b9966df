"""Signals that stop a command: who handles them, and that all is put back."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from metaopt.cli.stop_signals import SIGNALS, StoppedBySignal, stop_signals


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Handlers that say so; those of before, afterwards."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_ends(number: int) -> None:
    before, asked = handlers(), list[str]()
    with pytest.raises(StoppedBySignal) as stop, stop_signals(lambda: asked.append("stop")) as met:
        signal.raise_signal(number)
        assert (met, asked) == ([number], ["stop"])
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.value.number, asked, handlers()) == (signal.SIGTERM, ["stop"], before)
    assert isinstance(stop.value, KeyboardInterrupt)


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals(lambda: pytest.fail("asked")) as met:
        signal.raise_signal(signal.SIGINT)
        assert met == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_changes_no_handler() -> None:
    before, seen = handlers(), list[list[object]]()

    def work() -> None:
        with stop_signals(lambda: None):
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_error_inside_puts_the_handlers_back() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), stop_signals(lambda: None):
        assert handlers() != before
        raise ZeroDivisionError
    assert handlers() == before
