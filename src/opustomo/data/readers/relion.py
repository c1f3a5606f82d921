"""RELION particle tables, 3.0 (one block) and 3.1 or later (optics and particles).

Owns: the column names and units of these tables: what each quantity is called, where it stands in either version,
and how it becomes pixels and degrees.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opustomo.data.angles import to_matrix
from opustomo.data.star import StarFile
from opustomo.errors import UserError

AXES = ("X", "Y", "Z")
ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
PREMULTIPLIED = "rlnCtfDataAreCtfPremultiplied"


def version(star: StarFile) -> str:
    """ "RELION 3.1" where the file has an optics table, "RELION 3.0" else."""
    return "RELION 3.0" if star.optics_block is None else "RELION 3.1"


def has_stacks(star: StarFile) -> bool:
    """Whether every row is a particle with a stack of tilt images (RELION 5, WarpTools)."""
    flag = "rlnTomoSubTomosAre2DStacks"
    return star.has("general", flag) and star.text("general", flag, "telling stacks")[0] == "1"


def has_series(star: StarFile) -> bool:
    """Whether every row is one tilt image of a particle (``7@stack.mrcs``)."""
    return "@" in image_names(star)[0]


def image_names(star: StarFile) -> NDArray[np.object_]:
    """(P,) subtomogram file names as in the file."""
    return star.text(star.particle_block, "rlnImageName", "finding the subtomograms")


def identities(star: StarFile) -> NDArray[np.object_]:
    """(rows,) name of the particle: rlnTomoParticleName; rlnGroupName, else the stack, of images; else rlnImageName."""
    names = image_names(star)
    series = "@" in names[0]
    for column in ("rlnTomoParticleName", *(["rlnGroupName"] if series else [])):
        if star.has(star.particle_block, column):
            return star.text(star.particle_block, column, "telling particles apart")
    return np.array([name.split("@")[-1] for name in names], object) if series else names


def tomograms(star: StarFile) -> NDArray[np.object_]:
    """(P,) tomogram of each particle, "" where the file has none."""
    for column in ("rlnTomoName", "rlnMicrographName"):
        if star.has(star.particle_block, column):
            return star.text(star.particle_block, column, "grouping by tomogram")
    return np.full(len(star.particles), "", object)


def halves(star: StarFile, column: str = "rlnRandomSubset") -> NDArray[np.int64]:
    """(P,) half set 1 or 2, 0 where the file has no random subsets."""
    if not star.has(star.particle_block, column):
        return np.zeros(len(star.particles), np.int64)
    found = star.numbers(star.particle_block, column, "the half sets")
    if len(wrong := np.flatnonzero(~np.isin(found, (0, 1, 2)))):
        raise UserError(
            f"{star.path}: _{column}, row {wrong[0] + 1}: {found[wrong[0]]:g} is no half set; write 1 or 2, or "
            "remove the column"
        )
    return found.astype(np.int64)


def eulers(star: StarFile) -> NDArray[np.float64]:
    """(P, 3) rot, tilt, psi in degrees; UserError when a column is missing: poses come from the consensus."""
    found = np.stack([star.numbers(star.particle_block, name, "the consensus poses") for name in ANGLES], 1)
    return within(found, 1e6, star, "angle", "degrees")


def origins(star: StarFile, pixel_size: float) -> tuple[NDArray[np.float64], str]:
    """(P, 3) origins (x, y, z) in pixels and where they come from; a missing axis is 0.

    rlnOrigin*Angst (RELION 3.1 or later) is divided by ``pixel_size``; rlnOrigin* is in pixels already.
    """
    block = star.particle_block
    for suffix, unit, words in (("Angst", pixel_size, "Angstrom"), ("", 1.0, "pixels")):
        names = [f"rlnOrigin{axis}{suffix}" for axis in AXES]
        if any(star.has(block, name) for name in names):
            zero = np.zeros(len(star.particles))
            columns = [star.numbers(block, name, "the origins") if star.has(block, name) else zero for name in names]
            found = within(np.stack(columns, 1) / unit, 1e6, star, "origin", "pixels")
            return found, f"origins from rlnOriginX/Y/Z{suffix} ({words})"
    return np.zeros((len(star.particles), 3)), "the file has no origins: taken as zero"


def within(values: NDArray[np.float64], limit: float, star: StarFile, what: str, unit: str) -> NDArray[np.float64]:
    """Values (P, 3) as they are; UserError for one that single precision would make nonsense of."""
    wrong = np.flatnonzero((np.abs(values) >= limit).any(1))
    if len(wrong):
        worst = np.abs(values[wrong[0]]).max()
        raise UserError(
            f"{star.path}: row {wrong[0] + 1} has the {what} {worst:g} {unit}, which is not possible; correct it"
        )
    return values


def subtomogram_rotation(star: StarFile) -> NDArray[np.float64] | None:
    """(P, 3, 3) from the subtomogram to the tomogram (rlnTomoSubtomogramRot/Tilt/Psi); None where there is none.

    Poses and origins of the file are in the subtomogram's frame.  The images of a stack are in that of the tomogram.
    ``in_tomogram`` applies it.
    """
    names = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")
    if not star.has(star.particle_block, names[0]):
        return None
    angles = np.stack([star.numbers(star.particle_block, name, "the subtomograms' orientation") for name in names], 1)
    return to_matrix(angles)


def in_tomogram(
    star: StarFile, rotation: NDArray[np.float64], vector: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (P, 3, 3) and vectors (P, 3) of the subtomograms' frames in that of their tomogram."""
    turn = subtomogram_rotation(star)
    return (rotation, vector) if turn is None else (turn @ rotation, np.einsum("pij,pj->pi", turn, vector))


