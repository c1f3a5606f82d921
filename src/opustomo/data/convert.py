"""Particle lists of one program as those of another, one tomogram or all.

Owns: what the converters of ``dsdsh`` do: which rows belong to a tomogram, in which voxels positions are counted, and
RELION 3.1 tables as 3.0.  The dialects themselves are read and written in ``data.lists``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.data.lists import ParticleList, read_list
from opustomo.data.lists.write import Kind, write_list
from opustomo.data.particles import particle_numbers, turn_of_each
from opustomo.data.places import Places, begins, tomogram_key
from opustomo.data.readers import relion
from opustomo.data.readers.sampling import differ
from opustomo.data.star import StarFile, number_columns, read_star, write_star
from opustomo.errors import UserError

_OPTICS_ALONE = ("rlnOpticsGroup", "rlnOpticsGroupName")
_PIXELS = ("rlnImagePixelSize", "rlnMicrographPixelSize", "rlnPixelSize")


def rows_of_tomogram(particles: ParticleList, name: str) -> NDArray[np.int64]:
    """Rows of the particles of one tomogram, by its name without folders and endings.

    The exact name, else the one that begins with it (TS_1 and TS_1_10.00Apx), else the one that has it as a word; TS_1
    is never taken for TS_10.  UserError: none, or several names fit.
    """
    keys = np.array([tomogram_key(str(one)) for one in particles.tomogram], object)
    names, key = list(dict.fromkeys(keys)), tomogram_key(name)
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])")
    tiers = (
        [one for one in names if one == key],
        [one for one in names if begins(one, key)],
        [one for one in names if word.search(one)],
    )
    found = next(filter(None, tiers), []) if key else []
    if len(found) != 1:
        some = ", ".join(map(str, (found or names)[:4]))
        what = (
            f"fits several tomograms ({some}); give the whole name" if found else f"is no tomogram of it ({some} ...)"
        )
        raise UserError(f"{particles.source}: {name!r} {what}")
    return np.flatnonzero(keys == found[0])


def voxel_positions(particles: ParticleList, pixel_size: float | None = None) -> NDArray[np.float64]:
    """(P, 3) centres in voxels of ``pixel_size`` Angstrom, x, y, z; None: the voxels that the list counts.

    Where a RELION table does not state those, they are the images' own, as ``export`` has it.  UserError: the list
    counts voxels of unknown size and has origins in Angstrom; centred coordinates.
    """
    if particles.unit == "centred":
        raise UserError(
            f"{particles.source}: coordinates are Angstrom from the middle of the tomogram, whose size is not known "
            "here; give a list with rlnCoordinateX/Y/Z, or use opustomo extract or export, which read the tomograms"
        )
    if particles.unit == "angstrom":
        if pixel_size is None:
            raise UserError(
                f"{particles.source}: coordinates are in Angstrom ({particles.kind}); use dsdsh convert_warp"
            )
        return (particles.position + particles.shift) / pixel_size
    own = particles.pixel_size or particles.image_pixel
    if own is None and (particles.shift != 0).any():
        raise UserError(
            f"{particles.source}: origins are in Angstrom, but nothing says how large the voxels of the coordinates "
            "are; add rlnTomoTiltSeriesPixelSize to the file, or write origins in pixels with dsdsh convert_star"
        )
    scale = 1.0 if pixel_size is None or own is None else own / pixel_size
    return (particles.position + particles.shift / (own or 1.0)) * scale


def write(
    particles: ParticleList, path: Path, kind: Kind, position: NDArray[np.float64], tomogram: Sequence[str],
    more: dict[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """Write a list whose coordinates are ``position`` (P, 3); score and half sets are kept."""
    more = dict(more or {})
    if np.isfinite(particles.score).all():
        more["rlnAutopickFigureOfMerit"] = [f"{value:.6f}" for value in particles.score]
    places = Places(position, particles.rotation, np.array(tomogram, object), 1.0)
    write_list(path, kind, places, particles.half, more=more)


def constants(count: int, **values: str) -> dict[str, Sequence[str]]:
    """Columns of one value."""
    return {name: [value] * count for name, value in values.items()}


def sampling_columns(count: int, pixel_size: float, magnification: float = 10000.0) -> dict[str, Sequence[str]]:
    """RELION 3.0's statement of a pixel size in Angstrom: detector pixel (micrometres) over magnification."""
    # with magnification 10000 the number is that of the pixel size
    detector = f"{pixel_size * magnification / 1e4:.7g}"
    return constants(count, rlnMagnification=f"{magnification:.7g}", rlnDetectorPixelSize=detector)


