"""Where training stands: the numbers a run goes on with besides weights, optimiser and memory bank.

Owns: these numbers, how a checkpoint holds them, and the means over them that become lines of metrics.csv.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opustomo import parallel
from opustomo.monitor import Metrics

log = logging.getLogger("opustomo")


@dataclass
class Course:
    """Position in the epochs, and what the next step and the next line of metrics depend on."""

    epoch: int = 0
    step: int = 0  # batches of the epoch that are done
    generator: torch.Generator = field(default_factory=torch.Generator)
    rate: float = 1.0  # factor on the learning rate, halved by every setback
    setbacks: int = 0
    seen: int = 0  # particles, as of the last line of metrics
    count: int = 0  # particles since then, and sums of their losses: see Window
    sums: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))
    level: list[float] = field(default_factory=lambda: [0.0] * 6)  # see guard.Watch

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"generator": self.generator.get_state(), "sums": self.sums.cpu(), "level": list(self.level)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Course:
        """The inverse of ``state``."""
        generator = torch.Generator()
        generator.set_state(state["generator"])
        return cls(**state | {"generator": generator, "sums": state["sums"].clone(), "level": list(state["level"])})

    def next_epoch(self, particles: int) -> Course:
        """As the next epoch begins; ``particles``: of an epoch."""
        seen = (self.epoch + 1) * particles
        return Course(self.epoch + 1, rate=self.rate, setbacks=self.setbacks, seen=seen, level=list(self.level))


class Window:
    """Running means between two lines of metrics.csv, in ``course``; metrics: None in a process that writes nothing."""

    def __init__(self, metrics: Metrics | None, course: Course) -> None:
        self.metrics, self.course, self.started = metrics, course, time.monotonic()

    def add(self, count: int, values: Tensor) -> None:
        """Means over ``count`` particles (6,): loss, nll, kl, and the weighted prior, regulariser and disentanglement.

        Of several processes each adds its own particles' part of these means.  They stay on the device.
        """
        self.course.count += count
        self.course.sums = self.course.sums.to(values.device) + count * values.double()

    def write(self, beta: float, rate: float) -> None:
        """A line of metrics; starts a new window."""
        course, seconds = self.course, time.monotonic() - self.started
        count, sums = course.count, parallel.total(course.sums.cpu()).tolist()
        course.seen, course.count, course.sums = course.seen + count, 0, torch.zeros_like(course.sums)
        self.started = time.monotonic()
        if self.metrics is None:
            return
        loss, nll, kl, prior, regulariser, disentanglement = (value / count for value in sums)
        log.debug(
            "epoch %d, %d particles: loss %.3f, nll %.3f, kl %.3f, beta %.3f, lr %.2e",
            course.epoch, course.seen, loss, nll, kl, beta, rate,
        )  # fmt: skip
        self.metrics.append(
            epoch=course.epoch, particles=course.seen, loss=loss, nll=nll, kl=kl, prior=prior,
            regulariser=regulariser, disentanglement=disentanglement, beta=beta, lr=rate, seconds=seconds,
            particles_per_second=count / max(seconds, 1e-9),
        )  # fmt: skip
