"""Classes back in their tomograms: scripts for ChimeraX that need nothing but the files beside them.

Owns: the commands of these scripts.  A map's own coordinates are Angstrom, the middle of the average's box at
``centre`` on each axis (its header's origin sees to that), so its 3 x 4 matrix is ``[A | place - A centre]``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.atomic import atomic, write_text
from opustomo.data.mrc import read_volume
from opustomo.data.places import Places, tomogram_key

# of the classes in turn, easy to tell apart
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#7f7f7f")
_LEVEL = 3.0  # surfaces at this many times the map's root mean square


def write_scripts(
    folder: Path,
    places: Places,
    labels: NDArray[np.int64],
    maps: Mapping[int, Path],
    centre: float,
    radius: float,
) -> list[Path]:
    """Write ``folder``/TOMOGRAM.cxc for every tomogram of P particles; returns the scripts.

    labels: (P,) class, 0-based.  maps: a map for every class, copied into the folder; none: coloured markers
    (TOMOGRAM.cmm) of ``radius`` Angstrom.  centre: Angstrom, voxel N//2 of the consensus map from its voxel 0, over
    which the headers lay the maps.  UserError: cannot be written.
    """
    levels = {label: _copy(path, folder / _map_name(label)) for label, path in maps.items()}
    names = {name: _safe(tomogram_key(str(name))) for name in places.tomogram}
    if len(set(names.values())) < len(names):  # equal names in different folders
        names = {name: f"{number}_{shown}" for number, (name, shown) in enumerate(names.items(), 1)}
    scripts = []
    for name, shown in names.items():
        index = np.flatnonzero(places.tomogram == name)
        index = index[np.argsort(labels[index], kind="stable")]
        path = folder / f"{shown}.cxc"
        here, classes = places.at(index), labels[index]
        if levels:
            commands = _volumes(here, classes, levels, centre)
        else:
            write_text(path.with_suffix(".cmm"), _markers(here, classes, radius))
            commands = [f'open "{path.with_suffix(".cmm").name}"']
        head = [
            f"# {len(index)} particles in {shown}; open this file in ChimeraX, then the tomogram (first voxel at 0)",
            "close session",
        ]
        write_text(path, "\n".join([*head, *commands, "view orient"]) + "\n")
        scripts.append(path)
    return scripts


def _safe(name: str) -> str:
    """A name that is neither a path nor a command."""
    return re.sub(r"[^\w.+-]", "_", name)


def _map_name(label: int) -> str:
    return f"class{label}.mrc"


def _copy(old: Path, new: Path) -> float:
    """Copy a map with its header; the level to show it at."""
    volume, _ = read_volume(old)
    with atomic(new) as temporary:
        shutil.copyfile(old, temporary)
    return _LEVEL * float(np.sqrt(np.square(volume, dtype=np.float64).mean()))


def _volumes(places: Places, labels: NDArray[np.int64], levels: Mapping[int, float], centre: float) -> list[str]:
    """Commands: models #1, #2, ... are the particles in their order."""
    shift = places.centre - places.rotation @ np.full(3, centre)
    lines = []
    for i, (label, matrix) in enumerate(zip(labels, np.dstack([places.rotation, shift]), strict=True), 1):
        lines.append(f'open "{_map_name(label)}"')
        lines.append(f"view matrix models #{i}," + ",".join(f"{value:.6f}" for value in matrix.ravel()))
    for label in np.unique(labels):
        first, *_, last = [*np.flatnonzero(labels == label) + 1] * 2
        colour = COLOURS[label % len(COLOURS)]
        lines.append(f"volume #{first}-{last} style surface step 1 level {levels[int(label)]:.6g} color {colour}")
    return lines


def _markers(places: Places, labels: NDArray[np.int64], radius: float) -> str:
    """A marker file, the class in the note."""
    rows = []
    for i, (place, label) in enumerate(zip(places.centre, labels, strict=True), 1):
        x, y, z = (f"{value:.3f}" for value in place)
        colour = COLOURS[label % len(COLOURS)]
        r, g, b = (f"{int(colour[at : at + 2], 16) / 255:.3f}" for at in (1, 3, 5))
        rows.append(
            f'<marker id="{i}" x="{x}" y="{y}" z="{z}" r="{r}" g="{g}" b="{b}" radius="{radius:.3f}" '
            f'note="class {label}"/>'
        )
    return "\n".join(['<marker_set name="particles">', *rows, "</marker_set>"]) + "\n"
