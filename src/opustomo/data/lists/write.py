"""Particle lists for other programs: Warp, M, ArtiaX, RELION.

Owns: their columns, and M's way of naming tomograms: by the hash in its data source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.data.angles import to_euler
from opustomo.data.places import Places, tomogram_key
from opustomo.data.star import number_columns, write_star
from opustomo.errors import UserError, reading

Kind = Literal["artiax", "warp", "m", "relion"]


def read_sources(path: Path) -> dict[str, tuple[str, str]]:
    """File name and hash of each tilt series, by ``tomogram_key``, of a data source of M (``.source``).

    UserError: not there, not a data source.
    """
    with reading(path, "give M's data source, NAME.source"):
        try:
            files = ElementTree.fromstring(path.read_bytes()).findall("Files/File")
        except ElementTree.ParseError as error:  # a SyntaxError
            raise ValueError(f"is not XML: {error}") from None
    pairs = [(" ".join(file.get("Name", "").split()), "".join(file.get("Hash", "").split())) for file in files]
    found = {tomogram_key(name): (name, key) for name, key in pairs}
    if not found:
        raise UserError(f"{path}: lists no files (Files/File); give M's data source, NAME.source")
    return found


def write_list(
    path: Path,
    kind: Kind,
    places: Places,
    half: NDArray[np.int64],
    classes: NDArray[np.int64] | None = None,
    sources: Mapping[str, tuple[str, str]] | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write P particles; half (P,): 0 where unknown; classes (P,): 0-based; sources: for M, of ``read_sources``.

    more: further columns.  Coordinates of Warp, ArtiaX and RELION are voxels of ``places.pixel_size``, those of M
    Angstrom; refined shifts are in them.
    UserError: a tomogram that M's data source does not have.
    """
    angles = to_euler(places.rotation)
    prefix, number, unit = ("wrp", "1", 1.0) if kind == "m" else ("rln", "", places.pixel_size)
    columns: dict[str, object] = {}
    keys = [tomogram_key(str(name)) for name in places.tomogram]
    if kind in ("artiax", "relion"):
        columns["rlnTomoName" if kind == "artiax" else "rlnMicrographName"] = list(places.tomogram)
    columns |= number_columns([f"{prefix}Coordinate{axis}{number}" for axis in "XYZ"], places.centre / unit, 5)
    if kind in ("artiax", "relion"):
        columns |= number_columns([f"rlnOrigin{axis}" for axis in "XYZ"], np.zeros_like(places.centre), 5)
    columns |= number_columns([f"{prefix}Angle{angle}{number}" for angle in ("Rot", "Tilt", "Psi")], angles, 5)
    if kind == "m":
        columns |= _of_m(keys, half, sources or {})
    else:
        if kind == "warp":
            columns["rlnMicrographName"] = [f"{key}.tomostar" for key in keys]
        if (half > 0).any():
            columns["rlnRandomSubset"] = [str(value) for value in half]
        if classes is not None:
            columns["rlnClassNumber"] = [str(value + 1) for value in classes]
    columns |= dict(more or {})
    write_star(path, {"particles" if kind == "artiax" else "": pd.DataFrame(columns)})


def _of_m(keys: Sequence[str], half: NDArray[np.int64], sources: Mapping[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Half sets, of which M always has two, and tilt series as M names them."""
    if missing := [key for key in keys if key not in sources]:
        raise UserError(
            f"--m-source: has no tilt series {missing[0]} (it has {', '.join(list(sources)[:3])} ...); give the "
            "data source that the particles come from"
        )
    return {
        "wrpRandomSubset": [str(value) for value in np.where(half > 0, half, 1 + np.arange(len(half)) % 2)],
        "wrpSourceName": [sources[key][0] for key in keys],
        "wrpSourceHash": [sources[key][1] for key in keys],
    }
