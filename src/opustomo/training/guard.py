"""The watch over training: every few steps all its processes agree to go on, to keep what they have, or to stop.

Owns: when the state is kept, what a signal leads to, and when a loss has run away.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opustomo import parallel
from opustomo.errors import Interrupted
from opustomo.interruption import SIGNALS, Asked, on_signal, stop_at_once
from opustomo.training.course import Course

log = logging.getLogger("opustomo")

BLOCK = 16  # steps, whose mean loss is looked at; on a GPU nothing is waited for in between
SETTLED = 4  # blocks that tell how much blocks differ
JUMP = 10.0  # of their mean deviation: more is no chance
Noted = tuple[Tensor, Tensor, int]
LEAST_JUMP = 5.0, 0.1  # nats per particle, share of what a particle is worth


class RanAway(Exception):
    """The loss has jumped, or is not finite (``lost``): what is learned from here on is worth nothing."""

    def __init__(self, reason: str, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


class Watch:
    """Looks at the losses of all processes, the clock and the signals.

    A loss is judged by its excess over the linear stage's on the same particles, which does not depend on how bright
    these are; the mean over a block of steps by how much the blocks before it differed.

    asked: the handler of the signals; minutes: between two states kept (0: none in between); keep: writes the state;
    worth: of a particle in the linear stage, nats; how: the command that goes on from the state.
    """

    def __init__(self, asked: Asked, minutes: float, keep: Callable[[], None], worth: float, how: str) -> None:
        self.asked, self.minutes, self.keep, self.how = asked, minutes, keep, how
        self.least_jump = max(LEAST_JUMP[0], LEAST_JUMP[1] * abs(worth))
        self.kept = time.monotonic()
        self.noted: list[Noted] = []  # since the last look

    def note(self, rows: Tensor, excess: Tensor, count: int) -> None:
        """A step's own particles: rows (b,) and excess (b,) in nats; count: of all processes."""
        self.noted.append((rows, excess.detach(), count))

    def look(self, course: Course, last: bool) -> None:
        """Called where the run could go on from; ``last``: the epoch ends here.

        Raises Interrupted after a signal, with the state kept, and RanAway.
        """
        if self.noted[-1][1].is_cuda and len(self.noted) < BLOCK and not last:
            return  # the host would wait for the device at every step
        due = parallel.first() and self.minutes > 0 and time.monotonic() - self.kept > 60.0 * self.minutes
        sums = torch.stack([excess.double().sum() for _, excess, _ in self.noted]).sum().cpu()
        asked = [float(self.asked.number == number) for number in SIGNALS]
        words = parallel.total(torch.tensor([*asked, float(due), float(sums)], dtype=torch.float64)).tolist()
        self._judge(course, words[-1])
        for number, many in zip(SIGNALS, words[: len(SIGNALS)], strict=True):
            if many:
                self._stop(number)
        if words[-2]:
            self._keep()

    @contextmanager
    def between_epochs(self) -> Iterator[None]:
        """While the epoch's steps are done and nothing is learned: a signal stops at once, the state is kept.

        Several processes could not agree in the midst of this work; they finish it first.
        """
        if parallel.count() > 1:
            yield
            return
        try:
            with on_signal(stop_at_once):
                if self.asked.number:
                    raise Interrupted(self.asked.number)
                yield
        except Interrupted as signalled:
            self._stop(signalled.number)

    def _keep(self) -> None:
        if parallel.first():
            self.keep()
        self.kept = time.monotonic()

    def _stop(self, number: int) -> None:
        self._keep()
        parallel.total(torch.zeros(1))  # the others stay until it is written
        raise Interrupted(
            number, f"everything learned so far is kept; go on with `{self.how}`", told=not parallel.first()
        )

    def _judge(self, course: Course, total: float) -> None:
        """``course.level``: mean and mean deviation of the blocks, their number; sum, particles, steps of this one."""
        mean, deviation, blocks, block, count, steps = course.level
        noted, self.noted = self.noted, []
        block, count, steps = block + total, count + sum(n for *_, n in noted), steps + len(noted)
        if not math.isfinite(total):
            raise RanAway(f"the loss is not finite for particle row(s) {_rows_not_finite(noted)}", lost=True)
        if steps < BLOCK:
            course.level = [mean, deviation, blocks, block, count, steps]
            return
        found = block / count
        if blocks >= SETTLED and found - mean > max(self.least_jump, JUMP * deviation):
            raise RanAway(f"the loss has jumped by {found - mean:.3g} nats per particle (before: +-{deviation:.2g})")
        part = 1.0 / min(blocks + 1.0, 4.0 * SETTLED)
        # the first block has no mean to differ from
        deviation += part * ((abs(found - mean) if blocks else 0.0) - deviation)
        course.level = [mean + part * (found - mean), deviation, blocks + 1.0, 0.0, 0.0, 0.0]


def _rows_not_finite(noted: list[Noted]) -> str:
    own = [rows[~torch.isfinite(excess).cpu()] for rows, excess, _ in noted]
    bad = sorted(parallel.from_all(torch.cat(own)).tolist())
    return ", ".join(str(i + 1) for i in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
