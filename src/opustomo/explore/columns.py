"""What points can be placed and coloured by: a number or a name of every particle.

Owns: the columns' names, labels and headings, and which columns of a STAR file say something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from opustomo.analysis.class_quality import read_quality
from opustomo.analysis.latents import stored_umap
from opustomo.data.pickles import load_labels
from opustomo.data.tensors import read_arrays
from opustomo.errors import UserError, reading

if TYPE_CHECKING:
    from opustomo.explore.view import View

MOST_NAMES = 512  # of a column: more cannot be told apart, nor listed
SAMPLE = 2000  # values that tell what a column is: to look at all of a million takes a second a column

Values = tuple[NDArray[np.float32], list[str] | None]  # (P,) numbers, or indices into names; NaN where there is none


class Column(NamedTuple):
    """How a column is called in the menus and under which heading, and how to get it; names: it is no axis."""

    label: str
    heading: str
    get: Callable[[], Values]
    names: bool = False


Named = tuple[str, Column]


def of_run(view: View) -> dict[str, Column]:
    """The columns that are known without the STAR file, by name."""
    run, share = view.run, view.components.explained
    codes = "Codes"
    found = {f"pc:{i + 1}": Column(f"PC{i + 1} ({share[i]:.0%})", codes, _numbers(view.components.scores, i))
             for i in range(len(share)) if share[i] > 1e-9}  # fmt: skip
    found |= dict(_analysed(view))
    found |= {f"z:{i + 1}": Column(f"code {i + 1}", codes, _numbers(run.codes, i)) for i in range(run.codes.shape[1])}
    found |= dict(_moved(view))
    own = run.path / "linear.npz"  # of the linear stage as a run of its own
    fitted = read_arrays(own, "restore it from a copy") if own.is_file() else run.linear_results()
    for name, label in (("evidence", "evidence (nats)"), ("outlier", "outlier score"), ("gain", "gain")):
        if name in (fitted or {}):
            found[name] = Column(label, "Quality", _numbers((fitted or {})[name]))
    found["beam"] = Column("beam axis to z (degrees)", "Poses", _numbers(lambda: _beam(np.asarray(run.rotation))))
    return found


def _analysed(view: View) -> Iterator[Named]:
    """UMAP and classes of every analysis there is."""
    count = len(view.run.codes)
    for prefix in view.analyses:
        folder = view.folder_of(prefix)
        if (folder / "umap.pkl").is_file():
            rows = _rows_of(folder, count)
            umap = stored_umap(folder, len(rows))
            for i, places in enumerate([] if umap is None else umap.T):
                get = partial(_among, count, rows, places)
                yield f"umap:{prefix}{i + 1}", Column(called(prefix, f"UMAP{i + 1}"), "Codes", get)
        for path in sorted(folder.glob("*/labels.pkl")):
            name = path.parent.name
            if re.fullmatch(r"kmeans\d+|groups", name):
                get = partial(_labels, path, count)
                yield f"class:{prefix}{name}", Column(called(prefix, name), "Classes", get, names=True)
            quality = path.with_name("quality.csv")
            if not prefix and quality.is_file() and quality.stat().st_mtime >= path.stat().st_mtime:
                label = f"worth of its class, {called(prefix, name)}"
                yield f"worth:{name}", Column(label, "Quality", partial(_worth, path))


def called(prefix: str, name: str) -> str:
    """``conformation.filter.`` and ``kmeans4`` for people: k-means 4, conformation, second round."""
    words = [name.replace("kmeans", "k-means "), *prefix.replace("filter", "second round").split(".")]
    return ", ".join(word for word in words if word)


def _moved(view: View) -> Iterator[Named]:
    """The conformation, and by how many degrees one body is turned against another."""
    for number in view.conformations:
        get = _numbers(view.run.conformation, number - 1)
        yield f"y:{number}", Column(f"conformation {number}", "Bodies", get)
    for i, hinge in enumerate(view.hinges if view.conformations else []):
        names = [view.run.bodies.names[body] for body in (hinge.moving, hinge.fixed)]
        yield f"angle:{i + 1}", Column(f"{names[0]} to {names[1]} (degrees)", "Bodies", _numbers(hinge.angle))


def of_star(view: View) -> dict[str, Column]:
    """Those that the STAR file adds; {} where it is gone."""
    found: dict[str, Column] = {}
    if view.source is None:
        return found
    if view.run.config.get("estpose"):
        found["turn"] = Column("pose change (degrees)", "Poses", _numbers(lambda: view.pose_change[0]))
        found["shift"] = Column("pose change (Å)", "Poses", _numbers(lambda: view.pose_change[1]))
    if view.places is not None:
        place, names = "Tomograms", pd.Series(view.places.tomogram)
        found["tomogram"] = Column("tomogram", place, partial(_named, names), names=True)
        for i, axis in enumerate("xyz"):
            found[f"place:{axis}"] = Column(f"place {axis} (Å)", place, _numbers(view.places.centre, i))
    table = view.source.table.particles
    for name in map(str, table.columns):
        values = table[name]
        kind = kind_of(values)
        if kind:
            get = partial(_numeric if kind == "number" else _named, values)
            found[f"star:{name}"] = Column(name, "STAR file", get, kind == "names")
    return found


def kind_of(column: pd.Series[Any]) -> str:
    """number or names; "" for a column that says nothing, or has more names than can be shown."""
    some = column.iloc[:: max(1, len(column) // SAMPLE)]
    if np.isfinite(pd.to_numeric(some, errors="coerce")).all():
        return "number" if some.nunique() > 1 or (column != column.iloc[0]).any() else ""
    if some.nunique() > MOST_NAMES:
        return ""
    return "names" if 1 < column.nunique() <= min(MOST_NAMES, len(column) - 1) else ""


def _numbers(values: Any, column: int | None = None) -> Callable[[], Values]:
    def made() -> Values:
        found = np.asarray(values() if callable(values) else values)
        return np.ascontiguousarray(found if column is None else found[:, column], np.float32), None

    return made


def _numeric(column: pd.Series[Any]) -> Values:
    return pd.to_numeric(column, errors="coerce").to_numpy(np.float32), None


def _named(column: pd.Series[Any]) -> Values:
    index, names = pd.factorize(column, sort=True)
    return index.astype(np.float32), [str(name) for name in names]


def _beam(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.degrees(np.arccos(np.clip(rotation[:, 2, 2], -1, 1)))


def _rows_of(folder: Path, count: int) -> NDArray[np.int64]:
    """Rows of the particles that an analysis is of."""
    path = folder / "rows.txt"
    if not path.is_file():
        return np.arange(count)
    with reading(path, "run `opustomo analyze` again"):
        rows = np.loadtxt(path, dtype=np.int64, ndmin=1)
        if not ((rows >= 0) & (rows < count)).all():
            raise ValueError(f"rows beyond 0 to {count - 1}")
    return rows


def _among(count: int, rows: NDArray[np.int64], values: NDArray[np.float64]) -> Values:
    """Of all ``count`` particles, where those at ``rows`` alone have values."""
    found = np.full(count, np.nan, np.float32)
    found[rows] = values
    return found, None


def _labels(path: Path, count: int) -> Values:
    labels = load_labels(path, -1)
    if len(labels) != count:
        raise UserError(f"{path}: is of {len(labels)} particles where the run has {count}; analyze it again")
    names = [f"class {i}" for i in range(int(labels.max()) + 1)]
    return np.where(labels < 0, np.nan, labels).astype(np.float32), names


def _worth(path: Path) -> Values:
    labels = load_labels(path, -1)
    worth = np.full(max(int(labels.max()) + 1, 1), np.nan)
    for row in read_quality(path.with_name("quality.csv")):
        if 0 <= row.number < len(worth):
            worth[row.number] = row.worth
    return np.where(labels < 0, np.nan, worth[labels]).astype(np.float32), None
