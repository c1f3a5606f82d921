"""The verb ``export``: the classes of a run handed back to the programs that the data came from, and to the tomograms.

Owns: the files of the export folder.  Subsets, classes and manifest are those of ``select``.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from opustomo.analysis.made_from import stored
from opustomo.analysis.selection import (
    Classes,
    class_folder,
    first_of_classes,
    read_classes,
    write_classes,
    write_manifest,
)
from opustomo.config import ExportConfig
from opustomo.data.angles import to_matrix
from opustomo.data.atomic import atomic
from opustomo.data.export import refuse_ambiguous, write_subset, written_paths
from opustomo.data.lists.write import read_sources, write_list
from opustomo.data.mapback import write_scripts
from opustomo.data.particles import particle_numbers, turn_of_each
from opustomo.data.places import Places, places_of
from opustomo.data.readers import poses_of, relion
from opustomo.errors import UserError

log = logging.getLogger(__name__)


def main(config: ExportConfig) -> int:
    """``opustomo export``."""
    values = stored(config.run)
    if config.star is None and "star" not in values:
        raise UserError(
            f"{config.run}: no run folder of train, linear or encode (no config.yaml that names a STAR file)"
        )
    if (config.format == "m") != (config.m_source is not None):
        need = "needs --m-source, M's data source" if config.format == "m" else "does without --m-source"
        raise UserError(f"--format {config.format}: {need} (NAME.source); give both or neither")
    star = config.star or Path(values["star"])
    chosen = read_classes(config, star)
    refuse_ambiguous(chosen.source.table)
    places = _places(config, chosen, float(values["pixel_size"]))
    paths: list[Path] = []
    if config.format == "same":
        path = config.output / "particles.star"
        write_subset(chosen.source, chosen.rows, path, chosen.labels, chosen.poses, config.unique)
        paths += [path, *write_classes(chosen, config.output, config.unique)]
        paths += [written for path in paths for written in written_paths(chosen.source, path)[1:]]
    elif places is not None:
        paths += _write_lists(config, places, chosen)
    paths.append(_write_members(config.output / "particles.csv", chosen))
    if places is not None:
        box, pixel = int(values["box"]), float(values["pixel_size"])
        maps = _maps(config, chosen)
        folder = config.output / "mapback"
        kept = first_of_classes(chosen) if config.unique else np.ones(len(chosen.rows), bool)
        paths += write_scripts(folder, places.at(kept), chosen.labels[kept], maps, (box // 2) * pixel, box * pixel / 8)
    files = [star, *_files(chosen)]
    sums = {str(file.absolute()): hashlib.sha256(file.read_bytes()).hexdigest() for file in dict.fromkeys(files)}
    more = {
        "format": config.format,
        "command": shlex.join(sys.argv),
        "sha256": sums,
        "coordinate_pixel_size": None if places is None else places.pixel_size,
    }
    write_manifest(config, star, chosen, paths, more)
    log.info("wrote %d files in %s, see manifest.json", len(paths) + 1, config.output)
    return 0


def _files(chosen: Classes) -> list[Path]:
    """The files that the particles were read from."""
    tomograms = chosen.source.tomograms
    return [chosen.source.whole.path, *([] if tomograms is None else [tomograms])]


def _places(config: ExportConfig, chosen: Classes, pixel_size: float) -> Places | None:
    """Where the particles of the run are; None, with a line in the log, where a STAR file does not need to know it."""
    rotation, origin = poses_of(chosen.source, pixel_size)
    if chosen.poses is not None:
        rotation, origin = rotation.copy(), origin.copy()
        rotation[chosen.rows] = to_matrix(chosen.poses.euler)
        origin[chosen.rows] = chosen.poses.origin
    datadir = stored(config.run).get("datadir")
    folder = Path(datadir) if datadir else None
    try:
        places = places_of(chosen.source, rotation, origin, pixel_size, config.coords_angpix, folder)
    except UserError as error:
        if config.format != "same":
            raise
        log.warning("no map-back scripts: %s", error)
        return None
    log.info("coordinates count voxels of %g A; if that is not so, give --coords-angpix", places.pixel_size)
    return places.at(chosen.rows)


def _write_lists(config: ExportConfig, places: Places, chosen: Classes) -> list[Path]:
    """A list of all particles and one of each class."""
    assert config.format != "same"
    labels, rows = chosen.labels, chosen.rows
    half, names = relion.halves(chosen.source.table)[rows], relion.identities(chosen.source.table)[rows]
    sources = read_sources(config.m_source) if config.m_source is not None else {}
    parts = {"particles": np.ones(len(labels), bool)} | {f"pre{i}": labels == i for i in np.unique(labels)}
    if config.unique:
        first = turn_of_each(names) == 0
        of_class = first_of_classes(chosen)
        parts = {name: part & (first if name == "particles" else of_class) for name, part in parts.items()}
        log.info("%d copies of %d particles left out", len(first) - first.sum(), first.sum())
    for name, part in parts.items():
        path = config.output / f"{name}.star"
        own = half[part]
        if config.format == "m":  # which knows no particle without a half set
            own = np.where(own > 0, own, 1 + particle_numbers(names[part]) % 2)
        write_list(path, config.format, places.at(part), own, labels[part], sources)
    return [config.output / f"{name}.star" for name in parts]


def _write_members(path: Path, chosen: Classes) -> Path:
    """Which particle is of which class."""
    table, rows = chosen.source.table, chosen.rows
    columns = {
        "row": rows + 1,
        "particle": relion.identities(table)[rows],
        "tomogram": relion.tomograms(table)[rows],
        "half": relion.halves(table)[rows],
        "class": chosen.labels,
    }
    with atomic(path) as temporary:
        pd.DataFrame(columns).to_csv(temporary, index=False)
    return path


def _maps(config: ExportConfig, chosen: Classes) -> dict[int, Path]:
    """The decoded map of every class; none, with the command that makes them, where one is missing."""
    if stored(config.run).get("kind") == "map":
        return {0: config.run / "average.mrc"}
    name, option = class_folder(config)
    folder = config.run / f"analyze.{chosen.epoch}" / name
    maps = {int(label): folder / f"reference{label}.mrc" for label in np.unique(chosen.labels)}
    if all(path.is_file() for path in maps.values()):
        return maps
    log.info(
        "markers instead of maps: %s has no maps of all classes; `opustomo volumes %s %s --epoch %d` makes them",
        folder, config.run, option, chosen.epoch,
    )  # fmt: skip
    return {}
