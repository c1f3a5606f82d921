"""Readers: one particle table from any dialect.

Owns: the dialects there are, and the order of the decisions (dialect, files, box, pixel size, poses, transfer).

A dialect is a module with the four functions of ``dialect.Dialect``.  Another one takes four steps:

1. ``source.py``: its name in ``Format``, in ``_recognise`` the mark by which a file of it is known, and in ``Source``
   what messages call it and whether its particles are stacks.  (The name also in ``InputOptions.format``.)
2. A module here: columns, units and signs of the file become rotations, origins in pixels and tilts, in the terms of
   docs/conventions.md.  ``subtomograms`` is the shortest one; ``relion`` has the columns that most files share.
3. Its line in ``DIALECTS``, below.
4. A set of it in tests/dialect_writers.py, with that program's own names and signs: every dialect must give the same
   map, and come back from ``select`` as it was.

Cache, checks and export see a table ``Particles``, or call the functions through ``DIALECTS``; only ``places`` and the
writer ``data.subtomograms`` ask whether a table has one row for each image.  Lists of places without images (STOPGAP,
Dynamo, M, ...) are no dialects: see ``data.lists``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.config import InputOptions
from opustomo.data.particles import Particles
from opustomo.data.readers import optimisation_set, relion, sampling, series, subtomograms
from opustomo.data.readers.ctf_volume import read_transfer_volume
from opustomo.data.readers.dialect import Dialect, Opened
from opustomo.data.readers.files import Locator
from opustomo.data.readers.source import Format, Source, read_source
from opustomo.errors import UserError

__all__ = ["DIALECTS", "particles_of", "poses_of", "read_particles", "read_transfer_volume"]

DIALECTS: dict[Format, Dialect] = {
    "relion3": subtomograms,
    "relion4": subtomograms,
    "relion5": optimisation_set,
    "series": series,
}


def read_particles(star: Path, options: InputOptions, pack: Path | None = None) -> Particles:
    """Read a particle STAR file or an optimisation set (P particles) with everything its particles refer to.

    options: the dialect (``--format``), cross-checks (``-D``, ``--angpix``, ``--relion31``), ``--datadir``, the
    normalisation and ``--tilt-limit``.  UserError (one line, with the fix): any file missing, column missing, box or
    pixel size in disagreement, particle without CTF.  Every decision is a sentence in ``notes``, the dialect first.
    pack: a file that keeps the tilts of per-particle CTF STARs (see ``ctf_star.read_tilts``).
    """
    return particles_of(read_source(star, options.format, options.datadir), star, options, pack)


def particles_of(source: Source, star: Path, options: InputOptions, pack: Path | None = None) -> Particles:
    """``read_particles`` of a file ``star`` whose table has been read."""
    source.refuse_version(options.relion31)
    opened, faults, notes = _opened(source, star, options, pack)
    table, found = source.table, DIALECTS[source.format].read(opened)
    notes += found.notes
    if source.stacks:
        notes.append(f"the images are {_premultiplied_words(source)}")
    particles = Particles(
        source=star.absolute(),
        dialect=source.name,
        star=table,
        names=relion.identities(table),
        faults=faults,
        image_files=opened.images,
        coordinates=relion.coordinates(table),
        tomogram=relion.tomograms(table),
        half=relion.halves(table),
        box=opened.box,
        pixel_size=opened.pixel_size,
        premultiplied=relion.premultiplied(table),
        **found._replace(notes=tuple(notes))._asdict(),
    )
    return particles if options.tilt_limit is None else particles.within(options.tilt_limit)


def _opened(
    source: Source, star: Path, options: InputOptions, pack: Path | None
) -> tuple[Opened, dict[str, str] | None, list[str]]:
    """What a dialect's reader is given, ``Particles.faults`` so far, and notes: the files found, and their sizes."""
    locator = Locator(source.table.path, options.datadir)
    names, absent, faults = DIALECTS[source.format].image_files(source), None, None
    if options.damaged == "skip":
        images, absent = locator.require_most(names, source.files_are)
        readable, faults = sampling.readable(images, source)
    else:
        images = locator.require(names, source.files_are)
        readable = list(images)
    box, pixel_size, size_notes = sampling.agreed(star, source, readable, options)
    if source.stacks and options.normalisation != "auto":
        raise UserError(
            f"--normalisation {options.normalisation}: {source.whole.path} has tilt images, which are not combined; "
            "leave it out"
        )
    why = f": {source.why}" if source.why else ""
    notes = [f"{source.name}: {len(source)} particles in block data_{source.table.particle_block}{why}"]
    if locator.outside_datadir(images):
        notes.append(f"--datadir {options.datadir} was not needed: the particles are in {images[0].parent}")
    opened = Opened(source, options, locator, images, absent, readable, box, pixel_size, pack)
    return opened, faults, [*notes, *size_notes]


def poses_of(source: Source, pixel_size: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (P, 3, 3) and origins (P, 3) in pixels of ``pixel_size`` Angstrom, as read_particles, from the tables alone."""
    found = DIALECTS[source.format].poses(source, pixel_size)
    return found.rotation, found.origin


def _premultiplied_words(source: Source) -> str:
    if relion.constant(source.table, relion.PREMULTIPLIED) is None:
        return f"taken as not CTF-premultiplied, the file has no {relion.PREMULTIPLIED}"
    return "CTF-premultiplied" if relion.premultiplied(source.table) else "not CTF-premultiplied"