def warp_to_relion(source: Path, path: Path, pixel_size: float, voltage: float, cs: float) -> str:
    """A species of M (or any other list) as a RELION 3.0 STAR, coordinates in voxels of ``pixel_size`` Angstrom.

    Returns a line about what was done, as the others do.
    """
    particles = read_list(source)
    n, microscope = len(particles), {"rlnVoltage": f"{voltage:g}", "rlnSphericalAberration": f"{cs:g}"}
    more = constants(n, rlnPixelSize=f"{pixel_size:.7g}", **microscope) | sampling_columns(n, pixel_size)
    write(particles, path, "relion", voxel_positions(particles, pixel_size), list(particles.tomogram), more)
    notes = "".join(f"; {note}" for note in particles.notes)
    return f"{n} particles ({particles.kind}) written to {path}, coordinates in voxels of {pixel_size:g} A{notes}"


def picks_of_tomogram(source: Path, name: str, path: Path) -> str:
    """The particles of one tomogram as picks for Warp, in the voxels of the list."""
    particles = read_list(source)
    particles = particles.at(rows_of_tomogram(particles, name))
    write(particles, path, "warp", voxel_positions(particles), [f"{tomogram_key(name)}.tomostar"] * len(particles))
    return f"{len(particles)} particles of {tomogram_key(str(particles.tomogram[0]))} written to {path} for Warp"


def lists_to_star(
    sources: Sequence[Path], path: Path, binning: float, pixel_size: float | None, magnification: float, ctf: str | None
) -> str:
    """Lists, usually PyTom's XML, as one RELION 3.0 STAR; coordinates times ``binning``.

    pixel_size: Angstrom, of those unbinned voxels (None: not written); ctf: name of each CTF file, in which {ts_name}
    is the tomogram and {i} the row.
    """
    lists = [read_list(source) for source in sources]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(one, name) for one in lists])
        for name in ("rotation", "tomogram", "score", "half", "shift", "position")
    }
    position = np.concatenate([voxel_positions(one) for one in lists]) * binning
    particles = ParticleList(sources[0], lists[0].kind, unit="voxels", **joined)
    n = len(particles)
    more = constants(n, rlnGroupNumber="1") | (
        {} if pixel_size is None else sampling_columns(n, pixel_size, magnification)
    )
    if ctf is not None:
        keys = [tomogram_key(str(name)) for name in particles.tomogram]
        more["rlnCtfImage"] = [ctf.replace("{ts_name}", key).replace("{i}", str(i)) for i, key in enumerate(keys, 1)]
    write(particles, path, "relion", position, [str(name) or "unknown" for name in particles.tomogram], more)
    return f"{n} particles of {len(sources)} lists written to {path}, coordinates times {binning:g}"


def artiax_of_tomogram(
    source: Path, name: str, path: Path, factor: float, unique: bool, column: str | None, block: str | None
) -> str:
    """The particles of one tomogram for ArtiaX; positions times ``factor``; unique: one for each rlnImageName."""
    particles = read_list(source, block, column)
    rows = rows_of_tomogram(particles, name)
    if unique:
        star = read_star(source)
        names = star.text(star.particle_block if block is None else block, "rlnImageName", "--deduplicate")[rows]
        rows = rows[turn_of_each(names) == 0]
    particles = particles.at(rows)
    key = tomogram_key(name)
    write(particles, path, "artiax", voxel_positions(particles) * factor, [key] * len(particles))
    return f"{len(particles)} particles of {key} written to {path}, positions times {factor:g}"


