"""The checkpoints of a run in training: which files are written when, and which go again.

Owns: what training changes, and its files: ``weights.N.pkl`` with codes and poses after an epoch, ``state.pkl`` within
one, ``start.pkl`` before the first.  The last two have what a ``weights.N.pkl`` has, but no codes, which take a pass
over all particles.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opustomo import checkpoint
from opustomo.checkpoint import BEFORE, WITHIN
from opustomo.config import TrainConfig
from opustomo.data.tensors import save_tensors
from opustomo.errors import UserError
from opustomo.linear_stage import last_poses, stage_state
from opustomo.model.vae import Vae
from opustomo.monitor import Metrics, read_rows
from opustomo.training.course import Course
from opustomo.training.start import Start


@dataclass
class Learner:
    """Everything that training changes; bank (P, K): codes last seen."""

    model: Vae
    optimizer: torch.optim.Optimizer
    bank: Tensor
    course: Course

    def state(self, course: Course) -> dict[str, Any]:
        """What a checkpoint keeps of it, as it stands at ``course``."""
        return {
            "model": {name: value.cpu() for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "bank": self.bank.cpu(),
            "course": course.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``, of this run's own checkpoints."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.copy_(state["bank"])
        self.course = Course.of(state["course"])


@dataclass(frozen=True)
class Files:
    """Those of one run; start: None in a process that does not write."""

    config: TrainConfig
    start: Start | None

    def begin(self, learner: Learner) -> None:
        """Before the first step of this run's own: whatever another attempt has left within an epoch is not its."""
        if self.start is not None:
            (self.config.output / WITHIN).unlink(missing_ok=True)
            save_tensors(self.config.output / BEFORE, self._state(learner, learner.course, self.start))

    def keep(self, learner: Learner) -> None:
        """Within an epoch."""
        if self.start is not None:
            save_tensors(self.config.output / WITHIN, self._state(learner, learner.course, self.start))

    def save(self, learner: Learner, following: Course, codes: tuple[Tensor, Tensor]) -> None:
        """After an epoch, with the codes of every particle (P, zdim); following: where the next one begins."""
        if self.start is None:
            return
        output, start, epoch = self.config.output, self.start, following.epoch - 1
        poses = last_poses(start.inputs, start.linear, self.config.estpose)
        state = self._state(learner, following, start)
        checkpoint.save_epoch(
            output, epoch, state, *codes, poses, None if start.bodies is None else start.bodies.conformation
        )
        for name in (WITHIN, BEFORE):
            (output / name).unlink(missing_ok=True)
        if self.config.keep > 0:
            self._prune()

    def last_epoch(self, course: Course) -> dict[str, Any]:
        """The last checkpoint before ``course`` that can be read, at an epoch's beginning."""
        later = {f"weights.{epoch}.pkl" for epoch in checkpoint.epochs_of(self.config.output) if epoch >= course.epoch}
        for path in checkpoint.states_of(self.config.output):
            if path.name not in later | {WITHIN}:
                with suppress(UserError):
                    return checkpoint.load_tensors(path)
        raise UserError(f"{self.config.output}: no checkpoint to return to can be read; start again in another folder")

    def metrics(self, course: Course) -> Metrics | None:
        """metrics.csv as it was when ``course`` had got this far."""
        return None if self.start is None else Metrics(self.config.output / "metrics.csv", course.epoch, course.seen)

    def bounds(self) -> dict[int, float]:
        """Held-out bound after every epoch of which there is a checkpoint."""
        rows = read_rows(self.config.output / "metrics.csv")
        found = {int(row["epoch"]): float(row["val_elbo"]) for row in rows if row["val_elbo"]}
        return {epoch: found[epoch] for epoch in checkpoint.epochs_of(self.config.output) if epoch in found}

    def _prune(self) -> None:
        """All but the last ``keep`` epochs and the one that explains held-out particles best."""
        bounds = self.bounds()
        kept = {*sorted(bounds)[-self.config.keep :], max(bounds, key=lambda epoch: bounds[epoch])}
        for epoch in bounds.keys() - kept:
            checkpoint.remove_epoch(self.config.output, epoch)

    def _state(self, learner: Learner, course: Course, start: Start) -> dict[str, Any]:
        grid = start.inputs.grid
        return {
            "kind": "network",
            "epoch": course.epoch if course.step else course.epoch - 1,
            "shape": {
                "templateres": grid.templateres, "width": self.config.width, "encoderres": self.config.encoderres,
            },
            **learner.state(course),
            **stage_state(start.inputs, start.noise, start.linear),
            **({} if start.bodies is None else {"bodies": start.bodies.state()}),
        }  # fmt: skip
