"""Particle lists of other programs: where particles are in tomograms and how they are turned, without any images.

Owns: the one list that all of them become, and how a file is recognised.  `opustomo extract` cuts the boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opustomo.data.lists import stars, tables
from opustomo.data.star import read_star
from opustomo.errors import UserError

Unit = Literal["voxels", "angstrom", "centred"]
_TABLES: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    ".tbl": ("Dynamo", tables.dynamo),
    ".xml": ("PyTom", tables.pytom),
    ".ndjson": ("CZ portal", tables.ndjson),
}


@dataclass(frozen=True)
class ParticleList:
    """P particles: the centre of each lies at ``position`` plus ``shift`` Angstrom, x, y, z, along the tomogram's axes.

    ``rotation`` is A of METHOD section 2: ``x_tomogram = A x_average`` about the particle's centre.
    """

    source: Path
    kind: str  # program, for messages
    position: NDArray[np.float64]  # (P, 3)
    unit: Unit  # of position; centred: Angstrom from the middle of the tomogram, else from its first voxel
    rotation: NDArray[np.float64]  # (P, 3, 3)
    tomogram: NDArray[np.object_]  # (P,) as in the file, "" where it names none
    shift: NDArray[np.float64]  # (P, 3) Angstrom
    score: NDArray[np.float64]  # (P,) NaN where unknown
    half: NDArray[np.int64]  # (P,) 1 or 2, 0 where unknown
    pixel_size: float | None = None  # Angstrom, of the voxels that position counts, where the file states it
    image_pixel: float | None = None  # Angstrom, of the images of a RELION table
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.position)

    def at(self, rows: NDArray[np.int64]) -> ParticleList:
        """Those at ``rows``."""
        names = ("position", "rotation", "tomogram", "shift", "score", "half")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def voxels(
        self, rows: NDArray[np.int64], pixel_size: float, size: NDArray[np.int64], coordinate_pixel: float | None
    ) -> NDArray[np.float64]:
        """(n, 3) centres of the particles at ``rows`` in voxels of their tomogram, x, y, z, the first voxel at 0.

        pixel_size: Angstrom, of the tomogram of ``size`` (x, y, z) voxels; coordinate_pixel: of voxels that the list
        counts, instead of what its file states (else those of the tomogram).
        """
        place, shift = self.position[rows], self.shift[rows] / pixel_size
        if self.unit == "voxels":
            return place * ((coordinate_pixel or self.pixel_size or pixel_size) / pixel_size) + shift
        return place / pixel_size + shift + (size / 2 if self.unit == "centred" else 0)


def read_list(path: Path, block: str | None = None, tomogram: str | None = None) -> ParticleList:
    """Read a particle list of any known program; what it is is told by the file.

    block, tomogram: of a STAR file, the table and the column of tomogram names, where they are not the usual ones.
    UserError: unknown kind, columns missing, values that are not numbers, no particles.
    """
    if path.suffix.lower() in _TABLES:
        kind, reader = _TABLES[path.suffix.lower()]
        found = reader(path)
    elif path.suffix.lower() == ".star":
        kind, found = stars.read(stars.chosen(read_star(path), block, tomogram))
    else:
        raise UserError(
            f"{path}: which program wrote this list is not known; give a .star file (RELION, Warp, M, "
            "pytom-match-pick, STOPGAP, ArtiaX), a Dynamo .tbl, a PyTom .xml or an .ndjson of the CZ portal"
        )
    count = len(found["position"])
    if count == 0:
        raise UserError(f"{path}: the list has no particles; give another one")
    empty: dict[str, Any] = {
        "unit": "voxels",
        "tomogram": np.full(count, "", object),
        "shift": np.zeros((count, 3)),
        "score": np.full(count, np.nan),
        "half": np.zeros(count, np.int64),
    }
    return ParticleList(path, kind, **{**empty, **found})