def star_to_relion30(
    source: Path, pixel_size: float, target: float | None, label: int | None, unique: bool
) -> tuple[list[Path], list[str]]:
    """A RELION STAR as 3.0: ``<stem>30.star``, with ``label`` also ``<stem>30_subset<label>.star``, beside it.

    One block, the optics in the rows, origins in pixels.  pixel_size: Angstrom, compared with the file's; target: pixel
    size to which coordinates and origins in pixels are scaled; unique: first row of each rlnImageName alone.  Half sets
    are the file's, else alternate particles.  UserError: stacks of tilt images, another pixel size, no row
    with the label.
    """
    star = read_star(source)
    if not star.has(star.particle_block, "rlnImageName") or relion.has_stacks(star):
        raise UserError(
            f"{source}: is no table of subtomograms (rlnImageName); give one, or convert a species of M with "
            "dsdsh convert_warp and tilt images with dsd prepare_subtomos"
        )
    stated = relion.pixel_size(star)
    if stated is not None and differ(pixel_size, stated[0]):
        raise UserError(f"ANGPIX {pixel_size:g}: {source} says {stated[0]:g} A ({stated[1]}); give {stated[0]:g}")
    table, half = _origins_in_pixels(_rows_with_optics(star), star, pixel_size), relion.halves(star)
    notes = [f"{len(table)} particles read"]
    if unique:
        kept = turn_of_each(relion.image_names(star)) == 0
        table, half = table.loc[kept].reset_index(drop=True), half[kept]
        notes.append(f"{len(table)} are left of one for each rlnImageName")
    if stated is None or "rlnDetectorPixelSize" not in table:
        table = table.assign(**sampling_columns(len(table), pixel_size))
    if target is not None:
        table = _rescaled(table, star.path, pixel_size, target)
        notes.append(f"coordinates and origins times {pixel_size / target:.6g}; the images are still those of "
                     f"{pixel_size:g} A: extract them again")  # fmt: skip
    if set(half) >= {1, 2}:
        notes.append("half sets are those of the file")
    else:
        half = 1 + particle_numbers(table["rlnImageName"]) % 2
        notes.append("half sets are alternate particles")
    table["rlnRandomSubset"] = [str(value) for value in half]
    parts = {f"{source.stem}30": np.ones(len(table), bool)}
    if label is not None:
        parts[f"{source.stem}30_subset{label}"] = half == label
        if not (half == label).any():
            raise UserError(f"--subset-label {label}: no particle of {source} is in that half set; give 1 or 2")
    paths = [source.with_name(f"{name}.star") for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        write_star(path, {"": table.loc[part].reset_index(drop=True)})
    return paths, notes


def _origins_in_pixels(table: pd.DataFrame, star: StarFile, pixel_size: float) -> pd.DataFrame:
    """``table``, of the particles of ``star``, with origins in pixels in place of those in Angstrom."""
    for axis in relion.AXES:
        name = f"rlnOrigin{axis}Angst"
        if star.has(star.particle_block, name):
            values = star.numbers(star.particle_block, name, "the origins")
            pixels = number_columns([f"rlnOrigin{axis}"], values[:, None] / pixel_size, 6)
            table = table.assign(**pixels).drop(columns=name)
    return table


def _rows_with_optics(star: StarFile) -> pd.DataFrame:
    """The particle table with the columns of each row's optics group, which RELION 3.0 does not have."""
    table = star.particles.copy()
    if star.optics_block is None:
        return table
    optics, rows = star.table(star.optics_block), relion.optics_rows(star)
    for name in optics:
        if name not in (*_OPTICS_ALONE, *table):
            table[name] = optics[name].to_numpy(dtype=object)[rows]
    return table.drop(columns=[name for name in _OPTICS_ALONE if name in table])


def _rescaled(table: pd.DataFrame, path: Path, pixel_size: float, target: float) -> pd.DataFrame:
    """Pixels of ``pixel_size`` as pixels of ``target`` Angstrom."""
    numbers = StarFile(path, {"": table})
    for name in (f"rln{what}{axis}" for what in ("Coordinate", "Origin") for axis in relion.AXES):
        if name in table:
            values = numbers.numbers("", name, "scaling") * (pixel_size / target)
            table[name] = [f"{value:.6f}" for value in values]
    stated = {name: [f"{target:.7g}"] * len(table) for name in _PIXELS if name in table}
    magnification = float(numbers.numbers("", "rlnMagnification", "scaling")[0]) if "rlnMagnification" in table else 1e4
    return table.assign(**stated, **sampling_columns(len(table), target, magnification)).drop(
        columns="rlnImageSize", errors="ignore"
    )
