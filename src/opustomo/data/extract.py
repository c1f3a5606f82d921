"""The verb ``extract``: subtomograms cut from tomograms, where only a particle list and tomograms are there.

Owns: boxes at whole voxels (what is left of the position becomes the origin), and the missing wedge as a CTF volume.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.config import ExtractConfig
from opustomo.data.angles import to_euler
from opustomo.data.atomic import write_csv
from opustomo.data.lists import ParticleList, read_list
from opustomo.data.mrc import map_volume, write_volume
from opustomo.data.places import begins, tomogram_key
from opustomo.data.readers import relion
from opustomo.data.readers.sampling import differ
from opustomo.data.star import number_columns, write_star
from opustomo.errors import UserError, reading

log = logging.getLogger(__name__)

_NAMED = 5  # particles in a line of the log


def main(config: ExtractConfig) -> int:
    """``opustomo extract``."""
    low, high = config.tilt_range
    if config.box < 4 or config.box % 2:
        raise UserError(f"--box {config.box}: must be an even number of voxels")
    if not -90 < low < high < 90:
        raise UserError(f"--tilt-range {low:g} {high:g}: needs the lowest, then the highest angle, within -90 and 90")
    if (config.output / "particles.star").exists():
        raise UserError(f"-o {config.output}: holds particles.star already; choose another folder")
    particles = read_list(config.list)
    for note in (f"{particles.kind}: {len(particles)} particles", *particles.notes):
        log.info("%s", note)
    found = tomograms_of(particles, config.tomogram)
    pixel_size = _pixel_size(sorted(set(found)), config.angpix)
    boxes = _boxes(config, particles, found, pixel_size)
    _tell_left_out(config, particles, boxes)
    names = []
    for i in np.flatnonzero(boxes.inside):
        name = f"subtomo/{tomogram_key(found[i].name)}/p{i + 1:06d}.mrc"
        volume = box_at(map_volume(found[i])[0], boxes.corner[i], config.box)
        write_volume(config.output / name, volume, pixel_size)
        names.append(name)
    write_volume(config.output / "wedge.mrc", wedge(config.box, low, high, config.tilt_axis), pixel_size)
    table = pd.DataFrame(_columns(particles, found, boxes, config.box, pixel_size))[boxes.inside].reset_index(drop=True)
    table.insert(4, "rlnImageName", names)
    star = config.output / "particles.star"
    write_star(star, {"optics": pd.DataFrame([_optics(config.box, pixel_size)]), "particles": table})
    log.info("wrote %d subtomograms of %d voxels of %g A: %s; next: opustomo check %s", len(names), config.box,
             pixel_size, star, shlex.quote(str(star)))  # fmt: skip
    return 0


class _Boxes(NamedTuple):
    """Voxels of their tomograms, x, y, z: the particles' places, and the first of the box cut for each."""

    position: NDArray[np.float64]  # (P, 3)
    corner: NDArray[np.int64]  # (P, 3)
    inside: NDArray[np.bool_]  # (P,) whether the whole box is


def _boxes(config: ExtractConfig, particles: ParticleList, files: Sequence[Path], pixel_size: float) -> _Boxes:
    position, inside = np.zeros((len(particles), 3)), np.zeros(len(particles), bool)
    corner = np.zeros((len(particles), 3), np.int64)
    for path in sorted(set(files)):
        rows = np.flatnonzero([one == path for one in files])
        size = np.array(map_volume(path)[0].shape[::-1])
        position[rows] = particles.voxels(rows, pixel_size, size, config.coords_angpix)
        corner[rows] = np.rint(position[rows]) - config.box // 2
        inside[rows] = ((corner[rows] >= 0) & (corner[rows] + config.box <= size)).all(1)
    return _Boxes(position, corner, inside)


def box_at(volume: NDArray[Any], corner: NDArray[np.int64], box: int) -> NDArray[np.float32]:
    """(N, N, N) voxels of a tomogram from ``corner`` (x, y, z), which may lie outside; zeros beyond its edge."""
    out = np.zeros((box,) * 3, np.float32)
    low = np.clip(corner, 0, volume.shape[::-1])
    high = np.clip(corner + box, 0, volume.shape[::-1])
    there = tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))
    here = tuple(slice(a, b) for a, b in zip((low - corner)[::-1], (high - corner)[::-1], strict=True))
    out[here] = volume[there]
    return out


