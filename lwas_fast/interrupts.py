"""Interrupts that wait while something must not be left half done.

Ctrl-C, a scheduler's SIGTERM or a timer may become an exception between any two lines of Python. Inside `whole` the
handlers of signals wait; at its end those of what came meanwhile are called. So a step, a change between the two sets
of weights, or the end of a measurement is done or not done, never half.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps in enumerations, which cost 12 µs a step
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

# All that may have a handler which raises; not those of faults, nor of children and terminals.
_NUMBERS = [
    int(number)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGBREAK")
    if (number := getattr(signal, name, None)) is not None
]
_waiting: dict[int, Any] = {}  # the handlers that wait; Python calls handlers in the main thread only
_came: list[tuple[int, FrameType | None]] = []


def _note(number: int, frame: FrameType | None) -> None:
    _came.append((number, frame))


def _hold() -> None:
    try:
        for number in _NUMBERS:
            handler = _signal.getsignal(number)
            if callable(handler) and handler is not _note:
                _waiting[number] = handler
                _signal.signal(number, _note)
    except BaseException:
        _let_go()
        raise


def _let_go() -> None:
    try:
        while _waiting:
            number = next(iter(_waiting))
            if _signal.getsignal(number) is _note:  # somebody may have set another inside
                _signal.signal(number, _waiting[number])
            del _waiting[number]
        while _came:
            number, frame = _came.pop(0)
            handler = _signal.getsignal(number)
            if handler is _note:  # somebody saved it inside, and put it back: there is no other
                continue
            if callable(handler):
                handler(number, frame)
            else:  # it was set inside
                _signal.raise_signal(number)
    finally:  # a handler raised: the others are to be back, too, and called
        if _waiting or _came:
            _let_go()


def _in_child() -> None:
    _came.clear()  # they are the parent's
    _let_go()


if hasattr(os, "register_at_fork"):  # another thread may fork while a step is taken
    os.register_at_fork(after_in_child=_in_child)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class whole:  # noqa: N801 - a context, as torch.no_grad is
    """Inside, the handlers of signals wait. In other threads than the main one, and inside another, it does nothing."""

    def __enter__(self) -> None:
        self._ours = (
            not torch.compiler.is_compiling()  # a trace has no signals
            and not _waiting
            and _in_main_thread()
        )
        if self._ours:
            _hold()

    def __exit__(self, *_: object) -> None:
        if self._ours:
            _let_go()


class open_to_interrupts:  # noqa: N801
    """Inside, which is inside `whole`, handlers are called as ever: for the user's own code."""

    def __enter__(self) -> None:
        self._ours = bool(_waiting) and _in_main_thread()
        if self._ours:
            try:
                _let_go()
            except BaseException:  # what comes after this is whole again
                _hold()
                raise

    def __exit__(self, *_: object) -> None:
        if self._ours:
            _hold()
