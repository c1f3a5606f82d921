"""How a program is asked to stop from outside: Ctrl-C, the end of a batch job, a time limit.

Owns: the handlers of SIGINT, SIGTERM (what a batch system sends before it kills) and SIGUSR1 (what it can be told to
send ahead of a time limit).  Most work stops at once; training is asked, and stops where it can go on from.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from opustomo.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger("opustomo")


class Asked:
    """What to do on a signal: remember the first, whose number is here (0: none); Ctrl-C again stops at once."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int) -> None:
        if self.number and number == signal.SIGINT:
            raise Interrupted(number)
        self.number = self.number or number
        log.info("%s: stopping as soon as the work can go on from there (Ctrl-C: at once)", signal.Signals(number).name)


def stop_at_once(number: int) -> None:
    """What a signal does unless something else is said."""
    raise Interrupted(number)


def ignored(number: int) -> None:
    """Another process has been asked as well, and ends this one."""


@contextmanager
def on_signal(act: Callable[[int], None]) -> Iterator[None]:
    """For the length of the block the signals call ``act`` with their number.

    Nothing happens in threads other than the main one, which alone may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        act(number)

    before: list[Any] = [signal.signal(number, handler) for number in SIGNALS]
    try:
        yield
    finally:
        for number, former in zip(SIGNALS, before, strict=True):
            signal.signal(number, former)
