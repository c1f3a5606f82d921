"""Classes back to STAR files (``opustomo select``), with a manifest that says where they come from.

Owns: the names of these files: ``preI.star`` for class I (0-based, as reference I), ``selected.star`` for a union or a
selection by hand.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opustomo import __version__
from opustomo.analysis.made_from import rows_of, rows_of_run, source_of, stored
from opustomo.analysis.picked import read_selection
from opustomo.analysis.places import stem
from opustomo.config import ClassChoice, ExportConfig, SelectConfig
from opustomo.data.atomic import write_text
from opustomo.data.export import CorrectedPoses, write_subset
from opustomo.data.particles import turn_of_each
from opustomo.data.pickles import load_labels, load_poses
from opustomo.data.readers.files import FOLDERS, MANIFEST, Locator
from opustomo.data.readers.relion import identities
from opustomo.data.readers.source import Source
from opustomo.errors import UserError
from opustomo.stored import read_config

log = logging.getLogger(__name__)


def main(config: SelectConfig) -> int:
    """Write one STAR per class, the union of ``classes`` or a selection, and ``manifest.json`` into the output."""
    if config.selection is not None and config.classes:
        raise UserError("--selection and --classes: give one of them")
    chosen = read_classes(config, config.star)
    if config.selection is not None:
        paths = [config.output / "selected.star"]
        write_subset(chosen.source, chosen.rows, paths[0], poses=chosen.poses, unique=config.unique)
    elif config.classes:
        paths = [_write_union(chosen, config)]
    else:
        paths = write_classes(chosen, config.output, config.unique)
    classes = sorted(set(config.classes)) or np.unique(chosen.labels).tolist()
    kept = {"selected": classes if config.selection is None else []}
    write_manifest(config, config.star, chosen, paths, kept)
    for path in paths:
        log.info("wrote %s", path)
    return 0


class Classes(NamedTuple):
    """Particles of a STAR file that are in a class, P of them (see ``classes_of``)."""

    source: Source
    labels: NDArray[np.int64]  # (P,) 0-based; all 0 where the run is one map (--encode-mode fixed)
    rows: NDArray[np.int64]  # (P,) of the particles in ``source``
    poses: CorrectedPoses | None = None  # of the particles, with --corrected
    epoch: int = 0

    def at(self, chosen: NDArray[np.bool_]) -> Classes:
        """Some of the particles."""
        poses = None if self.poses is None else self.poses.at(chosen)
        return self._replace(labels=self.labels[chosen], rows=self.rows[chosen], poses=poses)


def classes_of(
    source: Source,
    labels: NDArray[np.integer],
    rows: NDArray[np.int64] | None = None,
    poses: CorrectedPoses | None = None,
    epoch: int = 0,
) -> Classes:
    """The particles of ``source`` with a label of 0 or above.

    labels: of all of them, or of those at ``rows``; poses: of the same.  UserError: counts differ.
    """
    every = Classes(source, np.asarray(labels, np.int64), rows_of(source.table, labels, rows), poses, epoch)
    return every.at(every.labels >= 0)


def read_classes(config: SelectConfig | ExportConfig, star: Path) -> Classes:
    """The classes chosen by ``config`` of the particles of ``star``.

    UserError: no such classes or selection, another STAR file than the run's.
    """
    values = stored(config.run)
    picked = config.selection if isinstance(config, SelectConfig) else None
    if picked is not None:
        labels, epoch = _picked(config.run, picked), _epoch_of_poses(config.run, config.epoch)
    elif values.get("kind") == "map":
        labels, epoch = np.zeros(int(values["particles"]), np.int64), 0
    else:
        place = stem(config.codes, config.filtered)
        labels_file, epoch = find_labels(config.run, config.epoch, class_folder(config)[0], place)
        labels = load_labels(labels_file, -1 if config.filtered else 0)
    source = source_of(star, values)
    rows = rows_of_run(config.run, source.table)
    poses = _corrected(config.run, epoch) if config.corrected else None
    return classes_of(source, labels, rows, poses, epoch)


def _picked(run: Path, name: str) -> NDArray[np.int64]:
    """(P,) 0 for the particles of a selection by hand, -1 for the others."""
    labels = np.full(int(read_config(run)["particles"]), -1, np.int64)
    labels[read_selection(run, name)] = 0
    return labels


def _epoch_of_poses(run: Path, epoch: int) -> int:
    found = (re.fullmatch(r"pose\.(\d+)\.pkl", path.name) for path in run.glob("pose.*.pkl"))
    return epoch if epoch >= 0 else max((int(match[1]) for match in found if match), default=0)


def class_folder(config: ClassChoice) -> tuple[str, str]:
    """Folder of the classes below analyze.N, and the option of ``volumes`` for their maps."""
    chosen = [name for name in ("groups", "axis", "pc") if getattr(config, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]}: give one of --kmeans, --groups, --axis and --pc")
    if config.groups:
        return "groups", "--groups"
    name = chosen[0] if chosen else "kmeans"
    number = getattr(config, name)
    if number < 1:
        raise UserError(f"--{name} {number}: is counted from 1")
    return f"{name}{number}", f"--{name} {number}"


def find_labels(run: Path, epoch: int, name: str, place: str = "analyze") -> tuple[Path, int]:
    """``labels.pkl`` in analyze.N/``name`` (kmeansK, groups, axisJ, pcI) and its epoch (-1: the latest analysed).

    place: the analysis, see ``places.stem``.  UserError when there is none.
    """
    found = {}
    for path in run.glob(f"{place}.*/{name}/labels.pkl"):
        number = re.fullmatch(re.escape(place) + r"\.(\d+)", path.parent.parent.name)
        if number:
            found[int(number.group(1))] = path
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; check the name")
    chosen = max(found, default=-1) if epoch < 0 else epoch
    if chosen not in found:
        which = f"{place}.{epoch}" if epoch >= 0 else f"{place}.N"
        option = {"kmeans": "clusters", "pc": "pcs"}.get(kind := name.rstrip("0123456789"))
        command = f"opustomo analyze {run}" + (f" --{option} {name.removeprefix(kind)}" if option else "")
        command += f" --epoch {epoch}" if epoch >= 0 else ""
        hints = {"groups": ", which writes groups where an axis of axes.csv is discrete", "axis": ", see its axes.csv"}
        hint = hints.get(kind, "")
        raise UserError(f"{run}: has no {which}/{name}/labels.pkl; run `{command}`{hint}")
    return found[chosen], chosen


def write_classes(classes: Classes, outdir: Path, unique: bool = False) -> list[Path]:
    """Write ``outdir/preI.star`` for every class I that has particles; returns the files in order of I.

    unique: of copies of a particle in a class the first alone.  UserError: ambiguous identities.
    """
    paths = []
    for label in np.unique(classes.labels):
        part = classes.at(classes.labels == label)
        paths.append(outdir / f"pre{label}.star")
        write_subset(part.source, part.rows, paths[-1], poses=part.poses, unique=unique)
    return paths


def _write_union(classes: Classes, config: SelectConfig) -> Path:
    labels = classes.labels
    absent = sorted(set(config.classes) - set(labels.tolist()))
    if absent:
        raise UserError(
            f"--classes {absent[0]}: no particle has this class (classes are {labels.min()} .. {labels.max()}, "
            "as reference0.mrc ...); give existing ones"
        )
    part, path = classes.at(np.isin(labels, config.classes)), config.output / "selected.star"
    write_subset(part.source, part.rows, path, part.labels, part.poses, config.unique)
    return path


def _corrected(run: Path, epoch: int) -> CorrectedPoses:
    """The run's poses at an epoch; UserError where it did not correct them."""
    config = read_config(run)
    if not config.get("estpose"):
        raise UserError(f"--corrected: {run} has the poses of the STAR file (--no-estpose); leave --corrected out")
    stored = load_poses(run / f"pose.{epoch}.pkl")
    origin = np.asarray(stored.origin, float) * config["box"]
    return CorrectedPoses(np.asarray(stored.euler, float), origin, float(config["pixel_size"]))


