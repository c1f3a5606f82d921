"""What a dialect is to the rest of the program: four functions of one module, and what they are given and hand over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from opustomo.config import InputOptions
from opustomo.data.particles import TILT_COLUMNS, Transfer
from opustomo.data.readers.files import Absent, Locator
from opustomo.data.readers.source import Source


@dataclass(frozen=True)
class Opened:
    """A set of P particles whose table and files were found, and whose sizes agree: what a reader is given."""

    source: Source
    options: InputOptions
    locator: Locator  # of the files that the table names
    images: tuple[Path, ...]  # (P,) file of each particle
    absent: Absent  # particles without a file (``--damaged skip``); None (``stop``): every particle has to be sound
    readable: Sequence[Path]  # those of ``images`` that can be looked into: all of them with ``--damaged stop``
    box: int  # N
    pixel_size: float  # Angstrom, of the voxels or pixels in those files
    pack: Path | None  # a file that keeps the tilts of per-particle CTF STARs (see ``ctf_star.read_tilts``)


class Poses(NamedTuple):
    """Poses of P particles as ``Particles`` has them: degrees, A of METHOD section 2, pixels; a note for the user."""

    euler: NDArray[np.float64]  # (P, 3)
    rotation: NDArray[np.float64]  # (P, 3, 3)
    origin: NDArray[np.float64]  # (P, 3)
    note: str


class Imaging(NamedTuple):
    """Poses and transfer functions of P particles: what a reader hands over, fields of ``Particles`` in its units."""

    euler: NDArray[np.float64]
    rotation: NDArray[np.float64]
    origin: NDArray[np.float64]
    transfer: Transfer
    ctf_files: tuple[Path, ...] = ()
    tilts: NDArray[np.float64] = np.zeros((0, len(TILT_COLUMNS)))
    tilt_offsets: NDArray[np.int64] = np.zeros(1, np.int64)
    slices: NDArray[np.int64] = np.zeros(0, np.int64)
    tilt_shifts: NDArray[np.float64] = np.zeros((0, 2))
    notes: tuple[str, ...] = ()


class Dialect(Protocol):
    """A module that reads one dialect.  Everything in it raises UserError for what the user can mend."""

    def image_files(self, source: Source) -> list[str]:
        """(P,) file of each particle, as the table names it."""

    def read(self, opened: Opened) -> Imaging:
        """Poses and transfer functions."""

    def poses(self, source: Source, pixel_size: float) -> Poses:
        """The poses that ``read`` finds, from the tables alone; origins in pixels of ``pixel_size`` Angstrom."""

    def poses_in_file(
        self, source: Source, pixel_size: float, euler: NDArray[np.float64], origin: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The way back: Euler angles and origins of every row of the file where its particles have these, (P, 3) each.

        The rows are in the order of ``Source.rows_of``; origins are still pixels.
        """
