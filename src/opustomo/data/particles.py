"""The particle table: everything the rest of the program knows about a data set.

Owns: one row per particle in file order, in one set of units (pixels, degrees, Angstrom), whatever the
dialect it was read from.  Readers make it; nothing else names a STAR column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from opustomo.errors import UserError

if TYPE_CHECKING:
    from opustomo.data.star import StarFile

# Columns of ``Particles.tilts``, one row per tilt image of one particle.  Angles in degrees, defocus in
# Angstrom (underfocus positive), voltage in kV, Cs in mm, B-factor in Angstrom^2 (>= 0, damping), scale as in
# the file (0 = excluded tilt), dose in electrons per square Angstrom where the dose filter damps (else 0).
# (rot, tilt, psi) is RELION's ZYZ of the tilt: (u, v, distance) = R_t k.
TILT_COLUMNS = (
    "rot", "tilt", "psi", "defocus_u", "defocus_v", "defocus_angle", "voltage", "cs", "amplitude",
    "phase_shift", "bfactor", "scale", "dose",
)  # fmt: skip

SCALE = TILT_COLUMNS.index("scale")

Transfer = Literal["tilts", "ctf_volume", "weight_volume"]


@dataclass(frozen=True)
class Particles:
    """Subtomograms, or stacks of tilt images, with poses and transfer functions (P particles).

    ``rotation`` is A of METHOD section 2, ``x_particle = A x_consensus`` on (x, y, z) vectors; ``origin`` is in
    pixels of the subtomogram, (x, y, z): the particle's centre lies at ``N//2 - origin``.

    A stack has ``slices``: of each row of ``tilts`` the image in the particle's file (from 0); none for subtomograms.
    Its images are ``c_t P_t V``, for premultiplied ones ``c_t^2 P_t V``, with R_t of the tilt's row; the particle's
    centre lies there at ``N//2 - (R_t origin)[u, v] - tilt_shifts``.
    """

    source: Path  # the STAR file read
    dialect: str  # e.g. "RELION 3.0", "RELION 3.1"
    star: StarFile  # the table that was read, with the rows of all particles in it: for what checks look up
    names: NDArray[np.object_]  # (P,) identity of each particle within the file
    image_files: tuple[Path, ...]  # (P,) absolute paths of the subtomograms
    ctf_files: tuple[Path, ...]  # (P,) absolute paths of CTF / weight volumes, () when tilts are known
    euler: NDArray[np.float64]  # (P, 3) rot, tilt, psi in degrees
    rotation: NDArray[np.float64]  # (P, 3, 3)
    origin: NDArray[np.float64]  # (P, 3) pixels
    coordinates: NDArray[np.float64] | None  # (P, 3) as in the file
    tomogram: NDArray[np.object_]  # (P,) name of the tomogram, "" when unknown
    half: NDArray[np.int64]  # (P,) 1 or 2, 0 when the file has no random subset
    box: int  # N, even
    pixel_size: float  # a0, Angstrom
    transfer: Transfer
    premultiplied: bool
    tilts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(TILT_COLUMNS))))
    tilt_offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))  # (P + 1,)
    slices: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # (rows of tilts,) or (0,)
    tilt_shifts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))  # (rows of tilts, 2) or (0, 2)
    notes: tuple[str, ...] = ()  # what the reader decided and how it knows, for check and the log
    # --damaged skip: why particles, by name, cannot be used, as far as they were looked at; None: such a one stops
    faults: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.image_files)

    @property
    def stacks(self) -> bool:
        """Whether the particles are stacks of tilt images."""
        return len(self.slices) > 0

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(P,) particles of which no fault is known."""
        return np.array([name not in (self.faults or {}) for name in self.names], bool)

    @contextmanager
    def looking_at(self, i: int) -> Iterator[None]:
        """A UserError in the block says that particle i cannot be used: noted, or raised where that is to stop."""
        try:
            yield
        except UserError as error:
            if self.faults is None:
                raise UserError(
                    f"{error} (row {i + 1} of {len(self)}); --damaged skip goes on without such particles, --ind of "
                    "train leaves rows out"
                ) from None
            self.faults[self.names[i]] = str(error)

    def tilt_index(self, i: int) -> NDArray[np.int64]:
        """(T_i,) rows of ``tilts`` of particle i; excluded tilts (scale 0) are left out."""
        rows = np.arange(self.tilt_offsets[i], self.tilt_offsets[i + 1])
        return rows[self.tilts[rows, SCALE] != 0]

    def tilts_of(self, i: int) -> NDArray[np.float64]:
        """(T_i, 13) tilt rows of particle i; excluded tilts (scale 0) are left out."""
        return self.tilts[self.tilt_index(i)]

    def subset(self, index: NDArray[np.int64]) -> Particles:
        """The particles at ``index`` (integers, any order); the source table is kept whole."""
        index = np.asarray(index, np.int64)
        rows, offsets = np.arange(len(self.tilts)), np.zeros(1, np.int64)
        if self.transfer == "tilts":
            offsets = offsets_of(np.diff(self.tilt_offsets)[index])
            chosen = [np.arange(self.tilt_offsets[i], self.tilt_offsets[i + 1]) for i in index]
            rows = np.concatenate([rows[:0], *chosen])
        return replace(
            self,
            names=self.names[index],
            image_files=tuple(self.image_files[i] for i in index),
            ctf_files=tuple(self.ctf_files[i] for i in index) if self.ctf_files else (),
            euler=self.euler[index],
            rotation=self.rotation[index],
            origin=self.origin[index],
            coordinates=None if self.coordinates is None else self.coordinates[index],
            tomogram=self.tomogram[index],
            half=self.half[index],
            tilts=self.tilts[rows],
            tilt_offsets=offsets,
            slices=self.slices[rows] if self.stacks else self.slices,
            tilt_shifts=self.tilt_shifts[rows] if self.stacks else self.tilt_shifts,
        )

    def within(self, limit: float) -> Particles:
        """The same with tilts further than ``limit`` degrees from 0 excluded; UserError: tilts not known, none left."""
        if not 0 <= limit <= 90:
            raise UserError(f"--tilt-limit {limit:g}: give degrees, 0 to 90")
        if self.transfer != "tilts":
            raise UserError(
                f"--tilt-limit {limit:g}: the CTFs of {self.source} are volumes, which do not tell tilts apart; leave "
                "it out"
            )
        tilts = np.array(self.tilts)
        # an image seen from behind is the same projection
        angle = np.rad2deg(np.arcsin(np.abs(np.sin(np.deg2rad(tilts[:, TILT_COLUMNS.index("tilt")])))))
        beyond = (angle > limit) & (tilts[:, SCALE] != 0)
        tilts[beyond, SCALE] = 0
        kept = np.diff(offsets_of(tilts[:, SCALE] != 0)[self.tilt_offsets])
        if self.faults is None and (kept == 0).any():  # else they are told with the damaged ones
            name = self.names[kept.argmin()]
            raise UserError(f"--tilt-limit {limit:g}: leaves particle {name} of {self.source} no tilt; give more")
        note = f"{beyond.sum()} of {len(beyond)} tilts are further than --tilt-limit {limit:g} from 0 and left out"
        return replace(self, tilts=tilts, notes=(*self.notes, note))


