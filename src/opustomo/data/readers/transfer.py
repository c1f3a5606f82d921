"""Owns: the choice of transfer function: per-particle CTF STAR or table, else CTF or weight volume, else an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opustomo.data.findings import span
from opustomo.data.mrc import read_volume
from opustomo.data.particles import TILT_COLUMNS, Transfer
from opustomo.data.readers import relion
from opustomo.data.readers.ctf_star import read_tilts
from opustomo.data.readers.ctf_volume import OF_RELION4, half_fourier
from opustomo.data.readers.dialect import Opened
from opustomo.data.readers.files import Absent, Locator
from opustomo.data.star import StarFile
from opustomo.errors import UserError

_TABLES = {".star": "CTF STAR files", ".csv": "CTF tables (CSV) of Warp"}
_NO_NAME = {"", "None", "none", "null", "<NA>", "nan"}


class TransferFunctions(NamedTuple):
    """The transfer part of ``Particles``: same fields, plus a note."""

    transfer: Transfer
    ctf_files: tuple[Path, ...]
    tilts: NDArray[np.float64]
    tilt_offsets: NDArray[np.int64]
    note: str


def find_transfer(opened: Opened) -> TransferFunctions:
    """Transfer functions of P particles that are subtomograms.

    A per-particle CTF STAR (rlnCtfImage with extension .star, or ``*_ctf.star`` beside the subtomogram) wins over
    a CTF table (the same with .csv), and both over the volume named by rlnCtfImage.
    UserError: particle without CTF, missing files, all tilts excluded.
    """
    star, images, locator = opened.source.table, opened.images, opened.locator
    names = _ctf_names(star)
    tables = find_tables(star, images, locator, opened.absent)
    if tables is not None:
        return _from_tables(opened, *tables)
    if names is None:
        raise UserError(
            f"{star.path}: particle without CTF: there is no column _rlnCtfImage and no *_ctf.star beside the "
            f"subtomograms ({images[0]}); add the column, or write CTF STARs with relion_prepare_subtomograms; of data "
            "without one the column names a volume, 1 where tilts measure and 0 in the wedge"
        )
    for ending, what in _TABLES.items():
        if locator.present(_named(names, ending)) > locator.present(names):
            locator.require(_named(names, ending), what)
    return _from_volumes(opened, locator.require(names, "CTF volumes", opened.absent))


def _ctf_names(star: StarFile) -> list[str] | None:
    if not star.has(star.particle_block, "rlnCtfImage"):
        return None
    names = [str(name) for name in star.text(star.particle_block, "rlnCtfImage", "the CTF")]
    for row, name in enumerate(names):
        if name in _NO_NAME:
            raise UserError(
                f"{star.path}: particle without CTF: row {row + 1} ({relion.identities(star)[row]}) has an empty "
                "_rlnCtfImage; name its CTF file or remove the particle"
            )
    return names


def _named(names: Sequence[str], ending: str) -> list[str]:
    return [os.path.splitext(name)[0] + ending for name in names]  # noqa: PTH122


def find_tables(
    star: StarFile, images: Sequence[Path], locator: Locator, absent: Absent = None
) -> tuple[list[str], str] | None:
    """CTF STARs or CTF tables of P particles, ending in .star or .csv, of which ``images`` are the subtomograms.

    absent: particles that need none.
    """
    names = _ctf_names(star)
    for ending in _TABLES:
        if names is not None and (found := locator.find(_named(names, ending), absent)) is not None:
            return found, ending
        beside = [os.path.splitext(image)[0] + "_ctf" + ending for image in images]  # noqa: PTH122
        if locator.all_exist(beside, absent):
            return beside, ending
    return None


def _from_tables(opened: Opened, files: Sequence[str], ending: str) -> TransferFunctions:
    star, absent = opened.source.table, opened.absent
    tilts, offsets = read_tilts(files, list(relion.identities(star)), relion.microscope(star), opened.pack, absent)
    counts = np.delete(np.diff(offsets), sorted(absent or ()))
    note = f"CTF from {len(set(files))} {_TABLES[ending]}, {span(counts.min(), counts.max())} tilts per particle"
    return TransferFunctions("tilts", (), tilts, offsets, note)


def _from_volumes(opened: Opened, files: tuple[Path, ...]) -> TransferFunctions:
    star = opened.source.table
    first = next(path for i, path in enumerate(files) if i not in (opened.absent or ()))
    kind: Transfer = "weight_volume" if relion.premultiplied(star) else "ctf_volume"
    half, layout = half_fourier(read_volume(first)[0], opened.box, first)
    if kind == "ctf_volume" and layout == OF_RELION4:
        raise UserError(
            f"{star.path}: {first.name} holds CTF^2 and multiplicity, so these are CTF-premultiplied "
            "pseudo-subtomograms, but the file does not say so; write 1 in the column _rlnCtfDataAreCtfPremultiplied "
            "(of data_optics if there)"
        )
    what = "weight volumes (data are CTF-premultiplied)" if kind == "weight_volume" else "CTF volumes"
    note = f"CTF from {len(set(files))} {what}: {layout}"
    if kind == "ctf_volume" and half.min() >= 0:
        note += (
            "; nowhere negative, as CTF^2 is: if Warp wrote these with --3d the data are premultiplied, which the "
            "column _rlnCtfDataAreCtfPremultiplied has to say with 1"
        )
    return TransferFunctions(kind, files, np.zeros((0, len(TILT_COLUMNS))), np.zeros(1, np.int64), note)
