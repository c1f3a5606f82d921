"""Which series of maps is a rigid motion: two parts of the density fitted to each map of a traversal.

Owns: ``analyze --dynamics``: parts, their motions and their division are found of the maps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opustomo.analysis.dynamics import COLUMNS, Hinge, cells, hinges
from opustomo.bodies import BodyModel, at_rest, find_motions, first_covariance, with_joints
from opustomo.body_division import divide
from opustomo.data.atomic import write_csv
from opustomo.data.bodies import parts_of
from opustomo.physics.bodies import soft_bodies
from opustomo.physics.fourier import band_multiplicity, irfft3, rfft3
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band, model_band_adjoint
from opustomo.physics.volume import shell_numbers

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

PARTS, ROUNDS, STEPS = 2, 6, 3
PRECISION = 1e4  # of a map over its own power: maps have no noise, and the prior of motions no say
SOFT, FINEST = 1.0, 0.35  # voxels; cycles per voxel


@dataclass(frozen=True)
class Maps:
    """``Rows`` of n maps (C, C, C) without noise, all of the same weight."""

    volumes: Tensor
    grid: Grid
    strength: float

    def __len__(self) -> int:
        return len(self.volumes)

    @property
    def moved(self) -> Tensor:
        """No pose of a map has been corrected."""
        return torch.zeros(len(self), 6)

    def weight(self, index: Tensor) -> Tensor:
        """(b, n)."""
        return torch.full((len(index), len(band_multiplicity(self.grid.working_box))), self.strength)

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C)."""
        size = self.grid.working_box
        seen = model_band(self.volumes[index], size) * band_multiplicity(size) * self.strength
        return model_band_adjoint(seen, size, self.grid.crop)


def rigid_motion(volumes: Tensor, mask: Tensor, grid: Grid) -> tuple[Hinge, float]:
    """The hinge of two parts of maps (n, C, C, C), and the share of what changes between them that it explains.

    1: the maps are one density whose two parts move; 0: what changes is something else.
    """
    # what lies near Nyquist cannot be moved without error, which would count as change
    volumes = irfft3(rfft3(volumes) * (shell_numbers(grid.crop) < FINEST * grid.crop))
    middle = volumes[len(volumes) // 2]
    masks = parts_of(middle, mask, PARTS, 0, grid)
    bodies = with_joints(soft_bodies(masks.distance, SOFT), middle * mask, masks.relative)
    ones = torch.ones(grid.working_box // 2 + 1)
    model = BodyModel(bodies, middle, middle[None][:0], first_covariance(masks.sigma), ones, torch.ones_like(middle))
    power = float(model_band(middle, grid.working_box).abs().square().sum())
    rows = Maps(volumes, grid, PRECISION / max(power, 1e-30))
    everyone = torch.arange(len(volumes))
    found = at_rest(len(volumes), model, 1)
    for _ in range(ROUNDS):
        found = find_motions(model, rows, everyone, grid, found, STEPS, lambda parts, _: parts)
        model = divide(model, rows, everyone, grid, found, lambda parts, _: parts)
    found = find_motions(model, rows, everyone, grid, found, STEPS, lambda parts, _: parts)
    left = (model.bodies.move(middle[None], found.motion) - volumes).square().sum()
    changed = (volumes - middle).square().sum().clamp(min=1e-30)
    return hinges(model.bodies, found.motion)[0], float(1 - left / changed)


def write_series(run: Run, folder: Path) -> None:
    """dynamics.csv of the components of an analysis, as ``dynamics.write_dynamics``, and ``explained`` of each."""
    rows = []
    for path in sorted(folder.glob("pc*/z_pc.txt"), key=lambda path: int(path.parent.name[2:])):
        codes = np.loadtxt(path, ndmin=2).astype(np.float32)
        if np.ptp(codes, axis=0).max() == 0:
            continue
        hinge, explained = rigid_motion(torch.from_numpy(run.decode(codes)), run.mask, run.grid)
        names = [path.parent.name, "part1" if hinge.fixed == 0 else "part2", "part2" if hinge.fixed == 0 else "part1"]
        rows.append([*names, *cells(hinge, run.grid.working_pixel), f"{explained:.3f}"])
    write_csv(folder / "dynamics.csv", [*COLUMNS, "explained"], rows)
