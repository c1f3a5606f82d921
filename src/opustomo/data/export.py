"""Particles back to STAR: a subset of the rows, everything else as it came in.

Owns: the rule that every block, column, value and their order survive, and that ambiguous identities are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.readers.relion import identities
from opustomo.data.star import StarFile, write_star
from opustomo.errors import UserError


def write_subset(
    star: StarFile, rows: NDArray[np.integer], path: Path, classes: NDArray[np.integer] | None = None
) -> None:
    """Write the particles at ``rows`` (integers, their order is kept) with all other blocks unchanged.

    classes: optional class of each written row, 0-based; written as rlnClassNumber, 1-based, replacing that column
    or appended.  File names stay as they were: they are relative to the source STAR's folder or to ``--datadir``.
    UserError: no rows, ambiguous identities.
    """
    if len(rows) == 0:
        raise UserError(f"{path}: no particles selected; choose other classes")
    refuse_ambiguous(star)
    table = star.particles.iloc[np.asarray(rows, np.int64)].reset_index(drop=True)
    if classes is not None:
        table["rlnClassNumber"] = np.array([str(int(label) + 1) for label in classes], object)
    write_star(path, {**star.blocks, star.particle_block: table})


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
