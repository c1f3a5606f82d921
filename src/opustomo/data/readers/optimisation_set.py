"""RELION 5 and WarpTools optimisation sets: the tilt series of every particle from the tomograms' STAR files.

Owns: the columns of those files and their geometry.  A point x of a tomogram, pixels from its middle, lies in image f
at ``R_f x`` (first two rows) and depth ``R_f x`` (third row), R_f the upper left of rlnTomoProjX/Y/Z or
``Rz(ZRot) Ry(YTilt) Rx(XTilt)`` with active rotations.  A box of images is centred on the particle's coordinate, so the
rest of the projection (shifts of the stage) does not enter.  Source: RELION 5, ``Tomogram::setProjectionMatrix``,
``Tomogram::getCtf``, ``ParticleSet::getPosition``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.data.angles import tilt_angles, to_euler, to_matrix
from opustomo.data.mrc import header_of
from opustomo.data.particles import TILT_COLUMNS, offsets_of
from opustomo.data.readers import relion
from opustomo.data.readers.dialect import Imaging, Opened, Poses
from opustomo.data.readers.files import Locator
from opustomo.data.readers.source import Source
from opustomo.data.readers.subtomograms import image_files
from opustomo.data.readers.tilts import tilt_table
from opustomo.data.star import StarFile, read_star
from opustomo.errors import UserError

__all__ = ["from_corner", "image_files", "poses", "poses_in_file", "read"]

_DEFOCUS = [TILT_COLUMNS.index("defocus_u"), TILT_COLUMNS.index("defocus_v")]
_LOOKED_AT = 8  # stacks
_OF_WARP = "dummy_tiltseries.mrc"  # rlnTomoTiltSeriesName
_PER_DOSE = "rlnCtfBfactorPerElectronDose"
_CTF = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfScalefactor", "rlnCtfBfactor")


class _Series(NamedTuple):
    """One tilt series of T images."""

    table: NDArray[np.float64]  # (T, 13) at the middle of the tomogram
    rotation: NDArray[np.float64]  # (T, 3, 3) R_f
    hand: float  # Angstrom of defocus per Angstrom of depth
    pixel_size: float  # of the tilt series, Angstrom
    size: NDArray[np.float64] | None  # (3,) pixels of the tilt series
    warp: bool  # whether WarpTools wrote it


def read(opened: Opened) -> Imaging:
    """Poses and tilts of P particles, whose files are stacks of tilt images.

    UserError: no tomograms file, tomogram not in it, frames that do not fit, columns missing.
    """
    source, pixel_size = opened.source, opened.pixel_size
    star = source.table
    if source.tomograms is None:
        names = (f"{star.path.stem}_optimisation_set.star", "optimisation_set.star")
        beside = next((path for name in names if (path := star.path.with_name(name)).is_file()), None)
        raise UserError(
            f"{star.path}: particles are stacks of tilt images, whose tilt angles are in the tomograms' STAR file; "
            f"give the optimisation set ({beside or 'the STAR file'} with _rlnTomoParticlesFile and "
            "_rlnTomoTomogramsFile) instead"
        )
    series = _series_of(source, _read_tomograms(source.tomograms, star, pixel_size, opened.options.datadir))
    euler, rotation, origin, origin_note = poses(source, pixel_size)
    frames = _visible(star, series)
    depth, depth_note = _depths(star, series, origin * pixel_size)
    tables = []
    for one, visible, along in zip(series, frames, depth, strict=True):
        table = one.table[visible]
        table[:, _DEFOCUS] += (one.hand * along[visible])[:, None]
        tables.append(table)
    whole = _holds_all(opened, frames, series)
    slices = np.concatenate([visible if whole else np.arange(len(visible)) for visible in frames])
    counts = [len(table) for table in tables]
    tilts = (
        f"{len(set(relion.tomograms(star)))} tilt series in {source.tomograms.name}, {min(counts)} to {max(counts)} "
        "images a particle"
    )
    return Imaging(
        euler, rotation, origin, "tilts", (), np.concatenate(tables), offsets_of(counts), slices,
        np.zeros((len(slices), 2)), (origin_note, tilts, depth_note),
    )  # fmt: skip


def from_corner(source: Source, pixel_size: float, datadir: Path | None) -> tuple[NDArray[np.float64], float]:
    """(P, 3) coordinates in Angstrom from the tomogram's first voxel, and Angstrom, the voxels that the file counts.

    UserError: tomogram not in the set, its size unknown.
    """
    assert source.tomograms is not None
    star = source.table
    series = _series_of(source, _read_tomograms(source.tomograms, star, pixel_size, datadir))
    position, _ = _positions(star, series)
    if position is None or any(one.size is None for one in series):
        raise UserError(f"{source.tomograms}: rlnTomoSizeX/Y/Z or the coordinates are missing; add them")
    middle = np.stack([one.size * one.pixel_size / 2 for one in series if one.size is not None])
    return position + middle, pixel_size if all(one.warp for one in series) else series[0].pixel_size


def poses(source: Source, pixel_size: float) -> Poses:
    """Poses in the tomogram's frame, in which the images are."""
    euler = relion.eulers(source.table)
    origin, note = relion.origins(source.table, pixel_size)
    rotation = to_matrix(euler)
    if relion.subtomogram_rotation(source.table) is None:
        return Poses(euler, rotation, origin, note)
    rotation, origin = relion.in_tomogram(source.table, rotation, origin)
    note += "; poses and origins turned by rlnTomoSubtomogramRot/Tilt/Psi"
    return Poses(to_euler(rotation), rotation, origin, note)


