"""Particles back to STAR: a subset of the rows, everything else as it came in.

Owns: the rule that every block, column, value and their order survive, and that ambiguous identities are refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.data.particles import turn_of_each
from opustomo.data.readers import DIALECTS, relion
from opustomo.data.readers.source import Source
from opustomo.data.star import Block, StarFile, number_columns, write_star
from opustomo.errors import UserError

log = logging.getLogger(__name__)


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
    unique: bool = False,
) -> None:
    """Write the particles at ``index`` (integers, their order is kept) with all other blocks unchanged.

    classes: optional class of each written particle, 0-based; written as rlnClassNumber, 1-based, replacing that column
    or appended.  poses: of each written particle, in place of those of the file.  unique: of copies of a particle (see
    ``expand``) the first one alone, with a line in the log.  File names stay as they were: they
    are relative to the source STAR's folder or to ``--datadir``.  Of tilt images all rows of a particle are written; of
    an optimisation set the set as well, ``<path>_optimisation_set.star``.  UserError: no particles, ambiguous
    identities.
    """
    if len(index) == 0:
        raise UserError(f"{path}: no particles selected; choose other classes")
    refuse_ambiguous(source.table)
    if unique:
        kept = turn_of_each(relion.identities(source.table)[index]) == 0
        log.info("%s: %d copies of its %d particles left out", path, len(kept) - kept.sum(), kept.sum())
        index, poses = index[kept], poses.at(kept) if poses is not None else None
        classes = None if classes is None else classes[kept]
    rows, member = source.rows_of(index)
    # particles in the file's order: the images of a flat table, too
    order = np.argsort(rows) if (np.diff(index) > 0).all() else np.arange(len(rows))
    rows, member = rows[order], member[order]
    star = source.whole
    table = star.particles.iloc[rows].reset_index(drop=True)
    if classes is not None:
        numbers = [str(int(label) + 1) for label in np.asarray(classes)[member]]
        table[star.spelt("rlnClassNumber")] = np.array(numbers, object)
    if poses is not None:
        for name, column in poses.in_file(source, index).columns(star).items():
            table[star.spelt(name)] = np.array(column, object)[order]
    write_rows(source, table, path)


def write_rows(source: Source, table: pd.DataFrame, path: Path) -> list[Path]:
    """Write ``table`` in place of the particles of ``source``, and its optimisation set where it has one."""
    star, paths = source.whole, written_paths(source, path)
    write_star(path, {**star.blocks, star.particle_block: table})
    if source.optimisation is not None:
        write_star(paths[1], optimisation_blocks(source.optimisation, star.path, path))
    return paths


def written_paths(source: Source, path: Path) -> list[Path]:
    """What ``write_rows`` writes: ``path``, and an optimisation set that names it where ``source`` has one."""
    return [path] if source.optimisation is None else [path, path.with_name(f"{path.stem}_optimisation_set.star")]


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
    """UserError naming the first particle that occurs twice in one pose: a class would not say which one is meant.

    Copies of a particle in other poses are those of a symmetry (``expand``).
    """
    angles = [star.text(star.particle_block, name, "telling copies apart") for name in relion.ANGLES
              if star.has(star.particle_block, name)]  # fmt: skip
    refuse_repeated(star, "identities must be unique to select by them: remove duplicates", *angles)


def refuse_repeated(star: StarFile, fix: str, *more: NDArray[np.object_]) -> None:
    """UserError naming the first particle that occurs twice, with the same values in the columns ``more``."""
    names = relion.identities(star)
    seen: dict[tuple[str, ...], int] = {}
    for row, key in enumerate(zip(names, *more, strict=True)):
        if key in seen:
            raise UserError(
                f"{star.path}: particle {names[row]} occurs twice (rows {seen[key] + 1} and {row + 1}); {fix}"
            )
        seen[key] = row
