"""Where training stands: the numbers a run goes on with besides weights, optimiser and memory bank.

Owns: these numbers and how a checkpoint holds them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Course:
    """Position in the epochs, and what the next step and the next line of metrics depend on."""

    epoch: int = 0
    step: int = 0  # batches of the epoch that are done
    generator: torch.Generator = field(default_factory=torch.Generator)
    rate: float = 1.0  # factor on the learning rate, halved by every setback
    setbacks: int = 0
    seen: int = 0  # particles, as of the last line of metrics
    count: int = 0  # particles since then, and sums of their losses: see monitor.Window
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