def poses_in_file(
    source: Source, pixel_size: float, euler: NDArray[np.float64], origin: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Euler angles and origins (P, 3) in the subtomograms' frames, of such in the tomogram's."""
    rotation, origin = relion.in_subtomogram(source.table, to_matrix(euler), origin)
    return to_euler(rotation), origin


def _series_of(source: Source, tomograms: dict[str, _Series]) -> list[_Series]:
    """Tilt series of every particle; UserError naming the first whose tomogram is not there."""
    star = source.table
    names = star.text(star.particle_block, "rlnTomoName", "finding the tilt series")
    if missing := [row for row, name in enumerate(names) if name not in tomograms]:
        raise UserError(
            f"{star.path}: column _rlnTomoName, row {missing[0] + 1}: tomogram {names[missing[0]]} is not in "
            f"{source.tomograms} (which has {', '.join(list(tomograms)[:3])} ...); give the file that has it"
        )
    return [tomograms[name] for name in names]


def _visible(star: StarFile, series: list[_Series]) -> list[NDArray[np.int64]]:
    """Frames of its tomogram that each particle's stack holds, in their order."""
    column, block = "rlnTomoVisibleFrames", star.particle_block
    if not star.has(block, column):
        return [np.arange(len(one.table)) for one in series]
    frames = []
    for row, (text, one) in enumerate(zip(star.text(block, column, "the frames"), series, strict=True)):
        flags = str(text).strip("[]").split(",")
        if len(flags) != len(one.table) or not set(flags) <= {"0", "1"}:
            raise UserError(
                f"{star.path}: column _{column}, row {row + 1}: {len(flags)} flags where the tilt series has "
                f"{len(one.table)} images (each 0 or 1); give the tomograms that these particles were extracted from"
            )
        if "1" not in flags:
            raise UserError(f"{star.path}: column _{column}, row {row + 1}: no image is visible; remove this particle")
        frames.append(np.flatnonzero(np.array(flags) == "1"))
    return frames


def _holds_all(opened: Opened, frames: list[NDArray[np.int64]], series: list[_Series]) -> bool:
    """Whether stacks hold the images that are not visible, too: those of WarpTools do, those of RELION do not.

    A few stacks are looked at.  UserError where they hold yet another number.
    """
    path, images, readable = opened.source.table.path, opened.images, set(opened.readable)
    kinds = []
    good = [i for i, image in enumerate(images) if image in readable]
    some = [i for i in good if len(frames[i]) < len(series[i].table)] or good
    for i in some[:: max(1, len(some) // _LOOKED_AT)]:
        held, all_frames, visible = header_of(images[i]).shape[0], len(series[i].table), len(frames[i])
        if held not in (all_frames, visible):
            raise UserError(
                f"{images[i]}: has {held} images where {path}, row {i + 1}, shows {visible} of {all_frames} "
                "(rlnTomoVisibleFrames); give the particles and tomograms that these stacks were extracted with"
            )
        kinds.append(held != visible)
    if len(set(kinds)) > 1:
        raise UserError(
            f"{path}: some stacks hold all images, some only those of rlnTomoVisibleFrames; give sets that were "
            "extracted apart one at a time"
        )
    return kinds[0]


def _depths(
    star: StarFile, series: list[_Series], origin: NDArray[np.float64]
) -> tuple[list[NDArray[np.float64]], str]:
    """Depth of every particle in each image (T,), Angstrom from the tomogram's middle, and a note."""
    position, note = _positions(star, series)
    if not any(one.hand for one in series):
        position, note = None, "no rlnTomoHand: the defocus of the tomogram's middle is used"
    if position is None:
        return [np.zeros(len(one.table)) for one in series], note
    return [one.rotation[:, 2] @ place for one, place in zip(series, position - origin, strict=True)], note


def _positions(star: StarFile, series: list[_Series]) -> tuple[NDArray[np.float64] | None, str]:
    """(P, 3) Angstrom from the middle of the tomogram, None where the files do not say."""
    place, block = relion.coordinates(star), star.particle_block
    if place is None:
        return None, "no coordinates: the defocus of the tomogram's middle is used"
    if not star.has(block, "rlnCoordinateX"):
        return place, "defocus from the depth of rlnCenteredCoordinateX/Y/ZAngst"
    if any(one.size is None for one in series):
        return None, "the tomograms' sizes are not known: the defocus of their middle is used"
    size = np.stack([one.size for one in series if one.size is not None])
    unit = np.array([one.pixel_size for one in series])[:, None]
    binning, words = relion.constant(star, "rlnTomoSubtomogramBinning") or 1.0, "pixels of the tilt series"
    if all(one.warp for one in series):
        place, words = place * binning, "pixels of the extracted images, as WarpTools writes them"
    return (place - size / 2) * unit, f"defocus from the depth of rlnCoordinateX/Y/Z, in {words}"


def _read_tomograms(path: Path, particles: StarFile, pixel_size: float, datadir: Path | None) -> dict[str, _Series]:
    """Every tilt series by the name of its tomogram."""
    star = read_star(path)
    if "global" not in star.blocks:
        raise UserError(f"{path}: has no block data_global; give the tomograms' STAR file of the optimisation set")
    names = star.text("global", "rlnTomoName", "finding the tilt series")
    column = "rlnTomoTiltSeriesStarFile"
    if star.has("global", column):
        files = Locator(path, datadir).require(list(star.text("global", column, "the tilts")), "tilt series")
        stars = [read_star(file) for file in files]
        blocks = [next(iter(one.blocks)) for one in stars]
    else:
        stars, blocks = [star] * len(names), [str(name) for name in names]
    found = {}
    for row, (name, one, block) in enumerate(zip(names, stars, blocks, strict=True)):
        found[str(name)] = _series(star, row, one, block, particles, pixel_size)
    return found


def _series(
    tomograms: StarFile, row: int, star: StarFile, block: str, particles: StarFile, image_pixel: float
) -> _Series:
    of_tomogram = partial(_of_tomogram, tomograms, row)
    stated = relion.microscope(particles)
    stated |= {name: value for name in ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
               if (value := of_tomogram(name)) is not None}  # fmt: skip
    # a tilt series in a file of its own may have lost images since the tomograms were listed
    count = of_tomogram("rlnTomoFrameCount") if star is tomograms else None
    if count is not None and count != len(star.table(block)):
        raise UserError(
            f"{tomograms.path}: column _rlnTomoFrameCount, row {row + 1}: {count:g} where data_{block} of "
            f"{star.path.name} has {len(star.table(block))} images; correct it, or export the tomograms again"
        )
    pixel = of_tomogram("rlnTomoTiltSeriesPixelSize") or relion.constant(particles, "rlnTomoTiltSeriesPixelSize")
    rotation = _rotations(star, block)
    columns = _ctf_columns(star, block, of_tomogram)
    angles = dict(zip(relion.ANGLES, tilt_angles(rotation).T, strict=True))
    axes = [of_tomogram(f"rlnTomoSize{axis}") for axis in relion.AXES]
    size = None if None in axes else np.array(axes, np.float64)
    slope = of_tomogram("rlnTomoDefocusSlope")
    hand = (of_tomogram("rlnTomoHand") or 0.0) * (1.0 if slope is None else slope)
    column = "rlnTomoTiltSeriesName"
    named = tomograms.has("global", column) and Path(tomograms.text("global", column, "the images")[row]).name
    table = tilt_table(angles | columns, stated, star.path)
    return _Series(table, rotation, hand, pixel or image_pixel, size, named == _OF_WARP)


def _of_tomogram(tomograms: StarFile, row: int, name: str) -> float | None:
    """A value of the table of tomograms, None where it has no such column."""
    if not tomograms.has("global", name):
        return None
    value = float(tomograms.numbers("global", name, "the tilt series")[row])
    if abs(value) >= 1e7:
        raise UserError(f"{tomograms.path}: column _{name}, row {row + 1}: {value:g} is not possible; correct it")
    return value


def _ctf_columns(
    star: StarFile, block: str, of_tomogram: Callable[[str], float | None]
) -> dict[str, NDArray[np.float64]]:
    """CTF columns of a tilt series, each (T,); without a B-factor that of the dose, or the dose itself."""
    columns = {name: star.numbers(block, name, "the CTF") for name in _CTF if star.has(block, name)}
    if "rlnCtfBfactor" not in columns and star.has(block, "rlnMicrographPreExposure"):
        dose, per_dose = star.numbers(block, "rlnMicrographPreExposure", "the dose"), of_tomogram(_PER_DOSE)
        if per_dose:
            columns["rlnCtfBfactor"] = per_dose * (dose + 0.5 * (of_tomogram("rlnTomoImportFractionalDose") or 0.0))
        else:
            columns["dose"] = dose  # as RELION and WarpTools then filter the images
    return columns


def _rotations(star: StarFile, block: str) -> NDArray[np.float64]:
    """R_f (T, 3, 3) of a tilt series; UserError naming the row of a matrix that is no rotation."""
    if not star.has(block, "rlnTomoProjX"):
        names = ("rlnTomoZRot", "rlnTomoYTilt", "rlnTomoXTilt")
        zero = np.zeros(len(star.table(block)))
        angles = [zero if name == names[2] and not star.has(block, name) else star.numbers(block, name, "the tilts")
                  for name in names]  # fmt: skip
        return Rotation.from_euler("ZYX", np.stack(angles, 1), degrees=True).as_matrix()
    rows = []
    for axis in relion.AXES:
        column = f"rlnTomoProj{axis}"
        for number, text in enumerate(star.text(block, column, "the projections")):
            try:
                rows.append([float(value) for value in str(text).strip("[]").split(",")][:3])
                _, _, _ = rows[-1]
            except ValueError:
                raise UserError(
                    f"{star.path}: data_{block}, column _{column}, row {number + 1}: {text!r} is not [x,y,z,shift]; "
                    "write the tomograms again"
                ) from None
    matrix = np.array(rows).reshape(3, -1, 3).transpose(1, 0, 2)
    possible = (np.abs(matrix) < 2).all((1, 2))  # on infinite values the decomposition does not end
    u, scale, v = np.linalg.svd(np.where(possible[:, None, None], matrix, 0.0))
    wrong = ~possible | (np.abs(scale - 1) > 0.02).any(1) | (np.linalg.det(u @ v) < 0)
    if wrong.any():
        raise UserError(
            f"{star.path}: data_{block}, row {np.flatnonzero(wrong)[0] + 1}: rlnTomoProjX/Y/Z is not a rotation (it "
            "scales or mirrors); export the set from RELION or WarpTools again"
        )
    return u @ v
