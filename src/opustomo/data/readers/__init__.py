"""Readers: one particle table from any dialect.

Owns: the order of the decisions (dialect, files, box, pixel size, poses, transfer) and the notes about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.config import InputOptions
from opustomo.data.mrc import header_of
from opustomo.data.particles import SCALE, TILT_COLUMNS, Normalisation, Particles, refuse_most
from opustomo.data.readers import optimisation_set, relion, sampling, series
from opustomo.data.readers.ctf_volume import read_transfer_volume
from opustomo.data.readers.files import Locator
from opustomo.data.readers.source import Source, read_source
from opustomo.data.readers.transfer import find_transfer
from opustomo.errors import UserError
from opustomo.physics.geometry import euler_to_matrix

__all__ = ["poses_of", "read_particles", "read_transfer_volume", "with_poses"]


def read_particles(star: Path, options: InputOptions, pack: Path | None = None) -> Particles:
    """Read a particle STAR file or an optimisation set (P particles) with everything its particles refer to.

    options: the dialect (``--format``), cross-checks (``-D``, ``--angpix``, ``--relion31``), ``--datadir`` and the
    normalisation.  UserError (one line, with the fix): any file missing, column missing, box or pixel size in
    disagreement, particle without CTF.  Every decision is a sentence in ``notes``, the dialect first.
    pack: a file that keeps the tilts of per-particle CTF STARs (see ``ctf_star.read_tilts``).
    """
    source = read_source(star, options.format, options.datadir)
    table, stacks = source.table, source.format in ("relion5", "series")
    dialect, note = _dialect(source, options)
    locator = Locator(table.path, options.datadir)
    named = series.stack_names(source) if source.format == "series" else [str(n) for n in relion.image_names(table)]
    names = relion.identities(table)
    images = locator.require(named, "stacks" if stacks else "subtomograms", most=options.damaged == "skip")
    good, faults = readable(images, source, options)
    notes = [note]
    if locator.outside_datadir(images):
        notes.append(f"--datadir {options.datadir} was not needed: the particles are in {images[0].parent}")
    box, box_note = sampling.box_size(good, star, relion.image_size(table), options, stacks)
    pixel_size, pixel_note = sampling.pixel_size(good, star, relion.pixel_size(table), options)
    notes += [box_note, pixel_note]
    fields = partial(_of_tilt_images, good=good) if stacks else partial(_of_subtomograms, locator=locator, pack=pack)
    found = Particles(
        source=star.absolute(),
        dialect=dialect,
        star=table,
        names=names,
        faults=faults,
        image_files=images,
        coordinates=relion.coordinates(table),
        tomogram=relion.tomograms(table),
        half=relion.halves(table),
        box=box,
        pixel_size=pixel_size,
        premultiplied=relion.premultiplied(table),
        normalisation=_normalisation(options),
        **fields(source, images, box, pixel_size, options, notes),
    )
    return found if options.tilt_limit is None else _within(found, options.tilt_limit)


def _within(particles: Particles, limit: float) -> Particles:
    """The same with tilts further than ``limit`` degrees from 0 excluded; UserError: tilts not known, none left."""
    if not 0 <= limit <= 90:
        raise UserError(f"--tilt-limit {limit:g}: give degrees, 0 to 90")
    if particles.transfer != "tilts":
        raise UserError(
            f"--tilt-limit {limit:g}: the CTFs of {particles.source} are volumes, which do not tell tilts apart; leave "
            "it out"
        )
    tilts = np.array(particles.tilts)
    # an image seen from behind is the same projection
    angle = np.rad2deg(np.arcsin(np.abs(np.sin(np.deg2rad(tilts[:, TILT_COLUMNS.index("tilt")])))))
    beyond = (angle > limit) & (tilts[:, SCALE] != 0)
    tilts[beyond, SCALE] = 0
    kept = np.diff(np.append(0, np.cumsum(tilts[:, SCALE] != 0))[particles.tilt_offsets])
    if particles.faults is None and (kept == 0).any():  # else they are told with the damaged ones
        name = particles.names[kept.argmin()]
        raise UserError(f"--tilt-limit {limit:g}: leaves particle {name} of {particles.source} no tilt; give more")
    note = f"{beyond.sum()} of {len(beyond)} tilts are further than --tilt-limit {limit:g} from 0 and left out"
    return replace(particles, tilts=tilts, notes=(*particles.notes, note))


def _of_subtomograms(
    source: Source, images: tuple[Path, ...], box: int, pixel_size: float, options: InputOptions, notes: list[str],
    locator: Locator, pack: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Poses, transfer functions and notes of 3-D subtomograms, as fields of ``Particles``."""
    table = source.table
    euler = relion.eulers(table)
    origin, origin_note = relion.origins(table, pixel_size)
    transfer = find_transfer(table, images, locator, box, pack)
    if transfer.transfer == "tilts" and relion.premultiplied(table):
        raise UserError(
            f"{table.path}: rlnCtfDataAreCtfPremultiplied is 1 but the CTF comes from CTF files of each particle: it "
            "would be applied twice; give the weight volumes in rlnCtfImage (move the CTF files away), or set it "
            "to 0"
        )
    fields = transfer._asdict()
    notes = [*notes, origin_note, fields.pop("note")]
    return fields | {"euler": euler, "rotation": _matrices(euler), "origin": origin, "notes": tuple(notes)}


