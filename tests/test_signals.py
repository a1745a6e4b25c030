"""`lwas_fast.interrupts`: handlers wait inside `whole`, are called at its end, and are back whatever they raise.

Catches: a signal lost, a handler that stays exchanged, one that another replaced meanwhile put back.
"""

from __future__ import annotations

import signal
import threading

import pytest

from lwas_fast.interrupts import _waiting, open_to_interrupts, whole

USR1, USR2 = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))
pytestmark = pytest.mark.skipif(USR1 is None, reason="signals of POSIX")


@pytest.fixture
def came(monkeypatch):
    """Numbers of the signals that handlers were called for."""
    numbers: list[int] = []
    kept = {number: signal.signal(number, lambda n, _: numbers.append(n)) for number in (USR1, USR2)}
    yield numbers
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_signals_wait_and_come_in_their_order(came):
    with whole():
        signal.raise_signal(USR2)
        with whole():  # inside another it does nothing
            signal.raise_signal(USR1)
        assert came == []
    assert came == [USR2, USR1]


def test_signals_come_at_once_where_the_users_code_runs(came):
    with whole():
        signal.raise_signal(USR1)
        with open_to_interrupts():
            assert came == [USR1]
            signal.raise_signal(USR2)
            assert came == [USR1, USR2]
        signal.raise_signal(USR1)
        assert came == [USR1, USR2]
    assert came == [USR1, USR2, USR1]
    with open_to_interrupts():  # outside of any
        signal.raise_signal(USR1)
    assert came[-2:] == [USR1, USR1]


def test_handlers_are_back_whatever_they_raise(came):
    def raising(number, _):
        raise KeyboardInterrupt(number)

    signal.signal(USR1, raising)
    before = [signal.getsignal(number) for number in (signal.SIGINT, USR1, USR2)]
    done = []
    with pytest.raises(KeyboardInterrupt), whole():
        signal.raise_signal(USR1)
        signal.raise_signal(USR2)
        done.append(True)
    assert done and came == [USR2]  # the second is not lost
    assert [signal.getsignal(number) for number in (signal.SIGINT, USR1, USR2)] == before
    assert not _waiting


def test_an_error_inside_passes_and_handlers_are_back(came):
    before = signal.getsignal(USR1)
    with pytest.raises(ZeroDivisionError), whole():
        raise ZeroDivisionError
    assert signal.getsignal(USR1) is before and not _waiting


def test_a_handler_that_was_set_inside_stays(came):
    other = lambda *_: None  # noqa: E731
    with whole():
        signal.signal(USR1, other)
    assert signal.getsignal(USR1) is other


def test_ignored_signals_stay_ignored():
    kept = signal.signal(USR1, signal.SIG_IGN)
    try:
        with whole():
            signal.raise_signal(USR1)
        assert signal.getsignal(USR1) is signal.SIG_IGN
    finally:
        signal.signal(USR1, kept)


def test_other_threads_do_nothing(came):
    held = []

    def inside():
        with whole(), open_to_interrupts():
            held.append(bool(_waiting))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert held == [False]
