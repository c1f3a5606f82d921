"""Particle lists in STAR files: RELION and all that write its columns, M, pytom-match-pick, STOPGAP.

Owns: their columns, units and angles.  M and pytom-match-pick have RELION's angles.  STOPGAP turns the reference by phi
about z, the about x, psi about z, fixed axes: ``A = Rz(psi) Rx(the) Rz(phi)``; shifts are added.  Source of the latter:
the reader of the CZ cryoET data portal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opustomo.data.angles import to_matrix, turned
from opustomo.data.lists.tables import LARGEST
from opustomo.data.readers import relion
from opustomo.data.star import StarFile
from opustomo.errors import UserError

_STOPGAP = "stopgap_motivelist"
_PURPOSE = "placing the particles"


def read(star: StarFile) -> tuple[str, dict[str, Any]]:
    """The program and the fields of ``ParticleList``; UserError where the file has no coordinates."""
    if _STOPGAP in star.blocks:
        return "STOPGAP", _stopgap(star)
    block = star.particle_block
    for suffix in ("1", ""):  # M numbers its columns where poses change in time
        if star.has(block, f"wrpCoordinateX{suffix}"):
            return "M", _m(star, suffix)
    if star.has(block, "ptmCoordinateX"):
        return "pytom-match-pick", _match_pick(star, "ptm")
    if star.has(block, "rlnLCCmax"):
        return "pytom-match-pick", _match_pick(star, "rln")
    return "RELION", _relion(star)


def chosen(star: StarFile, block: str | None, tomogram: str | None) -> StarFile:
    """The file with the table ``block`` as that of its particles, and the column ``tomogram`` as their tomograms."""
    if block is None and tomogram is None:
        return star
    name = star.particle_block if block is None else block.removeprefix("data_")
    table = star.table(name)
    if tomogram is not None:
        table = table.assign(rlnTomoName=star.text(name, tomogram.removeprefix("_"), "telling tomograms apart"))
    optics = {key: value for key, value in star.blocks.items() if key == star.optics_block}
    return StarFile(star.path, {**optics, _STOPGAP if name == _STOPGAP else "particles": table})


def _columns(star: StarFile, names: list[str], block: str | None = None) -> NDArray[np.float64]:
    """(P, 3)"""
    block = star.particle_block if block is None else block
    found = np.stack([star.numbers(block, name, _PURPOSE) for name in names], 1)
    return relion.within(found, LARGEST, star, f"value of {names[0]} and its like", "units")


def _score(star: StarFile, block: str, name: str) -> dict[str, Any]:
    return {"score": star.numbers(block, name, _PURPOSE)} if star.has(block, name) else {}


def _angles(star: StarFile, names: list[str]) -> NDArray[np.float64]:
    """A (P, 3, 3); no turn where the list has no angles."""
    present = [star.has(star.particle_block, name) for name in names]
    if not any(present):
        return np.tile(np.eye(3), (len(star.particles), 1, 1))
    return to_matrix(_columns(star, names))


def _stopgap(star: StarFile) -> dict[str, Any]:
    angles = _columns(star, ["phi", "the", "psi"], _STOPGAP)
    shifts = [f"{axis}_shift" for axis in "xyz"]
    position = _columns(star, [f"orig_{axis}" for axis in "xyz"], _STOPGAP)
    if all(star.has(_STOPGAP, name) for name in shifts):
        position = position + _columns(star, shifts, _STOPGAP)
    fields: dict[str, Any] = {
        "position": position,
        "rotation": turned(angles),
        "tomogram": star.text(_STOPGAP, "tomo_num", "telling tomograms apart"),
    }
    fields |= _score(star, _STOPGAP, "score")
    if star.has(_STOPGAP, "halfset"):
        names = star.text(_STOPGAP, "halfset", "the half sets")
        fields["half"] = np.array([{"A": 1, "B": 2}.get(name, 0) for name in names], np.int64)
    return fields


def _m(star: StarFile, suffix: str) -> dict[str, Any]:
    block = star.particle_block
    fields: dict[str, Any] = {
        "position": _columns(star, [f"wrpCoordinate{axis}{suffix}" for axis in relion.AXES]),
        "unit": "angstrom",
        "rotation": _angles(star, [f"wrpAngle{name}{suffix}" for name in ("Rot", "Tilt", "Psi")]),
        "tomogram": star.text(block, "wrpSourceName", "telling tomograms apart"),
        "half": relion.halves(star, "wrpRandomSubset"),
    }
    if star.has(block, "wrpCoordinateX2"):
        fields["notes"] = ("poses change in time (wrpCoordinateX2 ...): the first ones are used",)
    return fields


def _match_pick(star: StarFile, prefix: str) -> dict[str, Any]:
    block = star.particle_block
    centred = [f"{prefix}CenteredCoordinate{axis}Angst" for axis in relion.AXES]
    plain = [f"{prefix}Coordinate{axis}" for axis in relion.AXES]
    name = f"{prefix}TomoName" if star.has(block, f"{prefix}TomoName") else f"{prefix}MicrographName"
    fields: dict[str, Any] = {
        "position": _columns(star, centred if star.has(block, centred[0]) else plain),
        "unit": "centred" if star.has(block, centred[0]) else "voxels",
        "rotation": _angles(star, [f"{prefix}Angle{angle}" for angle in ("Rot", "Tilt", "Psi")]),
        "tomogram": star.text(block, name, "telling tomograms apart"),
        "pixel_size": relion.constant(star, f"{prefix}DetectorPixelSize"),
    }
    return fields | _score(star, block, f"{prefix}LCCmax")


def _relion(star: StarFile) -> dict[str, Any]:
    block = star.particle_block
    position = relion.coordinates(star)
    if position is None:
        raise UserError(
            f"{star.path}: data_{block} has neither _rlnCoordinateX/Y/Z nor _rlnCenteredCoordinateX/Y/ZAngst, nor "
            "wrpCoordinateX1 or ptmCoordinateX; give the list that says where the particles are"
        )
    fields: dict[str, Any] = {
        "position": position,
        "unit": "voxels" if star.has(block, "rlnCoordinateX") else "centred",
        "rotation": _angles(star, list(relion.ANGLES)),
        "tomogram": relion.tomograms(star),
        "half": relion.halves(star),
        "pixel_size": relion.coordinate_pixel(star),
    }
    fields |= _score(star, block, "rlnAutopickFigureOfMerit")
    pixel = relion.pixel_size(star)
    if pixel is None and not star.has(block, "rlnOriginXAngst") and fields["unit"] == "voxels":
        # nothing says how large the pixels of the origins are: as in lists of ArtiaX, those of the coordinates
        fields["position"] = position - relion.origins(star, 1.0)[0]
        return fields
    size = 1.0 if pixel is None else pixel[0]
    fields["image_pixel"] = None if pixel is None else size
    shift = -relion.origins(star, size)[0] * size
    fields["rotation"], fields["shift"] = relion.in_tomogram(star, fields["rotation"], shift)
    return fields