def _of_tilt_images(
    source: Source, images: tuple[Path, ...], box: int, pixel_size: float, options: InputOptions, notes: list[str],
    good: list[Path],
) -> dict[str, Any]:  # fmt: skip
    """The same of stacks of tilt images."""
    if options.normalisation != "auto":
        raise UserError(
            f"--normalisation {options.normalisation}: {source.whole.path} has tilt images, which are not combined; "
            "leave it out"
        )
    if source.format == "series":
        found = series.read_series(source, pixel_size)
    else:
        found = optimisation_set.read_tilt_series(source, images, pixel_size, options.datadir, good)
    if relion.constant(source.table, relion.PREMULTIPLIED) is None:
        kind = f"taken as not CTF-premultiplied, the file has no {relion.PREMULTIPLIED}"
    else:
        kind = "CTF-premultiplied" if relion.premultiplied(source.table) else "not CTF-premultiplied"
    notes = [*notes, *found.notes, f"the images are {kind}"]
    return found._asdict() | {"transfer": "tilts", "ctf_files": (), "notes": tuple(notes)}


def readable(images: Sequence[Path], source: Source, options: InputOptions) -> tuple[list[Path], dict[str, str] | None]:
    """Files to read sizes from, and with ``--damaged skip`` why those of the other particles, by name, are none.

    From all headers then, as ``check`` does; UserError where most cannot be read.
    """
    if options.damaged == "stop":
        return list(images), None
    good, faults = [], {}
    for path, name in zip(images, relion.identities(source.table), strict=True):
        try:
            header_of(path)
            good.append(path)
        except UserError as error:
            faults[name] = str(error)
    refuse_most(len(images) - len(good), len(images), source.table.path, faults)
    return good, faults


def poses_of(source: Source, pixel_size: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (P, 3, 3) and origins (P, 3) in pixels of ``pixel_size`` Angstrom, as read_particles, from the tables alone."""
    if source.format == "series":
        found = series.read_series(source, pixel_size)
        return found.rotation, found.origin
    if source.format == "relion5":
        return optimisation_set.poses(source.table, pixel_size)[1:3]
    return _matrices(relion.eulers(source.table)), relion.origins(source.table, pixel_size)[0]


def with_poses(
    particles: Particles, rotation: NDArray[Any], origin_fraction: NDArray[Any], euler: NDArray[Any]
) -> Particles:
    """The same particles with the poses of a pose pickle.

    rotation: (P, 3, 3) A of METHOD section 2; origin_fraction: (P, 3) origins as a fraction of the box; euler: (P, 3)
    degrees.  Where the matrices are not those of the Euler angles (other programs store the transpose) the angles,
    whose convention is RELION's, are used and a note says so.  UserError naming both counts when P differs.
    """
    if not len(rotation) == len(origin_fraction) == len(euler) == len(particles):
        raise UserError(
            f"--poses has {len(euler)} poses but {particles.source} has {len(particles)} particles; make the pose "
            "pickle from this STAR file with `dsdsh prepare`"
        )
    angles = np.asarray(euler, np.float64)
    matrices = _matrices(angles)
    notes = (*particles.notes, "poses from the pose pickle instead of the STAR file")
    if np.abs(matrices - rotation).max() < 1e-3:
        # the stored matrices carry corrections at float32 precision that the angles may have lost near tilt 0
        matrices = np.asarray(rotation, np.float64)
    else:
        notes += ("the matrices of the pose pickle disagree with its Euler angles: the angles are used",)
    origin = np.asarray(origin_fraction, np.float64) * particles.box
    return replace(particles, rotation=matrices, origin=origin, euler=angles, notes=notes)


def _dialect(source: Source, options: InputOptions) -> tuple[str, str]:
    """What messages call the dialect, and a note on how it was recognised."""
    table = source.table
    version = relion.version(table)
    if options.relion31 and version == "RELION 3.0":
        raise UserError(
            f"--relion31: {table.path} has no data_optics table, it is RELION 3.0 (block data_{table.particle_block}); "
            "leave --relion31 out"
        )
    dialect = {"relion3": version, "relion4": "RELION 4", "relion5": "RELION 5", "series": "tilt images"}[source.format]
    note = f"{dialect}: {len(source)} particles in block data_{table.particle_block}"
    return dialect, f"{note}: {source.why}" if source.why else note


def _normalisation(options: InputOptions) -> Normalisation:
    return "unknown" if options.normalisation == "auto" else options.normalisation


def _matrices(euler: NDArray[np.float64]) -> NDArray[np.float64]:
    return euler_to_matrix(torch.from_numpy(euler)).numpy()
