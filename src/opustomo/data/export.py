"""Particles back to STAR: a subset of the rows, everything else as it came in.

Owns: the rule that every block, column, value and their order survive, and that ambiguous identities are refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.data.readers import DIALECTS, relion
from opustomo.data.readers.source import Source
from opustomo.data.star import Block, StarFile, number_columns, write_star
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

    def in_file(self, source: Source, index: NDArray[np.integer]) -> CorrectedPoses:
        """These poses, of the particles at ``index``, as the file has them, one for each of their rows."""
        dialect = DIALECTS[source.format]
        euler, origin = dialect.poses_in_file(source.subset(index), self.pixel_size, self.euler, self.origin)
        return CorrectedPoses(euler, origin, self.pixel_size)

    def columns(self, star: StarFile) -> dict[str, list[str]]:
        """Columns in the units of the file: origins in Angstrom for RELION 3.1 and later, else in pixels."""
        angstrom = star.has(star.particle_block, "rlnOriginXAngst") or star.optics_block is not None
        suffix, unit = ("Angst", self.pixel_size) if angstrom else ("", 1.0)
        axes = relion.AXES[:2] if relion.has_series(star) else relion.AXES  # images have no depth
        origins = [f"rlnOrigin{axis}{suffix}" for axis in axes]
        values = np.hstack([self.euler, self.origin[:, : len(axes)] * unit])
        return number_columns([*relion.ANGLES, *origins], values, 6)


def write_subset(
    source: Source,
    index: NDArray[np.integer],
    path: Path,
    classes: NDArray[np.integer] | None = None,
    poses: CorrectedPoses | None = None,
) -> None:
    """Write the particles at ``index`` (integers, their order is kept) with all other blocks unchanged.

    classes: optional class of each written particle, 0-based; written as rlnClassNumber, 1-based, replacing that column
    or appended.  poses: of each written particle, in place of those of the file.  File names stay as they were: they
    are relative to the source STAR's folder or to ``--datadir``.  Of tilt images all rows of a particle are written; of
    an optimisation set the set as well, ``<path>_optimisation_set.star``.  UserError: no particles, ambiguous
    identities.
    """
    if len(index) == 0:
        raise UserError(f"{path}: no particles selected; choose other classes")
    refuse_ambiguous(source.table)
    rows, member = source.rows_of(index)
    # particles in the file's order: the images of a flat table, too
    order = np.argsort(rows) if (np.diff(index) > 0).all() else np.arange(len(rows))
    rows, member = rows[order], member[order]
    star = source.whole
    table = star.particles.iloc[rows].reset_index(drop=True)
    if classes is not None:
        table["rlnClassNumber"] = np.array([str(int(label) + 1) for label in np.asarray(classes)[member]], object)
    if poses is not None:
        for name, column in poses.in_file(source, index).columns(star).items():
            table[name] = np.array(column, object)[order]
    write_star(path, {**star.blocks, star.particle_block: table})
    if source.optimisation is not None:
        set_path = path.with_name(f"{path.stem}_optimisation_set.star")
        write_star(set_path, optimisation_blocks(source.optimisation, star.path, path))


def optimisation_blocks(optimisation: StarFile, old: Path, new: Path) -> dict[str, Block]:
    """The optimisation set with other particles, their file named as the old one was: relative to the same folder."""
    column = "rlnTomoParticlesFile"
    blocks = dict(optimisation.blocks)
    name = next(name for name in blocks if optimisation.has(name, column))
    stated = str(optimisation.text(name, column, "the set")[0])
    base, told = old.absolute(), Path(stated)
    shown = new.absolute()
    if not told.is_absolute() and base.parts[-len(told.parts) :] == told.parts:
        # real paths: ".." after a link leads elsewhere
        shown = Path(os.path.relpath(shown.resolve(), base.parents[len(told.parts) - 1].resolve()))
    block = blocks[name]
    changed = block.assign(**{column: str(shown)}) if isinstance(block, pd.DataFrame) else {**block, column: str(shown)}
    return {**blocks, name: changed}


def fingerprint_of(names: Iterable[object]) -> str:
    """One hash of the particles' identities in their order: what a run remembers of the STAR file it was made from."""
    return hashlib.sha256("\n".join(map(str, names)).encode(errors="surrogateescape")).hexdigest()


def refuse_ambiguous(star: StarFile) -> None:
    """UserError naming the first particle that occurs twice: a class of it would not say which one is meant."""
    seen: dict[str, int] = {}
    for row, name in enumerate(relion.identities(star)):
        if name in seen:
            raise UserError(
                f"{star.path}: particle {name} occurs twice (rows {seen[name] + 1} and {row + 1}); identities must be "
                "unique to select by them: remove duplicates"
            )
        seen[name] = row
