"""The few calls that a script in Python needs: particles and what they say, a finished run, its maps and particles.

Owns: nothing but plain arguments.  ``import opustomo`` has these names and loads this module when one is used.  Paths
are strings or Paths; a mistake raises UserError, whose text is the line that the command would print.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from opustomo import checkpoint
from opustomo.analysis.made_from import rows_of_run, source_of
from opustomo.analysis.selection import classes_of, write_manifest
from opustomo.checkpoint import Run
from opustomo.config import GridOptions, InputOptions, SelectConfig
from opustomo.data import inputs, mrc, noise, readers
from opustomo.data import observe as observation
from opustomo.data.export import CorrectedPoses, write_subset
from opustomo.data.inputs import Inputs
from opustomo.data.observe import Noise
from opustomo.data.particles import Particles
from opustomo.errors import UserError

PathLike = str | Path


def read_particles(star: PathLike, **options: Any) -> Particles:
    """Every particle of a STAR file or an optimisation set with pose, files and tilts, in one set of units.

    options: fields of ``opustomo.config.InputOptions``, as on the command line (``datadir="/project"``).
    """
    return readers.read_particles(Path(star), _input(options))


def read_inputs(star: PathLike, mask: PathLike | None = None, downfrac: float = 0.5, **options: Any) -> Inputs:
    """Particles with the sizes of the working grid and the solvent mask on it; without a mask a sphere is used."""
    sizes = GridOptions(mask=None if mask is None else Path(mask), downfrac=downfrac)
    return inputs.read_inputs(Path(star), _input(options), sizes)


def estimate_noise(
    data: Inputs, contrast: str = "auto", normalisation: str = "auto", sample: int = noise.SAMPLE
) -> Noise:
    """Noise power, contrast sign and how tilts were combined, from ``sample`` particles spread over the file."""
    return noise.estimate_noise(
        data.particles, data.grid, data.mask, contrast=contrast, normalisation=normalisation, sample=sample
    )


def observe(data: Inputs, i: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """What particle i says of any volume, in the consensus frame: numerator (C, C, C) and weight (n,) on the band.

    CTF, missing wedge, pose and noise are in them; ``negative_log_likelihood`` takes them.
    """
    return observation.observe(data.particles, i, data.grid, noise)


def open_run(path: PathLike, epoch: int = -1) -> Run:
    """A run of ``train``, ``linear`` or ``encode`` at an epoch (from 0; -1: the latest): codes, poses, model."""
    return checkpoint.open_run(Path(path), epoch)


def read_volume(path: PathLike) -> tuple[NDArray[np.float32], float]:
    """An MRC volume, (z, y, x) float32, and its pixel size in Angstrom (0 where the header has none)."""
    return mrc.read_volume(Path(path))


def write_volume(path: PathLike, volume: ArrayLike, pixel_size: float) -> None:
    """Write a volume (z, y, x) as MRC, pixel size in Angstrom; the file is whole or not there."""
    mrc.write_volume(Path(path), np.asarray(volume), pixel_size)


def write_map(path: PathLike, volume: ArrayLike, run: Run) -> None:
    """Write one volume (C, C, C) of ``run.decode`` so that it lies over the consensus map in a viewer."""
    array = np.asarray(volume, np.float32)
    if array.shape != (run.grid.crop,) * 3:
        raise UserError(
            f"a volume of shape {array.shape} where {run.path} has {run.grid.crop} voxels a side; decode one"
        )
    checkpoint.write_map(Path(path), torch.from_numpy(array), run.grid)


def write_particles(
    folder: PathLike, run: Run, rows: Sequence[int] | NDArray[np.integer], star: PathLike | None = None,
    corrected: bool = False,
) -> Path:  # fmt: skip
    """Write ``folder/selected.star`` with some particles of a run, all columns kept, and manifest.json; the STAR file.

    rows: numbers of the particles in the run, from 0, or True for each that is taken.  star: the STAR file of the run
    where it has moved.  corrected: the poses of the run at its epoch in place of the file's.  UserError: rows that the
    run has not, no rows, another STAR file, poses that were not corrected.
    """
    typed = run.star if star is None else Path(star)
    config = SelectConfig(star=typed, run=run.path, output=Path(folder), corrected=corrected, epoch=run.epoch)
    if corrected and not run.config.get("estpose"):
        raise UserError(f"corrected=True: {run.path} has the poses of the STAR file (--no-estpose); leave it out")
    labels = np.where(_member(rows, len(run.codes)), 0, -1)
    source = source_of(typed, run.config)
    poses = CorrectedPoses(run.euler, run.origin, run.grid.pixel_size) if corrected else None
    chosen = classes_of(source, labels, rows_of_run(run.path, source.table), poses, run.epoch)
    path = config.output / "selected.star"
    write_subset(source, chosen.rows, path, poses=chosen.poses)
    how = {"kmeans": None, "classes": None, "selection": "by a script"}
    write_manifest(config, typed, chosen, [path], how)
    return path


def _member(rows: Sequence[int] | NDArray[np.integer], count: int) -> NDArray[np.bool_]:
    """(count,) whether each particle is among rows."""
    chosen = np.asarray(rows)
    if chosen.dtype == bool and chosen.shape == (count,):
        return chosen
    if chosen.size and (chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= count):
        raise UserError(f"rows are numbers from 0 to {count - 1}, or {count} times True or False; check them")
    return np.isin(np.arange(count), chosen)


def _input(options: dict[str, Any]) -> InputOptions:
    """Keywords as the options of the command line; TypeError for one that is none."""
    folder = options.get("datadir")
    return InputOptions(**options | {"datadir": None if folder is None else Path(folder)})