def offsets_of(counts: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """(P + 1,) where the rows of each particle begin and end, from (P,) how many there are of each."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def refuse_most(count: int, looked_at: int, star: Path, faults: dict[str, str] | None) -> None:
    """UserError where more than half of the particles looked at cannot be used: that is a mistake, no accident."""
    if 2 * count > looked_at:
        first = next(iter((faults or {}).values()), "")
        raise UserError(f"{star}: {count} of {looked_at} particles looked at cannot be used, too many to skip: {first}")


def particle_numbers(names: Iterable[object]) -> NDArray[np.int64]:
    """(rows,) which particle each row is of, in order of appearance: 0, 1, 2, ... unless there are copies (``expand``).

    Copies of a particle share its noise: what must be independent (halves, held-out particles) goes by this number.
    """
    import pandas as pd  # a third of a second: verbs that look at finished runs do without

    return pd.factorize(np.fromiter(names, object), use_na_sentinel=False)[0].astype(np.int64)


def turn_of_each(names: Iterable[object]) -> NDArray[np.int64]:
    """(rows,) how often a row's name has been there before: 0 unless there are copies, which are 1, 2, ..."""
    number = particle_numbers(names)
    order = np.argsort(number, kind="stable")
    begins = offsets_of(np.bincount(number))  # of the rows of each name, in that order
    turn = np.zeros(len(number), np.int64)
    turn[order] = np.arange(len(number)) - begins[number[order]]
    return turn