def first_of_classes(classes: Classes) -> NDArray[np.bool_]:
    """(P,) whether a particle has no copy before it in its class: what ``--unique`` leaves of every class."""
    names = identities(classes.source.table)[classes.rows]
    return turn_of_each(zip(names, classes.labels.tolist(), strict=True)) == 0


def _looked_in(star: Path, run: Path) -> list[Path]:
    """Where the files that ``star`` names are looked for: by the run, which may have a --datadir, and now."""
    typed = stored(run).get("datadir")
    datadir = Path(typed) if typed and Path(typed).is_dir() else None
    return Locator(star, datadir).folders


def write_manifest(
    config: SelectConfig | ExportConfig, star: Path, classes: Classes, paths: list[Path], more: dict[str, Any]
) -> None:
    """``manifest.json`` of the output folder: that its files come from ``star`` and how; ``more`` is added."""
    labels = classes.labels
    if config.unique:
        labels = labels[first_of_classes(classes)]
    values, counts = np.unique(labels, return_counts=True)
    picked = config.selection if isinstance(config, SelectConfig) else None
    name = class_folder(config)[0] if picked is None else ""
    manifest = {
        "source": str(star.absolute()),
        "run": str(config.run.absolute()),
        "epoch": classes.epoch,
        "kmeans": config.kmeans if name.startswith("kmeans") else None,
        "classes": name or None,
        "selection": picked,
        "analysis": stem(config.codes, config.filtered),
        "corrected_poses": config.corrected,
        "unique": config.unique,
        "counts": {str(value): int(count) for value, count in zip(values, counts, strict=True)},
        "files": [str(path.relative_to(config.output)) for path in paths],
        # names in these files are as they were, relative to one of these
        FOLDERS: [str(folder) for folder in _looked_in(star, config.run)],
        "version": __version__,
        **more,
    }
    write_text(config.output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
