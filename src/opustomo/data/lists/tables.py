"""Particle lists that are no STAR files: Dynamo tables, PyTom XML, ndjson of the CZ cryoET data portal.

Owns: their fields and angles, all in voxels of the tomogram they were made in.
Dynamo turns the particle onto the reference by tdrot about z, tilt about x, narot about z, fixed axes: ``A`` is the
inverse, ``Rz(-tdrot) Rx(-tilt) Rz(-narot)`` (source: dynamo2m and dyn2rel, which agree).  PyTom turns the reference as
STOPGAP does: ``A = Rz(Z2) Rx(X) Rz(Z1)``.  The portal's matrix is ``A``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from opustomo.data.angles import turned
from opustomo.errors import DAMAGE, UserError, reading

_DYNAMO_COLUMNS = 26  # up to z
LARGEST = 1e7  # of a number that means anything here


def dynamo(path: Path) -> dict[str, Any]:
    """A table: columns 4-6 shift, 7-9 angles, 10 score, 20 tomogram, 24-26 position (counted from 1)."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        if len(words) < _DYNAMO_COLUMNS:
            raise UserError(
                f"{path}: row {number} has {len(words)} columns, x y z are columns 24 to 26; write it again"
            )
        rows.append([_number(word, path, f"row {number}, column {i}") for i, word in enumerate(words[:26], 1)])
    table = np.array(rows, np.float64).reshape(-1, _DYNAMO_COLUMNS)
    return {
        "position": table[:, 23:26] + table[:, 3:6],
        "rotation": turned(table[:, 6:9]).transpose(0, 2, 1),
        "tomogram": np.array([f"{value:g}" for value in table[:, 19]], object),
        "score": table[:, 9],
    }


def pytom(path: Path) -> dict[str, Any]:
    """A ParticleList: PickPosition plus Shift, Rotation, Score; PickPosition's Origin is the tomogram."""
    try:
        particles = list(ElementTree.fromstring(_text(path)).iter("Particle"))
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: is not XML ({error}); write the particle list again") from None

    def values(tag: str, names: str) -> NDArray[np.float64]:
        rows = []
        for number, particle in enumerate(particles, 1):
            node = particle.find(tag)
            if node is None:
                raise UserError(f"{path}: particle {number} has no <{tag}>; write the particle list again")
            where = f"particle {number}, <{tag}>"
            rows.append([_number(node.get(name, ""), path, f"{where} {name}") for name in names.split()])
        return np.array(rows, np.float64).reshape(len(particles), len(names.split()))

    # of XML a name may hold any space, a STAR file no end of a line
    picks = [particle.find("PickPosition") for particle in particles]
    tomograms = ["" if pick is None else " ".join(pick.get("Origin", "").split()) for pick in picks]
    scores = [node.get("Value") if (node := particle.find("Score")) is not None else None for particle in particles]
    return {
        "position": values("PickPosition", "X Y Z") + values("Shift", "X Y Z"),
        "rotation": turned(values("Rotation", "Z1 X Z2")),
        "tomogram": np.array(tomograms, object),
        "score": np.array([np.nan if s is None else _number(s, path, "<Score> Value", np.inf) for s in scores]),
    }


def ndjson(path: Path) -> dict[str, Any]:
    """One JSON object a line: location, and xyz_rotation_matrix where the points have orientations."""
    position, rotation = [], []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
            place = [float(point["location"][axis]) for axis in "xyz"]
            matrix = np.array(point.get("xyz_rotation_matrix", np.eye(3)), np.float64)
        except DAMAGE as error:
            raise UserError(
                f"{path}: line {number} is no point with a location x, y, z "
                f"({type(error).__name__}: {str(error)[:80]}); give the annotation's ndjson"
            ) from None
        possible = matrix.shape == (3, 3) and (np.abs(matrix) < 2).all()
        turn = possible and np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-2) and np.linalg.det(matrix) > 0
        if not turn or not (np.abs(place) < LARGEST).all():
            raise UserError(
                f"{path}: line {number}: xyz_rotation_matrix is no rotation, or the location not possible; correct it"
            )
        position.append(place)
        rotation.append(matrix)
    return {"position": np.array(position).reshape(-1, 3), "rotation": np.array(rotation).reshape(-1, 3, 3)}


def _text(path: Path) -> str:
    with reading(path, "give a particle list"):
        return path.read_text(encoding="utf-8")


def _number(word: str, path: Path, where: str, limit: float = LARGEST) -> float:
    try:
        value = float(word)
    except ValueError:
        value = np.nan
    if not abs(value) < limit:
        raise UserError(f"{path}: {where}: {word!r} is not a number that is possible here; correct it")
    return value
