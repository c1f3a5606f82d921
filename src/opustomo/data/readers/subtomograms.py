"""3-D subtomograms: RELION 3.0 and 3.1, Warp, and the pseudo-subtomograms of RELION 4.

Owns: that poses are those of the file and the transfer function that of ``transfer``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opustomo.data.angles import to_matrix
from opustomo.data.readers import relion
from opustomo.data.readers.dialect import Imaging, Opened, Poses
from opustomo.data.readers.source import Source
from opustomo.data.readers.transfer import find_transfer
from opustomo.errors import UserError


def image_files(source: Source) -> list[str]:
    """(P,) subtomogram of each particle, as the file names it."""
    return [str(name) for name in relion.image_names(source.table)]


def read(opened: Opened) -> Imaging:
    """Poses and transfer functions.  UserError: columns or CTFs missing, CTF STARs for premultiplied data."""
    table = opened.source.table
    found = poses(opened.source, opened.pixel_size)
    transfer = find_transfer(opened)
    if transfer.transfer == "tilts" and relion.premultiplied(table):
        raise UserError(
            f"{table.path}: rlnCtfDataAreCtfPremultiplied is 1 but the CTF comes from CTF files of each particle: it "
            "would be applied twice; give the weight volumes in rlnCtfImage (move the CTF files away), or set it "
            "to 0"
        )
    return Imaging(found.euler, found.rotation, found.origin, *transfer[:4], notes=(found.note, transfer.note))


def poses(source: Source, pixel_size: float) -> Poses:
    """Poses as the file has them: those of the average in the subtomogram's own frame."""
    euler = relion.eulers(source.table)
    origin, note = relion.origins(source.table, pixel_size)
    return Poses(euler, to_matrix(euler), origin, note)


def poses_in_file(
    source: Source, pixel_size: float, euler: NDArray[np.float64], origin: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As they are."""
    return euler, origin
