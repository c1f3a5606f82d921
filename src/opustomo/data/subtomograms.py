"""Tilt images as 3-D: the numerator and the weight of every particle as RELION 4's pseudo-subtomograms.

Owns: their files and STAR.  The volume is what the images say in the tomogram's frame, ``sum_t P_t^T c_t y_t / s_t``,
and the weight volume holds ``sum_t c_t^2 / s_t`` (METHOD section 3), both by the back-projection of the cache.  s_t is
the noise level of an image over that of the set's median image, so that grey values stay those of the images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opustomo.data.angles import to_euler
from opustomo.data.mrc import write_volume
from opustomo.data.observe import Noise, observe_all, sample_rows, tilt_rows
from opustomo.data.particles import Particles
from opustomo.data.readers import relion
from opustomo.data.readers.source import Source
from opustomo.data.stacks import read_stack
from opustomo.data.star import Block, number_columns, write_star
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies, from_band
from opustomo.physics.grid import Grid
from opustomo.physics.observation import insert_tilts

SAMPLE = 64  # particles that the median noise level is taken from
# of one image, not of the particle; and what the written files replace
_OF_IMAGES = (
    "rlnTomoVisibleFrames", "rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi", "rlnDefocusU",
    "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor", "rlnMicrographPreExposure",
    *relion.ANGLES, "rlnImageName", "rlnCtfImage", "rlnMagnification",
    "rlnDetectorPixelSize",
    *(f"rlnOrigin{axis}{unit}" for axis in relion.AXES for unit in ("", "Angst")),
)  # fmt: skip


def prepare(particles: Particles, source: Source, output: Path, workers: int = 0) -> Iterator[int]:
    """Write subtomograms, weights and, last, ``particles.star`` to ``output``; yields the number of each finished one.

    source: the table that the particles were read from.  Of an optimisation set also
    ``particles_optimisation_set.star``, which names the tomograms.
    UserError: no tilt images, ``output`` holds a set already.
    """
    star = output / "particles.star"
    if not particles.stacks:
        raise UserError(
            f"{particles.source}: has subtomograms already ({particles.dialect}), which need no preparation; give tilt "
            "images (an optimisation set, or one row for each image)"
        )
    if star.exists():
        raise UserError(f"-o {output}: holds particles.star already; choose another folder")
    grid = Grid(particles.box, particles.pixel_size, particles.box, particles.box, 16)
    levels = [read_stack(particles, int(i), grid).level for i in sample_rows(len(particles), SAMPLE)]
    ones = torch.ones(len(band_frequencies(grid.box)))
    noise = Noise(ones / float(torch.cat(levels).median()), 1.0, False, torch.zeros(1))
    # in the subtomogram's own frame, the middle of the box left where it is
    untouched = replace(particles, rotation=np.tile(np.eye(3), (len(particles), 1, 1)), origin=0 * particles.origin)

    def write(i: int, numerator: Tensor, weight: Tensor) -> None:
        _, multiplicity = insert_tilts(grid.box, tilt_rows(particles, i), grid.extent)
        halves = torch.cat([from_band(weight, grid.box), from_band(multiplicity, grid.box)])
        write_volume(output / image_name(i), numerator.numpy(), particles.pixel_size)
        write_volume(output / weight_name(i), halves.numpy(), particles.pixel_size)

    made = observe_all(untouched, range(len(particles)), grid, noise, workers, then=write)
    yield from (i for i, _, _ in made)
    write_star(star, _blocks(particles, source))
    if source.tomograms is not None:
        tomograms = os.path.relpath(source.tomograms.resolve(), output.resolve())
        pair = {"rlnTomoParticlesFile": star.name, "rlnTomoTomogramsFile": tomograms}
        write_star(output / "particles_optimisation_set.star", {"": pair})


def image_name(i: int) -> str:
    """Subtomogram of particle i, relative to the STAR file; numbered from 1."""
    return f"subtomo/p{i + 1:06d}.mrc"


def weight_name(i: int) -> str:
    """Its weight volume."""
    return f"subtomo/p{i + 1:06d}_weight.mrc"


def _blocks(particles: Particles, source: Source) -> dict[str, Block]:
    """Optics and particles: columns that are of the particle are kept, with its pose in the tomogram's frame."""
    old = source.table.particles
    assert len(old) == len(particles)
    # coordinates of one row for each image are those in the image
    dropped = (*_OF_IMAGES, *(f"rlnCoordinate{axis}" for axis in relion.AXES if source.format == "series"))
    table = old[[name for name in old if name not in dropped]].copy()
    table["rlnTomoParticleName"] = particles.names
    if "rlnTomoName" not in table:
        table["rlnTomoName"] = [str(name) or "unknown" for name in particles.tomogram]
    table["rlnImageName"] = [image_name(i) for i in range(len(particles))]
    table["rlnCtfImage"] = [weight_name(i) for i in range(len(particles))]
    poses = np.hstack([to_euler(particles.rotation), particles.origin * particles.pixel_size])
    names = (*relion.ANGLES, *(f"rlnOrigin{axis}Angst" for axis in relion.AXES))
    table = table.assign(**number_columns(names, poses, 6))
    stated = {name: f"{value:g}" for name, value in relion.microscope(source.table).items()}
    new = {
        "rlnImagePixelSize": f"{particles.pixel_size:.7g}",
        "rlnImageSize": str(particles.box),
        "rlnImageDimensionality": "3",
        "rlnCtfDataAreCtfPremultiplied": "1",
    }
    if source.table.optics_block is not None:
        optics = source.table.table(source.table.optics_block).assign(**new)
    else:
        optics = pd.DataFrame([{"rlnOpticsGroup": "1", "rlnOpticsGroupName": "opticsGroup1", **stated, **new}])
    if "rlnOpticsGroup" not in table:
        table["rlnOpticsGroup"] = str(optics["rlnOpticsGroup"].iloc[0])
    return {"optics": optics, "particles": table}