def in_subtomogram(
    star: StarFile, rotation: NDArray[np.float64], vector: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The inverse of ``in_tomogram``."""
    turn = subtomogram_rotation(star)
    if turn is None:
        return rotation, vector
    return turn.swapaxes(1, 2) @ rotation, np.einsum("pji,pj->pi", turn, vector)


def coordinates(star: StarFile) -> NDArray[np.float64] | None:
    """(P, 3) rlnCoordinateX/Y/Z as in the file, else rlnCenteredCoordinate*Angst; None when an axis is missing."""
    for names in ([f"rlnCoordinate{axis}" for axis in AXES], [f"rlnCenteredCoordinate{axis}Angst" for axis in AXES]):
        if all(star.has(star.particle_block, name) for name in names):
            found = np.stack([star.numbers(star.particle_block, name, "coordinates") for name in names], 1)
            return within(found, 1e7, star, "coordinate", "pixels or Angstrom")
    return None


def pixel_size(star: StarFile) -> tuple[float, str] | None:
    """Pixel size of the subtomograms in Angstrom and the columns it comes from; None when the file has none.

    RELION 3.0: rlnDetectorPixelSize (micrometre) * 1e4 / rlnMagnification; Warp writes Angstrom with magnification
    10000, the same number.  UserError when optics groups or particles differ.
    """
    for column in ("rlnImagePixelSize", "rlnPixelSize"):
        value = constant(star, column)
        if value is not None:
            return value, column
    detector, magnification = constant(star, "rlnDetectorPixelSize"), constant(star, "rlnMagnification")
    if detector is not None and magnification:
        return detector * 1e4 / magnification, "rlnDetectorPixelSize and rlnMagnification"
    series, binning = constant(star, "rlnTomoTiltSeriesPixelSize"), constant(star, "rlnTomoSubtomogramBinning")
    if series is not None and binning is not None:
        return series * binning, "rlnTomoTiltSeriesPixelSize and rlnTomoSubtomogramBinning"
    return None


def coordinate_pixel(star: StarFile) -> float | None:
    """Angstrom, of the voxels that rlnCoordinateX/Y/Z count, where the file tells; UserError as pixel_size.

    RELION counts pixels of the tilt series.  Warp and WarpTools, known by their ``.tomostar``, count pixels of the
    images or subtomograms that they have exported.
    """
    if str(tomograms(star)[0]).endswith(".tomostar"):
        stated = pixel_size(star)
        return None if stated is None else stated[0]
    return constant(star, "rlnTomoTiltSeriesPixelSize")


def image_size(star: StarFile) -> int | None:
    """Box size according to the optics table, None when it does not say; UserError when groups differ."""
    size = constant(star, "rlnImageSize")
    return None if size is None else round(size)


def premultiplied(star: StarFile) -> bool:
    """Whether the data are CTF-premultiplied; not where the file does not say, as RELION has it.  UserError if groups
    differ."""
    return bool(constant(star, PREMULTIPLIED) or 0)


def microscope(star: StarFile) -> dict[str, float]:
    """Voltage (kV), Cs (mm) and amplitude contrast, as far as the file states one value for all particles."""
    names = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
    values = {name: _values(star, name) for name in names}
    return {name: float(found[0]) for name, found in values.items() if found is not None and len(set(found)) == 1}


def constant(star: StarFile, column: str) -> float | None:
    """The one value of a column over all particles (their optics groups), None when absent.

    UserError naming both values when particles or optics groups differ: mixed sets are not read.
    """
    values = _values(star, column)
    if values is None:
        return None
    other = np.flatnonzero(np.abs(values - values[0]) > 1e-6 * np.abs(values[0]))
    if other.size:
        optics = star.optics_block
        table = optics if optics is not None and star.has(optics, column) else None
        row = int(other[0]) if table is None else _groups_in_use(star)[other[0]]
        place = f"data_{star.particle_block if table is None else table}, row {row + 1}"
        raise UserError(
            f"{star.path}: _{column} differs: {values[0]:g} and {values[other[0]]:g} ({place}); all particles must "
            "agree: split the STAR file or extract the particles again alike"
        )
    return float(values[0])


def _values(star: StarFile, column: str) -> NDArray[np.float64] | None:
    """A column from the optics groups in use, else from the particle table, else None."""
    optics = star.optics_block
    if optics is not None and star.has(optics, column):
        return star.numbers(optics, column, "the optics")[_groups_in_use(star)]
    if star.has(star.particle_block, column):
        return star.numbers(star.particle_block, column, "the optics")
    return None


def optics_rows(star: StarFile) -> list[int]:
    """(rows,) row of the optics table for each row of the particle table; UserError: a group that is not there."""
    optics, purpose = star.optics_block, "linking particles to optics"
    assert optics is not None
    rows = {group: i for i, group in enumerate(star.text(optics, "rlnOpticsGroup", purpose))}
    if len(rows) == 1 and not star.has(star.particle_block, "rlnOpticsGroup"):
        return [0] * len(star.particles)
    used = star.text(star.particle_block, "rlnOpticsGroup", purpose)
    if unknown := [group for group in used if group not in rows]:
        raise UserError(
            f"{star.path}: optics group {unknown[0]} of data_{star.particle_block} is not in data_{optics} "
            f"(groups {', '.join(rows)}); add its row"
        )
    return [rows[group] for group in used]


def _groups_in_use(star: StarFile) -> list[int]:
    """Rows of the optics table that particles refer to, in order of first use."""
    return list(dict.fromkeys(optics_rows(star)))
