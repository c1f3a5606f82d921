"""The truth of a simulated set: labels.npz and gt/, as the simulator (and the common benchmark's tool) writes them.

Owns: the reading and checking of that folder.  Row i of every label is row i of the STAR file and of the codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opustomo.analysis.score_motions import KnownHinge
from opustomo.data.tensors import read_arrays
from opustomo.errors import UserError

_MAP_NAME = re.compile(r"state(\d+)_([a-z]+)([+-]\d+(?:\.\d+)?)\.mrc")
_NOT_COORDINATES = {"state", "present", "junk", "junk_kind", "true_pose", "tilts", "bfac", "scale", "tilt_count"}


@dataclass(frozen=True)
class TruthMap:
    """One CTF-free map in gt/."""

    state: int
    coordinate: str  # what its name tells a value of: "hinge" (degrees), "path" (Angstrom)
    value: float
    path: Path


@dataclass(frozen=True)
class Truth:
    """P particles; what a set does not have is None or empty."""

    state: NDArray[np.int64] | None  # (P,) composition
    coordinates: dict[str, NDArray[np.float64]]  # conformational coordinates (P,) by name, NaN where undefined
    junk: NDArray[np.bool_]  # (P,) True for decoys; all False where the set has none
    euler: NDArray[np.float64] | None  # (P, 3) degrees
    origin: NDArray[np.float64] | None  # (P, 3) pixels, x y z
    defocus: NDArray[np.float64] | None  # (P,) Angstrom
    tilt_count: NDArray[np.float64] | None  # (P,)
    maps: tuple[TruthMap, ...]
    hinge: KnownHinge | None = None

    def at(self, rows: NDArray[np.int64]) -> Truth:
        """That of some of the particles."""
        return replace(
            self,
            state=None if self.state is None else self.state[rows],
            coordinates={name: value[rows] for name, value in self.coordinates.items()},
            junk=self.junk[rows],
            euler=None if self.euler is None else self.euler[rows],
            origin=None if self.origin is None else self.origin[rows],
            defocus=None if self.defocus is None else self.defocus[rows],
            tilt_count=None if self.tilt_count is None else self.tilt_count[rows],
            hinge=None if self.hinge is None else self.hinge.at(rows),
        )

    @property
    def shown(self) -> NDArray[np.float64]:
        """(P,) the coordinate that the names of the maps tell, NaN where it is undefined."""
        name = self.maps[0].coordinate if self.maps else ""
        return self.coordinates.get(name, np.full(len(self.junk), np.nan))

    def nearest_map(self, state: int, value: float) -> TruthMap | None:
        """The map of ``state`` whose coordinate is nearest (any, if ``value`` is NaN); None if the state has no map."""
        candidates = [m for m in self.maps if m.state == state]
        return min(candidates, key=lambda m: abs(m.value - np.nan_to_num(value)), default=None)


def read_truth(folder: Path, particles: int) -> Truth:
    """Read the truth of ``particles`` rows; UserError if it is absent, unreadable or has another number of rows."""
    path = folder / "labels.npz"
    if not path.is_file():
        raise UserError(f"--truth {folder}: has no labels.npz; give the folder that `opustomo simulate -o` wrote")
    labels = read_arrays(path, "simulate the set again")
    state = labels.get("state", labels.get("present"))
    pose = labels.get("true_pose")
    rows = {key: len(labels[key]) for key in ("state", "present", "junk", "true_pose") if key in labels}
    wrong = {key: count for key, count in rows.items() if count != particles}
    if wrong:
        key, count = next(iter(wrong.items()))
        raise UserError(f"{path}: {key} has {count} rows but the run has {particles} codes; give the truth of this set")
    return Truth(
        state=None if state is None else state.astype(np.int64),
        coordinates=_coordinates(labels, particles),
        junk=labels.get("junk", np.zeros(particles)).astype(bool),
        euler=None if pose is None else pose[:, :3],
        origin=None if pose is None else pose[:, 3:6],
        defocus=None if pose is None or pose.shape[1] < 7 else pose[:, 6],
        tilt_count=labels.get("tilt_count"),
        maps=_maps(folder / "gt"),
        hinge=_hinge(labels, particles),
    )


def _hinge(labels: dict[str, NDArray[Any]], particles: int) -> KnownHinge | None:
    """hinge (P,) degrees, and hinge_axis (2, 3): direction, and a point on it in Angstrom from voxel N//2."""
    angle, line = labels.get("hinge"), labels.get("hinge_axis")
    if angle is None or angle.shape != (particles,):
        return None
    if line is None or line.shape != (2, 3):
        return KnownHinge(angle.astype(np.float64))
    return KnownHinge(angle.astype(np.float64), *line.astype(np.float64))


def _coordinates(labels: dict[str, NDArray[Any]], particles: int) -> dict[str, NDArray[np.float64]]:
    return {
        key: value.astype(np.float64)
        for key, value in labels.items()
        if key not in _NOT_COORDINATES and value.shape == (particles,) and np.issubdtype(value.dtype, np.number)
    }


def _maps(folder: Path) -> tuple[TruthMap, ...]:
    found = [(_MAP_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("state*.mrc"))]
    return tuple(TruthMap(int(name[1]), name[2], float(name[3]), path) for name, path in found if name)
