"""Per-particle CTF STAR files: one row per tilt, any number of tilts per particle.

Owns: the reading of these files (and of CTF tables of other programs), and the one file in which they are kept packed,
since a hundred thousand small files take far longer to parse than everything else at the start.
Such files are written by RELION's ``relion_prepare_subtomograms`` and by Warp 1; the angles are RELION's (the script
inverts the stage tilt), so that (u, v, distance) = R_t k.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from opustomo.data.atomic import atomic
from opustomo.data.particles import SCALE, TILT_COLUMNS, offsets_of
from opustomo.data.readers.ctf_csv import read_ctf_csv
from opustomo.data.readers.files import Absent
from opustomo.data.readers.tilts import COLUMNS, ImpossibleValue, tilt_table
from opustomo.data.star import read_numeric_table
from opustomo.errors import UserError

_PACK_FORMAT = 1
PACK_FROM = 500  # files: fewer are parsed in a tenth of a second

Packed = tuple[NDArray[np.float64], NDArray[np.int64]]


def read_tilts(
    files: Sequence[str], names: Sequence[str], microscope: Mapping[str, float], pack: Path | None = None,
    absent: Absent = None,
) -> Packed:  # fmt: skip
    """Tilts of P particles, packed: rows (T, 13) of TILT_COLUMNS and offsets (P + 1,).

    files, names: P CTF STARs, or CTF tables ending in .csv (one shared by many particles is parsed once), and particle
    names for messages.
    microscope: rlnVoltage, rlnSphericalAberration, rlnAmplitudeContrast from the optics table, used when a file has
    no such column.  B-factors become >= 0 (RELION's script writes +4 x dose, Warp 1 -4 x dose; both damp).
    pack: a file that keeps the result; while every CTF STAR has the path, size and time of change it had then, the rows
    are mapped from there (read-only) and no CTF STAR is opened.
    absent: particles that get no tilts, their files are not opened; None: every particle has to be sound.
    UserError: damaged file, column missing, every tilt of a particle excluded (scale 0; only with ``absent`` None).
    """
    opened = [path for i, path in enumerate(files) if i not in (absent or ())]
    pack = pack if len(set(opened)) >= PACK_FROM else None
    mark = _mark(opened, microscope) if pack is not None else np.zeros(0, np.uint8)
    if pack is not None and (stored := _unpack(pack, mark)) is not None:
        return stored
    known: dict[str, NDArray[np.float64]] = {}
    nothing = np.zeros((0, len(TILT_COLUMNS)))
    for i, (path, name) in enumerate(zip(files, names, strict=True)):
        if path not in known and i not in (absent or ()):
            known[path] = _tilts(Path(path), microscope)
            if absent is None and not known[path][:, SCALE].any():
                raise UserError(
                    f"{path}: all {len(known[path])} tilts of particle {name} are excluded (scale 0); "
                    "remove the particle from the STAR file or restore some tilts"
                )
    tables = [known.get(path, nothing) for path in files]
    tilts, offsets = np.concatenate(tables), offsets_of([len(table) for table in tables])
    if pack is not None:
        with atomic(pack) as temporary, temporary.open("wb") as handle:
            for array in (mark, offsets, tilts):
                np.save(handle, array)
    return tilts, offsets


def _mark(files: Sequence[str], microscope: Mapping[str, float]) -> NDArray[np.uint8]:
    """What the packed rows depend on, as one hash: the CTF STARs by path, size and time of change."""
    digest = hashlib.sha256(repr((_PACK_FORMAT, TILT_COLUMNS, sorted(microscope.items()))).encode())
    for path in files:
        status = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for every particle at every start
        digest.update(f"{path}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return np.frombuffer(digest.digest(), np.uint8)


def _unpack(pack: Path, mark: NDArray[np.uint8]) -> Packed | None:
    """Rows and offsets of a packed file, or None where there is none for these CTF STARs."""
    try:
        with pack.open("rb") as handle:
            stored = np.load(handle, allow_pickle=False)
            if not np.array_equal(stored, mark):
                return None
            offsets = np.load(handle, allow_pickle=False)
            shape = _header(handle)
            if offsets.ndim != 1 or shape != (offsets[-1], len(TILT_COLUMNS)):
                return None
            return np.memmap(pack, np.float64, "r", handle.tell(), shape), offsets
    except (OSError, ValueError, EOFError):
        return None


def _header(handle: BinaryIO) -> tuple[int, ...]:
    """Shape of the float64 array that begins here; the data follow."""
    np.lib.format.read_magic(handle)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
    if fortran or dtype != np.float64:
        raise ValueError("not the rows of tilts")
    return shape


def _tilts(path: Path, microscope: Mapping[str, float]) -> NDArray[np.float64]:
    if path.suffix == ".csv":
        try:
            return tilt_table(read_ctf_csv(path), microscope, path)
        except ImpossibleValue as error:
            raise UserError(f"{error} (converted from Warp's metres, volts and radians)") from None
    return tilt_table(read_numeric_table(path, "images", tuple(COLUMNS)), microscope, path)
