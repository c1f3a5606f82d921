"""What a run was made from, found again: its particles in their STAR file, and their rows in the cache.

Owns: that codes and classes are joined to no other particles than those of the run, in its order.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opustomo.data.cache import open_cache
from opustomo.data.export import fingerprint_of
from opustomo.data.particles import particle_numbers
from opustomo.data.pickles import load_indices
from opustomo.data.readers.relion import identities
from opustomo.data.readers.source import Source, read_source
from opustomo.data.star import StarFile
from opustomo.errors import UserError
from opustomo.reconstruct import Rows
from opustomo.stored import read_config

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)


def stored(run: Path) -> dict[str, Any]:
    """config.yaml of a run, {} where there is none."""
    return read_config(run) if (run / "config.yaml").is_file() else {}


def source_of(star: Path, config: dict[str, Any]) -> Source:
    """The particles of ``star``, found and read as a run with this config.yaml did."""
    datadir = config.get("datadir")
    return read_source(star, config.get("format") or "auto", Path(datadir) if datadir else None)


def rows_of_run(run: Path, star: StarFile) -> NDArray[np.int64] | None:
    """Rows of the STAR file that a run was made from (``--ind``), None for all of them.

    UserError: the file given with ``--ind`` is gone or does not fit, or the particles are not the run's, in its order.
    """
    values = stored(run)
    rows = load_indices(Path(values["ind"]), len(star.particles)) if values.get("ind") else None
    names = identities(star) if rows is None else identities(star)[rows]
    known, count = values.get("identity"), values.get("particles")
    # another number of particles is named with both numbers where labels meet rows
    if known is not None and len(names) == count and fingerprint_of(names) != known:
        raise UserError(
            f"{star.path}: other particles than {run} was made from, or in another order, so its classes do not fit; "
            f"give {values.get('star', 'the STAR file of the run')}"
        )
    return rows


def rows_of(star: StarFile, labels: NDArray[np.integer], rows: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Row of ``star`` that each label speaks of."""
    rows = np.arange(len(star.particles)) if rows is None else rows
    if len(rows) != len(labels):
        raise UserError(
            f"{star.path}: has {len(rows)} particles but there are {len(labels)} labels; "
            "give the STAR file the run was trained on"
        )
    return rows


def run_particles(run: Run) -> tuple[Source, NDArray[np.int64]] | None:
    """The run's particles in their STAR file, and its rows; None where it is gone or, with a warning, another one.

    Particles may be elsewhere by now; their codes are here.
    """
    if not run.star.is_file():
        return None
    try:
        source = source_of(run.star, run.config)
        own = rows_of_run(run.path, source.table)
    except UserError as error:
        log.warning("what the STAR file says of the particles is not used: %s", error)
        return None
    rows = np.arange(len(source)) if own is None else own
    return (source, rows) if len(rows) == len(run.codes) else None


def particle_of_rows(run: Run) -> NDArray[np.int64]:
    """(P,) which particle each row of a run is of, by ``particle_numbers``; without the STAR file each is its own."""
    known = run_particles(run)
    if known is None:
        log.warning("%s: no STAR file that tells copies of particles (expand): taken as without", run.path)
        return np.arange(len(run.codes))
    source, rows = known
    return particle_numbers(identities(source.table)[rows])


def open_rows(run: Run) -> Rows:
    """The run's cache; UserError, with the fix, when it is absent, or of another grid or number of particles."""
    folder = Path(run.config.get("rows") or run.path / "cache")
    if not folder.is_dir() and (run.path / folder.name).is_dir():
        folder = run.path / folder.name  # the run has moved
    cache = open_cache(folder)
    if len(cache) != len(run.codes) or cache.grid[:4] != run.grid[:4]:
        raise UserError(f"{folder}: is of other particles, another mask or --downfrac than {run.path}; make it again "
                        f"with `opustomo cache {run.star} -o {folder}` and the options of the run")  # fmt: skip
    return cache
