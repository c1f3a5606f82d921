"""Tilts from columns: what RELION calls an image's angles and CTF, and what stands in for a column that is not there.

Owns: the way from these columns, of whatever file, to the rows of ``Particles.tilts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.particles import TILT_COLUMNS
from opustomo.errors import UserError

# In the order of TILT_COLUMNS but the last, the dose, which is no column of theirs; a number is the value taken when
# the column is absent, None means it is needed.
COLUMNS: dict[str, float | None] = {
    "rlnAngleRot": 0.0,
    "rlnAngleTilt": None,
    "rlnAnglePsi": 0.0,
    "rlnDefocusU": None,
    "rlnDefocusV": None,
    "rlnDefocusAngle": 0.0,
    "rlnVoltage": None,
    "rlnSphericalAberration": None,
    "rlnAmplitudeContrast": None,
    "rlnPhaseShift": 0.0,
    "rlnCtfBfactor": 0.0,
    "rlnCtfScalefactor": 1.0,
}
_BFACTOR = TILT_COLUMNS.index("bfactor")


class ImpossibleValue(UserError):
    """A value without a CTF."""


def tilt_table(
    found: Mapping[str, NDArray[np.float64]], microscope: Mapping[str, float], path: Path
) -> NDArray[np.float64]:
    """Rows (T, 13) of TILT_COLUMNS from the columns of a file, each (T,), and perhaps "dose"; others are not looked at.

    UserError naming ``path``: column missing, value without a CTF.
    """
    rows = len(next(iter(found.values()))) if found else 0
    columns = []
    for name, default in COLUMNS.items():
        value = found.get(name)
        if value is None and name == "rlnDefocusV":
            value = found.get("rlnDefocusU")
        if value is None:
            constant = microscope.get(name, default)
            if constant is None:
                raise UserError(
                    f"{path}: has no column _{name}, needed for the CTF of every tilt; add it "
                    "(RELION's relion_prepare_subtomograms writes it)"
                )
            value = np.full(rows, constant)
        columns.append(value)
    table = np.stack([*columns, found.get("dose", np.zeros(rows))], 1)
    table[:, _BFACTOR] = np.abs(table[:, _BFACTOR])
    _refuse_impossible(path, table)
    return table


def _refuse_impossible(path: Path, table: NDArray[np.float64]) -> None:
    """Values without a CTF: they would turn into NaN far from here."""
    for name, good, hint in (
        ("rlnVoltage", lambda v: (v > 0) & (v < 1e4), "write kV, e.g. 300"),
        ("rlnAmplitudeContrast", lambda v: (v >= 0) & (v < 1), "write a fraction, e.g. 0.07"),
        ("rlnDefocusU", lambda v: np.abs(v) < 1e6, "write Angstrom, e.g. 30000"),
        ("rlnDefocusV", lambda v: np.abs(v) < 1e6, "write Angstrom, e.g. 30000"),
        ("rlnSphericalAberration", lambda v: np.abs(v) < 1e3, "write mm, e.g. 2.7"),
        ("rlnCtfBfactor", lambda v: v < 1e6, "write Angstrom^2, four times the dose"),
        ("rlnCtfScalefactor", lambda v: np.abs(v) < 1e6, "write the cosine of the tilt angle"),
        *((name, lambda v: np.abs(v) < 1e6, "write degrees") for name in COLUMNS if "Angle" in name),
        ("rlnPhaseShift", lambda v: np.abs(v) < 1e6, "write degrees"),
    ):
        values = table[:, list(COLUMNS).index(name)]
        wrong = np.flatnonzero(~good(values))
        if len(wrong):
            raise ImpossibleValue(f"{path}: tilt {wrong[0] + 1}: _{name} {values[wrong[0]]:g} is not possible; {hint}")
