"""Which dialect a file is written in: the particle table of a data set before anything else of it is read.

Owns: how a dialect is recognised, and the one table of particles that all of them have: where every tilt image has a
row of its own, the first row of each particle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from opustomo.data.particles import particle_numbers, turn_of_each
from opustomo.data.readers import relion
from opustomo.data.readers.files import Locator
from opustomo.data.star import StarFile, read_star
from opustomo.errors import UserError

Format = Literal["relion3", "relion4", "relion5", "series"]


@dataclass(frozen=True)
class Source:
    """The particle table (P rows) and the files it comes from."""

    format: Format
    why: str  # how that was recognised, "" where nothing marks it
    table: StarFile  # one row for each particle
    whole: StarFile  # the file of the table, all rows: what is written back
    rows: tuple[NDArray[np.int64], ...] | None = None  # (P,) of each particle in ``whole``; None: its own row alone
    optimisation: StarFile | None = None
    tomograms: Path | None = None

    def __len__(self) -> int:
        return len(self.table.particles)

    @property
    def stacks(self) -> bool:
        """Whether particles are stacks of tilt images, with poses in the tomogram's frame."""
        return self.format in ("relion5", "series")

    @property
    def files_are(self) -> str:
        """What messages call the files of the particles."""
        return "stacks" if self.stacks else "subtomograms"

    @property
    def name(self) -> str:
        """What messages call the dialect."""
        version = relion.version(self.table)
        return {"relion3": version, "relion4": "RELION 4", "relion5": "RELION 5", "series": "tilt images"}[self.format]

    def refuse_version(self, relion31: bool) -> None:
        """UserError where ``--relion31`` is stated of a file that is older."""
        if relion31 and relion.version(self.table) == "RELION 3.0":
            raise UserError(
                f"--relion31: {self.table.path} has no data_optics table, it is RELION 3.0 (block "
                f"data_{self.table.particle_block}); leave --relion31 out"
            )

    def rows_of(self, index: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of ``whole`` of the particles at ``index``, and which of these each belongs to."""
        if self.rows is None:
            return np.asarray(index, np.int64), np.arange(len(index))
        chosen = [self.rows[int(i)] for i in index]
        return np.concatenate(chosen), np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])

    def subset(self, index: NDArray[np.integer]) -> Source:
        """The particles at ``index`` alone, with their rows, in both tables."""
        rows, member = self.rows_of(index)
        ends = np.cumsum(np.bincount(member))[:-1]
        split = None if self.rows is None else tuple(np.split(np.arange(len(rows)), ends))
        return replace(
            self, table=self.table.with_rows(np.asarray(index)), whole=self.whole.with_rows(rows), rows=split
        )


def read_source(path: Path, stated: Format | Literal["auto"] = "auto", datadir: Path | None = None) -> Source:
    """Read the particle table of ``path``, a particle STAR or an optimisation set, and recognise its dialect.

    stated: ``--format``, instead of what is recognised.  UserError: files missing, no table of particles.
    """
    given = read_star(path)
    optimisation = tomograms = None
    whole, block = given, next((b for b in given.blocks if given.has(b, "rlnTomoParticlesFile")), None)
    if block is not None:
        optimisation, names = given, _files(given, block)
        found = Locator(path, datadir).require(list(names.values()), "files of the optimisation set")
        files = dict(zip(names, found, strict=True))
        whole, tomograms = read_star(files["rlnTomoParticlesFile"]), files.get("rlnTomoTomogramsFile")
    if any(whole.has(whole.particle_block, name) for name in ("wrpCoordinateX1", "wrpCoordinateX")):
        raise UserError(
            f"{whole.path}: is a species of M, which names no images; export its particles and give their STAR file "
            f"with --poses {whole.path}, or cut boxes from tomograms with `opustomo extract`"
        )
    kind, why = _recognise(whole)
    if stated != "auto" and stated != kind:
        kind, why = stated, f"as --format says; recognised was {kind}"
    if kind == "series":
        return _series(whole, why)
    return Source(kind, why, whole, whole, None, optimisation, tomograms)


def _files(star: StarFile, block: str) -> dict[str, str]:
    names = ("rlnTomoParticlesFile", "rlnTomoTomogramsFile")
    return {name: str(star.text(block, name, "the set")[0]) for name in names if star.has(block, name)}


def _recognise(star: StarFile) -> tuple[Format, str]:
    if relion.has_stacks(star):
        return "relion5", "stacks of tilt images (rlnTomoSubTomosAre2DStacks)"
    if relion.has_series(star):
        return "series", "one row for each tilt image (@ in rlnImageName)"
    if star.has(star.particle_block, "rlnTomoParticleName") and relion.premultiplied(star):
        return "relion4", "pseudo-subtomograms (rlnTomoParticleName, premultiplied)"
    return "relion3", ""


def _series(whole: StarFile, why: str) -> Source:
    if not relion.has_series(whole):
        raise UserError(
            f"{whole.path}: --format series: rlnImageName {relion.image_names(whole)[0]} is not an image of a stack "
            "(7@stack.mrcs); leave --format out"
        )
    # an image that a particle has twice is of a copy of it (``expand``)
    particle, image = (particle_numbers(names) for names in (relion.identities(whole), relion.image_names(whole)))
    copy = turn_of_each(particle * (image.max() + 1) + image)
    member = particle_numbers(particle * (copy.max() + 1) + copy)
    _refuse_parts_of_copies(whole, particle, copy)
    by_particle = np.argsort(member, kind="stable")
    rows = np.split(by_particle, np.cumsum(np.bincount(member))[:-1])
    first = whole.with_rows(np.array([row[0] for row in rows]))
    return Source("series", why, first, whole, tuple(rows))


def _refuse_parts_of_copies(whole: StarFile, particle: NDArray[np.int64], copy: NDArray[np.int64]) -> None:
    """UserError naming a row that is there twice, where others of its particle are not: it is no copy of a particle."""
    found = np.zeros((particle.max() + 1, copy.max() + 1), np.int64)
    np.add.at(found, (particle, copy), 1)
    part = (found != found[:, :1]) & (found > 0)
    if part.any():
        row = np.flatnonzero(part[particle, copy])[0]
        image, name = relion.image_names(whole)[row], relion.identities(whole)[row]
        raise UserError(
            f"{whole.path}: row {row + 1}: image {image} of particle {name} is there twice, other images of this "
            "particle are not; remove one of the two rows"
        )
