"""A run folder without training: three groups of codes, and maps in which the code moves and adds density."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.physics.grid import Grid

ZDIM = 4
CENTRES = np.array([[-6.0, 0, 0, 0], [0, 3, 0, 0], [6, 0, 1, 0]])
GRID = Grid(box=48, pixel_size=5.0, working_box=24, crop=20, templateres=32)


def blob(size: int, x: float, y: float, z: float, width: float = 2.0) -> NDArray[np.float32]:
    """Gaussian at (x, y, z) voxels from voxel size//2 of a (z, y, x) array."""
    axis = np.arange(size) - size // 2
    dz, dy, dx = np.meshgrid(axis - z, axis - y, axis - x, indexing="ij")
    return np.exp(-(dx**2 + dy**2 + dz**2) / (2 * width**2)).astype(np.float32)


@dataclass
class FakeRun:
    """What the analysis asks of ``checkpoint.Run``."""

    path: Path
    codes: NDArray[np.float32]
    rotation: NDArray[np.float64]
    kind: Literal["network", "linear"] = "network"
    analysis: str = "analyze"
    rows: NDArray[np.int64] | None = None
    epoch: int = 3
    sigma: NDArray[np.float32] | None = None
    grid: Grid = GRID
    config: dict[str, Any] = field(default_factory=dict)
    linear: dict[str, NDArray[Any]] | None = None  # linear/linear.npz
    mask: torch.Tensor = field(default_factory=lambda: torch.ones(GRID.crop, GRID.crop, GRID.crop))
    conformation: None = None

    @property
    def star(self) -> Path:
        return self.path / "particles.star"

    @property
    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        index = np.arange(len(self.codes))
        return index[index % 10 != 0], index[index % 10 == 0]

    @property
    def typical(self) -> NDArray[np.bool_]:
        return np.ones(len(self.codes), bool)

    def linear_results(self) -> dict[str, NDArray[Any]] | None:
        return self.linear

    def linear_stage(self) -> FakeRun | None:
        return None

    def decode(self, codes: NDArray[np.floating], batch: int = 8) -> NDArray[np.float32]:
        """A body whose arm moves along y with the first code and whose extra blob grows with the second."""
        c = self.grid.crop
        body = blob(c, 0, 0, 0, 2.0)
        arm = [blob(c, 4, float(z[0]) / 2, 0, 1.5) for z in codes]
        extra = [max(float(z[1]), 0) / 3 * blob(c, -4, 0, 2, 1.2) for z in codes]
        return np.stack([body + a + e for a, e in zip(arm, extra, strict=True)]).astype(np.float32)


def fake_run(path: Path, particles: int = 240, seed: int = 0) -> tuple[FakeRun, NDArray[np.int64]]:
    """A run and the group of every particle."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(particles) % 3
    codes = CENTRES[group] + rng.normal(0, 0.4, (particles, ZDIM))
    rotation = Rotation.random(particles, random_state=seed).as_matrix()
    path.mkdir(parents=True, exist_ok=True)
    return FakeRun(path, codes.astype(np.float32), rotation), group
