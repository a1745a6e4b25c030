"""`lwas_fast.interrupts`: handlers wait inside `whole`, are called at its end, and are back whatever they raise.

Catches: a signal lost, a handler that stays exchanged, one that another replaced meanwhile put back.
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lwas_fast import interrupts
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


def test_a_handler_that_raises_where_the_users_code_would_run_leaves_the_rest_whole(came):
    """Or a second Ctrl-C would come in the middle of what puts everything back."""

    def raising(number, _):
        raise KeyboardInterrupt(number)

    signal.signal(USR1, raising)
    undone = []
    with pytest.raises(KeyboardInterrupt), whole():
        signal.raise_signal(USR1)
        try:
            with open_to_interrupts():
                undone.append("the user's code ran")
        finally:
            signal.raise_signal(USR2)
            undone.append(list(came))
    assert undone == [[]]
    assert came == [USR2]


def test_a_handler_that_was_saved_inside_and_put_back_later_is_none_of_ours(came):
    with whole():
        saved = signal.getsignal(USR1)
    mine = signal.signal(USR1, saved)
    with whole():
        signal.raise_signal(USR1)  # nothing handles it; that must not go on for ever
    signal.signal(USR1, mine)
    assert came == [] and not _waiting
    interrupts._came.clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_a_process_in_the_middle_of_a_step_has_its_own_handlers(came):
    with whole():
        signal.raise_signal(USR1)  # the parent's
        if (child := os.fork()) == 0:
            signal.raise_signal(USR2)
            os._exit(0 if came == [USR2] and not _waiting else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert came == [USR1]
