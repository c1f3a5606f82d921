"""Particles back to STAR: a subset of the rows, everything else as it came in.

Owns: the rule that every block, column, value and their order survive, and that ambiguous identities are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opustomo.data.readers.relion import identities
from opustomo.data.star import StarFile, write_star
from opustomo.errors import UserError


@dataclass(frozen=True)
class CorrectedPoses:
    """Poses to write: Euler angles (n, 3) degrees and origins (n, 3) pixels of ``pixel_size`` Angstrom."""

    euler: NDArray[np.float64]
    origin: NDArray[np.float64]
    pixel_size: float

    def at(self, index: NDArray[Any]) -> CorrectedPoses:
        """Those of some of the particles."""
        return CorrectedPoses(self.euler[index], self.origin[index], self.pixel_size)

    def columns(self, star: StarFile) -> dict[str, NDArray[np.object_]]:
        """Columns in the units of the file: origins in Angstrom for RELION 3.1 and later, else in pixels."""
        angstrom = star.has(star.particle_block, "rlnOriginXAngst") or star.optics_block is not None
        suffix, unit = ("Angst", self.pixel_size) if angstrom else ("", 1.0)
        values = dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), self.euler.T, strict=True))
        values |= {f"rlnOrigin{axis}{suffix}": self.origin[:, i] * unit for i, axis in enumerate("XYZ")}
        return {name: np.array([f"{v:.6f}" for v in column], object) for name, column in values.items()}


def write_subset(
    star: StarFile,
    rows: NDArray[np.integer],
    path: Path,
    classes: NDArray[np.integer] | None = None,
    poses: CorrectedPoses | None = None,
) -> None:
    """Write the particles at ``rows`` (integers, their order is kept) with all other blocks unchanged.

    classes: optional class of each written row, 0-based; written as rlnClassNumber, 1-based, replacing that column
    or appended.  poses: of each written row, in place of those of the file.  File names stay as they were: they are
    relative to the source STAR's folder or to ``--datadir``.  UserError: no rows, ambiguous identities.
    """
    if len(rows) == 0:
        raise UserError(f"{path}: no particles selected; choose other classes")
    refuse_ambiguous(star)
    table = star.particles.iloc[np.asarray(rows, np.int64)].reset_index(drop=True)
    if classes is not None:
        table["rlnClassNumber"] = np.array([str(int(label) + 1) for label in classes], object)
    if poses is not None:
        for name, column in poses.columns(star).items():
            table[name] = column
    write_star(path, {**star.blocks, star.particle_block: table})


def fingerprint_of(names: Iterable[object]) -> str:
    """One hash of the particles' identities in their order: what a run remembers of the STAR file it was made from."""
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()


def refuse_ambiguous(star: StarFile) -> None:
    """UserError naming the first particle that occurs twice: a class of it would not say which one is meant."""
    seen: dict[str, int] = {}
    for row, name in enumerate(identities(star)):
        if name in seen:
            raise UserError(
                f"{star.path}: particle {name} occurs twice (rows {seen[name] + 1} and {row + 1}); identities must be "
                "unique to select by them: remove duplicates"
            )
        seen[name] = row
