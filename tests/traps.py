"""Signals to a copy of this process (``os.fork``) at a chosen moment: nothing is imported again for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Trap:
    """Sends this process a signal at the ``n``-th call of something (from 1), before or in the midst of it."""

    def __init__(self, n: int, number: int = signal.SIGKILL) -> None:
        self.left, self.number = n, number

    def __call__(self, function: Callable[..., Any], before: Callable[..., None] | None = None) -> Callable[..., Any]:
        def trapped(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if before is not None:
                    before(*arguments, **named)
                os.kill(os.getpid(), self.number)
            return function(*arguments, **named)

        return trapped


def in_a_copy(work: Callable[[], int]) -> int:
    """What ``work`` returns in a fork of this process, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def half_of_it(descriptor: int) -> None:
    """As if the disk had only a part of the file when the machine stopped."""
    path = Path(f"/proc/self/fd/{descriptor}").readlink()
    os.truncate(path, path.stat().st_size // 2)