def wedge(box: int, low: float, high: float, axis: str = "y") -> NDArray[np.float32]:
    """What tilts from ``low`` to ``high`` degrees see: 1 or 0, (N, N, N//2+1) (kz, ky, kx), zero frequency first.

    axis: of the tilt, x or y, the beam along z at tilt 0; the angle is that about the axis by which the beam turns,
    right-handed, as RELION's about y (METHOD section 2).
    """
    along = np.fft.fftfreq(box) * box
    kz, ky, kx = np.meshgrid(along, along, np.arange(box // 2 + 1), indexing="ij")
    # the image at tilt t is spanned by the axis and by (cos t, -sin t) in (x, z), or (cos t, sin t) in (y, z)
    across, depth = (kx, -kz) if axis == "y" else (ky, kz)
    turn = np.where(across < 0, -1.0, 1.0)
    angle = np.rad2deg(np.arctan2(turn * depth, turn * across))
    seen = (angle >= low) & (angle <= high) | (np.hypot(across, depth) == 0)
    return seen.astype(np.float32)


def tomograms_of(particles: ParticleList, given: Sequence[Path]) -> list[Path]:
    """The tomogram of each particle.

    given: MRC files, each for the particles whose tomogram has its name (or begins its name: TS_1 and TS_1_10A.mrc), or
    text files with a name and a tomogram in each line.  A single MRC file serves a list of a single tomogram.
    UserError: no or several files for a tomogram.
    """
    files: dict[str, Path] = {}
    for path in given:
        named = {tomogram_key(path.name): path} if path.suffix.lower() in (".mrc", ".rec") else _table(path)
        if twice := [key for key in named if files.get(key, named[key]) != named[key]]:
            raise UserError(
                f"--tomogram: {files[twice[0]]} and {named[twice[0]]} are both named {twice[0]}; give one, or a "
                "text file with the list's name and the tomogram in each line"
            )
        files |= named
    names = dict.fromkeys(str(name) for name in particles.tomogram)
    if len(files) == 1 and len(names) == 1:
        return [next(iter(files.values()))] * len(particles)
    chosen = {}
    for name in names:
        key = tomogram_key(name)
        starts = [path for stem, path in files.items() if begins(stem, key)]
        fit = [files[key]] if key in files else starts
        if len(fit) != 1:
            what = "has no name" if not key else f"{name} is not there" if not fit else f"{name}: several files fit"
            raise UserError(
                f"{particles.source}: the tomogram of row {list(particles.tomogram).index(name) + 1} {what} among "
                f"{', '.join(list(files)[:3])}{' ...' if len(files) > 3 else ''}; give --tomogram a text file with the "
                "list's name and the tomogram in each line"
            )
        chosen[name] = fit[0]
    return [chosen[str(name)] for name in particles.tomogram]


def _table(path: Path) -> dict[str, Path]:
    """Name and tomogram in each line; relative names are relative to the file."""
    with reading(path, "give --tomogram MRC files or a table of them"):
        lines = path.read_text(encoding="utf-8").splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].replace(",", " ").split()
        if words and len(words) != 2:
            raise UserError(f"--tomogram {path}: line {number} is not a name and a tomogram; correct it")
        if words:
            found[tomogram_key(words[0])] = path.parent / words[1]
    if not found:
        raise UserError(f"--tomogram {path}: names no tomogram; give a name and a file in each line")
    return found


def _pixel_size(paths: Sequence[Path], stated: float | None) -> float:
    """Angstrom, of all tomograms; UserError where they differ, or nothing states it."""
    headers = {path: size for path in paths if (size := map_volume(path)[1]) not in (0.0, 1.0)}
    value = stated or next(iter(headers.values()), None)
    if value is None or not value > 0:
        raise UserError(f"{paths[0]}: its header does not state the pixel size; give it with --angpix")
    for path, size in headers.items():
        if differ(size, value):
            raise UserError(
                f"{path}: pixel size {size:g} A where {value:g} A is expected; extract tomograms of different pixel "
                "sizes one at a time, or correct --angpix"
            )
    return value


def _tell_left_out(config: ExtractConfig, particles: ParticleList, boxes: _Boxes) -> None:
    """Name the particles too near the edge, in the log and in left_out.csv; UserError where none is left."""
    position, rows = boxes.position, np.flatnonzero(~boxes.inside)
    if len(rows) == 0:
        return
    some = ", ".join(
        f"row {i + 1} ({particles.tomogram[i] or 'tomogram'}: {', '.join(f'{v:.1f}' for v in position[i])})"
        for i in rows[:_NAMED]
    )
    if len(rows) == len(position):
        raise UserError(
            f"{config.list}: no box of {config.box} voxels lies inside its tomogram, first: {some}; give the pixel "
            "size that the coordinates count (--coords-angpix), the right tomograms or a smaller --box"
        )
    lines = ([i + 1, particles.tomogram[i], *(f"{v:.3f}" for v in position[i])] for i in rows)
    write_csv(config.output / "left_out.csv", ["row", "tomogram", "x", "y", "z"], lines)
    log.warning("%d of %d particles are too near the edge and left out (left_out.csv): %s%s", len(rows), len(position),
                some, " ..." if len(rows) > _NAMED else "")  # fmt: skip


def _optics(box: int, pixel_size: float) -> dict[str, str]:
    return {
        "rlnOpticsGroup": "1",
        "rlnOpticsGroupName": "opticsGroup1",
        "rlnImagePixelSize": f"{pixel_size:.7g}",
        "rlnImageSize": str(box),
        "rlnImageDimensionality": "3",
    }


def _columns(
    particles: ParticleList, files: Sequence[Path], boxes: _Boxes, box: int, pixel_size: float
) -> dict[str, list[str]]:
    """RELION 3.1 columns of all particles but their images: coordinates of the boxes, the rest as origin."""
    centre = (boxes.corner + box // 2).astype(np.float64)
    names = [str(name) or tomogram_key(file.name) for name, file in zip(particles.tomogram, files, strict=True)]
    columns = {"rlnMicrographName": names}
    columns |= number_columns([f"rlnCoordinate{axis}" for axis in relion.AXES], centre, 0)
    poses = np.hstack([to_euler(particles.rotation), (centre - boxes.position) * pixel_size])
    columns |= number_columns([*relion.ANGLES, *(f"rlnOrigin{axis}Angst" for axis in relion.AXES)], poses, 5)
    if np.isfinite(particles.score).all():
        columns |= number_columns(["rlnAutopickFigureOfMerit"], particles.score[:, None], 6)
    if (particles.half > 0).any():
        columns["rlnRandomSubset"] = [str(half) for half in particles.half]
    return columns | {"rlnCtfImage": ["wedge.mrc"] * len(names), "rlnOpticsGroup": ["1"] * len(names)}
