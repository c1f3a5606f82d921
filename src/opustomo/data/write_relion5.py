"""The optimisation set of RELION 5 and WarpTools: particles as stacks of 2-D tilt images, tomograms as tilt tables.

Owns: the writing of ``particles.star``, ``tomograms.star`` and ``optimisation_set.star`` for sets that are made here
(the simulator).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.data.readers import relion
from opustomo.data.star import Block, number_columns, write_star
from opustomo.data.write_relion30 import Listed

_OPTICS_GROUP = "opticsGroup1"


@dataclass(frozen=True)
class Optics:
    """What all images share; they are as they were recorded: not binned, not multiplied by the CTF."""

    box: int  # pixels
    pixel_size: float  # Angstrom
    voltage: float  # kV
    cs: float  # mm
    amplitude: float


@dataclass(frozen=True)
class Tomogram:
    """One tilt series of T images; its coordinates are pixels of the images, x, y, z from the corner of the volume."""

    size: NDArray[np.float64]  # (3,) pixels
    rotation: NDArray[np.float64]  # (T, 3, 3) rows: x and y of the image and the depth along the beam
    defocus: NDArray[np.float64]  # (T,) Angstrom, underfocus positive, at the middle of the volume
    scale: NDArray[np.float64]  # (T,) amplitude
    exposure: NDArray[np.float64]  # (T,) electrons per square Angstrom before each image
    dose: float  # electrons per square Angstrom of each image
    bfactor_per_dose: float  # Angstrom^2 per electron per square Angstrom, damping

    @property
    def projection(self) -> NDArray[np.float64]:
        """(T, 4, 4): takes (x, y, z, 1) to the pixel of the image and the depth; middle of the volume to middle."""
        found = np.tile(np.eye(4), (len(self.rotation), 1, 1))
        found[:, :3, :3] = self.rotation
        found[:, :3, 3] = self.size / 2 - self.rotation @ (self.size / 2)
        return found


def write_optimisation_set(folder: Path, particles: Listed, tomograms: Mapping[str, Tomogram], optics: Optics) -> None:
    """Write the three files, the optimisation set last; UserError where they cannot be written.

    The images of ``particles`` are stacks of all images of their tomogram, in the order of the tilts.
    """
    write_star(folder / "tomograms.star", _tomogram_blocks(tomograms, optics))
    write_star(folder / "particles.star", _particle_blocks(particles, tomograms, optics))
    names = {"rlnTomoParticlesFile": "particles.star", "rlnTomoTomogramsFile": "tomograms.star"}
    write_star(folder / "optimisation_set.star", {"": names})


def _particle_blocks(particles: Listed, tomograms: Mapping[str, Tomogram], optics: Optics) -> dict[str, Block]:
    group = _microscope(optics) | {
        "rlnOpticsGroup": "1",
        "rlnOpticsGroupName": _OPTICS_GROUP,
        "rlnCtfDataAreCtfPremultiplied": "0",
        "rlnImageDimensionality": "2",
        "rlnTomoSubtomogramBinning": "1",
        "rlnImagePixelSize": f"{optics.pixel_size:.7g}",
        "rlnImageSize": str(optics.box),
    }
    numbers = [str(i + 1) for i in range(len(particles.images))]
    names = [f"{tomogram}/{number}" for tomogram, number in zip(particles.tomograms, numbers, strict=True)]
    counts = [len(tomograms[name].rotation) for name in particles.tomograms]
    columns = {
        "rlnTomoName": list(particles.tomograms),
        "rlnTomoParticleId": numbers,
        **number_columns([f"rlnCoordinate{axis}" for axis in relion.AXES], particles.coordinates, 3),
        **number_columns(relion.ANGLES, particles.euler, 5),
        "rlnTomoParticleName": names,
        "rlnOpticsGroup": ["1"] * len(names),
        "rlnImageName": list(particles.images),
        **number_columns([f"rlnOrigin{axis}Angst" for axis in relion.AXES], particles.origin * optics.pixel_size, 4),
        "rlnTomoVisibleFrames": ["[" + ",".join("1" * count) + "]" for count in counts],
    }
    return {
        "general": {"rlnTomoSubTomosAre2DStacks": "1"},
        "optics": pd.DataFrame([group]),
        "particles": pd.DataFrame(columns),
    }


def _tomogram_blocks(tomograms: Mapping[str, Tomogram], optics: Optics) -> dict[str, Block]:
    rows = [
        {
            "rlnTomoName": name,
            "rlnTomoTiltSeriesName": f"{name}.mrcs",
            "rlnTomoFrameCount": str(len(tomogram.rotation)),
            **{f"rlnTomoSize{axis}": f"{size:.0f}" for axis, size in zip(relion.AXES, tomogram.size, strict=True)},
            "rlnTomoHand": "1.0",  # defocus grows with the depth
            "rlnOpticsGroupName": _OPTICS_GROUP,
            **_microscope(optics),
            "rlnTomoImportFractionalDose": f"{tomogram.dose:g}",
            # without this RELION damps by its own dose filter
            "rlnCtfBfactorPerElectronDose": f"{tomogram.bfactor_per_dose:g}",
        }
        for name, tomogram in tomograms.items()
    ]
    return {"global": pd.DataFrame(rows), **{name: _tilts(tomogram) for name, tomogram in tomograms.items()}}


def _tilts(tomogram: Tomogram) -> pd.DataFrame:
    projection = {
        # + 0.0: no negative zeros
        f"rlnTomoProj{axis}": ["[" + ",".join(f"{value:.9g}" for value in row + 0.0) + "]" for row in rows]
        for axis, rows in zip("XYZW", np.moveaxis(tomogram.projection, 1, 0), strict=True)
    }
    defocus = np.column_stack([tomogram.defocus, tomogram.defocus, 0 * tomogram.defocus])
    return pd.DataFrame(
        projection
        | number_columns(["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"], defocus, 2)
        | number_columns(["rlnCtfScalefactor"], tomogram.scale[:, None], 6)
        | number_columns(["rlnMicrographPreExposure"], tomogram.exposure[:, None], 3)
    )


def _microscope(optics: Optics) -> dict[str, str]:
    return {
        "rlnTomoTiltSeriesPixelSize": f"{optics.pixel_size:.7g}",
        "rlnVoltage": f"{optics.voltage:g}",
        "rlnSphericalAberration": f"{optics.cs:g}",
        "rlnAmplitudeContrast": f"{optics.amplitude:g}",
    }
