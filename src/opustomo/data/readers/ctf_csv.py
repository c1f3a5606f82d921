"""Per-particle CTF tables (CSV) of the Warp fork that exports subtomograms without CTF correction.

Owns: the columns of these files, ``WarpTools ts_export_particles --3d --output_ctf_csv``, and their units, which are SI
with Warp's signs: defocus and B-factor negative.  Warp's tilt angle has RELION's sign.  Source: the format's table in
the project's notes, where astigmatism and B-factor are converted as OPUS-TOMO converts them.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.mrc import LARGEST
from opustomo.errors import UserError, reading

_FIX = "export the particle again with --output_ctf_csv"
_COLUMNS = (
    "TiltAngle", "Defocus", "Voltage", "Cs", "Amplitude", "Bfactor", "Scale", "DefocusDelta", "AstigmatismAngle",
)  # fmt: skip


def read_ctf_csv(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a CTF STAR (see ``tilts.tilt_table``), each (T,), of a particle's T tilts.

    UserError: damaged file, column missing, value that is not a number.
    """
    with reading(path, _FIX):
        lines = [[word.strip() for word in row] for row in csv.reader(path.read_text(encoding="utf-8").splitlines())]
    header, *rows = [row for row in lines if any(row)] or [[]]
    if absent := [name for name in _COLUMNS if name not in header]:
        raise UserError(f"{path}: has no column {absent[0]}, needed for the CTF of every tilt; {_FIX}")
    if not rows:
        raise UserError(f"{path}: has no tilts; {_FIX}")
    for number, row in enumerate(rows, 1):
        if len(row) < len(header) or any(row[len(header) :]):
            raise UserError(f"{path}: tilt {number} has {len(row)} values for {len(header)} columns; {_FIX}")
    found = {name: _numbers([row[header.index(name)] for row in rows], name, path) for name in _COLUMNS}
    defocus, delta = -1e10 * found["Defocus"], -1e10 * found["DefocusDelta"]
    return {
        "rlnAngleTilt": found["TiltAngle"],
        "rlnDefocusU": defocus + delta,
        "rlnDefocusV": defocus - delta,
        "rlnDefocusAngle": np.rad2deg(found["AstigmatismAngle"]),
        "rlnVoltage": found["Voltage"] * 1e-3,
        "rlnSphericalAberration": found["Cs"] * 1e3,
        "rlnAmplitudeContrast": found["Amplitude"],
        "rlnCtfBfactor": -0.25e20 * found["Bfactor"],
        "rlnCtfScalefactor": found["Scale"],
    }


def _numbers(words: list[str], name: str, path: Path) -> NDArray[np.float64]:
    for number, word in enumerate(words, 1):
        try:
            good = abs(float(word)) < LARGEST  # not NaN either
        except ValueError:
            good = False
        if not good:
            raise UserError(f"{path}: column {name}, tilt {number}: {word!r} is not a number; {_FIX}")
    return np.array(words, np.float64)
