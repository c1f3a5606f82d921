"""What a run knows of its particles, as the page asks for it: numbers, names, codes of maps, pictures.

Owns: the names of what points can be placed and coloured by, and of what can be decoded.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from opustomo.analysis.class_quality import read_quality
from opustomo.analysis.controls import run_particles
from opustomo.analysis.data_maps import open_rows
from opustomo.analysis.latents import analysis_folder, principal_components, stored_umap, traversal
from opustomo.analysis.paths import along, graph_path
from opustomo.analysis.picked import read_selection
from opustomo.analysis.places import stem
from opustomo.analysis.volumes import read_codes
from opustomo.checkpoint import Run, open_run
from opustomo.data.pickles import load_labels
from opustomo.data.places import Places, places_of
from opustomo.data.readers import poses_of
from opustomo.data.readers.source import Source
from opustomo.data.sections import Pictures, sections, sections_of
from opustomo.data.tensors import read_arrays
from opustomo.errors import UserError
from opustomo.physics.observation import seen_through

Floats = NDArray[np.float64]
Column = tuple[NDArray[np.float32], list[str] | None]  # (P,) numbers, or indices into names; NaN where there is none
MOST_NAMES = 512  # of a column: more cannot be told apart, nor listed
FEWEST_POINTS, MOST_POINTS = 2, 100
AT = re.compile(r"mean|row:\d+|selection:[\w.-]+|class:(?:kmeans\d+|groups):\d+|pc:\d+|(?:path|between):\d+(?:-\d+)+")


@dataclass(frozen=True)
class Place:
    """A code, or a series of them (n, zdim), and the command that decodes the same, "" where there is none."""

    codes: Floats
    titles: list[str]
    command: str


class View:
    """A run at one epoch; what is asked for once is kept."""

    def __init__(self, path: Path, epoch: int = -1) -> None:
        self.run: Run = open_run(path, epoch)
        self.lock = threading.RLock()  # one thread finds out, the others wait for it

    @cached_property
    def components(self) -> Any:
        """Principal components of the codes."""
        return principal_components(np.asarray(self.run.codes, np.float64))

    @cached_property
    def source(self) -> Source | None:
        """The run's particles as in the STAR file; None where that is not there any more."""
        found = run_particles(self.run)
        if found is None:
            return None
        source, rows = found
        return source if len(rows) == len(source) else source.subset(rows)

    @property
    def datadir(self) -> Path | None:
        """Of the run's files."""
        given = self.run.config.get("datadir")
        return Path(given) if given else None

    @cached_property
    def poses_given(self) -> tuple[Floats, Floats] | None:
        """Rotations (P, 3, 3) and origins (P, 3) in pixels of the STAR file."""
        return None if self.source is None else poses_of(self.source, self.run.grid.pixel_size)

    @cached_property
    def places(self) -> Places | None:
        """Where the particles are in their tomograms, where the file says it."""
        if self.source is None:
            return None
        grid = self.run.grid
        try:
            return places_of(self.source, self.run.rotation, self.run.origin, grid.pixel_size, None, self.datadir)
        except UserError:
            return None

    @cached_property
    def makers(self) -> dict[str, tuple[str, Callable[[], Column]]]:
        """What there is of every particle, without the STAR file: name to (label, how to get it)."""
        run, found = self.run, {}
        share = self.components.explained
        for i in range(min(len(share), run.codes.shape[1])):
            if share[i] > 1e-9:
                found[f"pc:{i + 1}"] = (f"PC{i + 1} ({share[i]:.0%})", self._number(self.components.scores, i))
        umap = stored_umap(analysis_folder(run), len(run.codes))
        if umap is not None:
            found |= {f"umap:{i + 1}": (f"UMAP{i + 1}", self._number(umap, i)) for i in range(2)}
        found |= {f"z:{i + 1}": (f"code {i + 1}", self._number(run.codes, i)) for i in range(run.codes.shape[1])}
        found |= dict(self._classes())
        own = run.path / "linear.npz"  # of the linear stage as a run of its own
        fitted = read_arrays(own, "restore it from a copy") if own.is_file() else run.linear_results()
        for name, values in (fitted or {}).items():
            if name in ("evidence", "gain", "outlier"):
                found[name] = ({"outlier": "outlier score"}.get(name, name), self._number(values))
        found["beam"] = ("beam axis to z (degrees)", self._number(self._beam))
        return found

    def _classes(self) -> Iterator[tuple[str, tuple[str, Callable[[], Column]]]]:
        run = self.run
        second = run.path / f"{stem('composition', True)}.{run.epoch}"
        for folder, words in ((analysis_folder(run), ""), (second, ", second round")):
            for path in sorted(folder.glob("*/labels.pkl")):
                name = path.parent.name
                if re.fullmatch(r"kmeans\d+|groups", name):
                    label = name.replace("kmeans", "k-means ") + words
                    yield f"class:{name}" + ":2" * bool(words), (label, partial(_labels, path, len(run.codes)))
                quality = path.with_name("quality.csv")
                if quality.is_file() and quality.stat().st_mtime >= path.stat().st_mtime:
                    yield f"worth:{name}", (f"worth of its class ({name})", partial(_worth, path))

    @cached_property
    def star_makers(self) -> dict[str, tuple[str, Callable[[], Column]]]:
        """The same of what the STAR file says: reading a large one takes its time."""
        found: dict[str, tuple[str, Callable[[], Column]]] = {}
        if self.source is None:
            return found
        if self.run.config.get("estpose"):
            found |= {"turn": ("pose change (degrees)", self._number(lambda: self.pose_change[0])),
                      "shift": ("pose change (Å)", self._number(lambda: self.pose_change[1]))}  # fmt: skip
        if self.places is not None:
            found["tomogram"] = ("tomogram", partial(_named, pd.Series(self.places.tomogram)))
            found |= {f"place:{axis}": (f"place {axis} (Å)", self._number(self.places.centre, i))
                      for i, axis in enumerate("xyz")}  # fmt: skip
        for name, values in self.source.table.particles.items():
            make = {"number": _numeric, "names": _named}.get(kind_of(values))
            if make is not None:
                found[f"star:{name}"] = (str(name), partial(make, values))
        return found

    @staticmethod
    def _number(values: Any, column: int | None = None) -> Callable[[], Column]:
        def made() -> Column:
            found = np.asarray(values() if callable(values) else values)
            return np.ascontiguousarray(found if column is None else found[:, column], np.float32), None

        return made

    def _beam(self) -> Floats:
        return np.degrees(np.arccos(np.clip(np.asarray(self.run.rotation)[:, 2, 2], -1, 1)))

    @cached_property
    def pose_change(self) -> tuple[Floats, Floats]:
        """(P,) degrees and Angstrom between the poses of the file and the run's."""
        if self.poses_given is None:
            raise UserError(f"{self.run.star}: is not there, so how far poses moved is not known; put it back")
        rotation, origin = self.poses_given
        cosine = (np.einsum("pij,pij->p", rotation, self.run.rotation) - 1) / 2
        moved = np.linalg.norm(origin - self.run.origin, axis=1) * self.run.grid.pixel_size
        return np.degrees(np.arccos(np.clip(cosine, -1, 1))), moved

    def column(self, name: str) -> Column:
        """A number or name of every particle.  UserError where there is none such."""
        with self.lock:
            found = self.makers.get(name) or self.star_makers.get(name)
            if found is None:
                raise UserError(f"there is no column {name[:80]!r} in this run")
            return found[1]()

    def place(self, at: str, points: int = 10) -> Place:
        """The codes that ``at`` names: see AT.  UserError where they are not there."""
        if not AT.fullmatch(at):
            raise UserError(f"{at[:80]!r} names no code of this run")
        if not FEWEST_POINTS <= points <= MOST_POINTS:
            raise UserError(f"{points} maps: give {FEWEST_POINTS} to {MOST_POINTS}")
        kind, _, rest = at.partition(":")
        with self.lock:
            return getattr(self, f"_{kind}")(rest, points)

    def _codes(self) -> Floats:
        return np.asarray(self.run.codes, np.float64)

    def _row(self, text: str, points: int) -> Place:
        return Place(self._codes()[[self.checked(text)]], [f"particle {int(text) + 1}"], "")

    def _mean(self, text: str, points: int) -> Place:
        return Place(self._codes().mean(0, keepdims=True), ["mean code"], "")

    def _selection(self, text: str, points: int) -> Place:
        rows = read_selection(self.run.path, text)
        return Place(self._codes()[rows].mean(0, keepdims=True), [f"mean of {text}"], "")

    def _class(self, text: str, points: int) -> Place:
        name, number = text.split(":")
        codes = read_codes(analysis_folder(self.run) / name / "centers.txt", self.run.codes.shape[1])
        if int(number) >= len(codes):
            raise UserError(f"{name}: has classes 0 to {len(codes) - 1}, not {number}")
        option = "groups" if name == "groups" else f"kmeans {name[6:]}"
        return Place(codes[[int(number)]], [f"class {number} of {name}"], f"volumes {{run}} --{option}")

    def _pc(self, text: str, points: int) -> Place:
        if not 1 <= int(text) <= len(self.components.axes):
            raise UserError(f"pc {text}: there are components 1 to {len(self.components.axes)}")
        codes = traversal(self.components, int(text), points)
        score = (codes - self.components.mean) @ self.components.axes[int(text) - 1]
        told = f"volumes {{run}} --pc {text}" if points == 10 else ""
        return Place(codes, [f"PC{text} {value:+.2f}" for value in score], told)

    def _way(self, kind: str, text: str, points: int) -> Place:
        anchors = [self.checked(word) for word in text.split("-")]
        codes = self._codes()
        if (np.ptp(codes[anchors], axis=0) == 0).all():
            raise UserError(f"{kind} {text}: the codes are equal, there is no way between them; give others")
        rows = graph_path(codes, anchors, self.run.typical) if kind == "path" else np.array(anchors)
        titles = [f"{kind}, {i + 1} of {points}" for i in range(points)]
        told = f"volumes {{run}} --{kind} {' '.join(map(str, anchors))} --points {points}"
        return Place(along(codes[rows], points), titles, told)

    def _path(self, text: str, points: int) -> Place:
        return self._way("path", text, points)

    def _between(self, text: str, points: int) -> Place:
        return self._way("between", text, points)

    def checked(self, text: str) -> int:
        """A row number of this run.  UserError where it has no such particle."""
        if not text.isdigit() or len(text) > 12 or int(text) >= len(self.run.codes):
            raise UserError(f"{self.run.path}: has rows 0 to {len(self.run.codes) - 1}, not {text[:20]}")
        return int(text)

    def nearest(self, row: int, count: int) -> NDArray[np.uint32]:
        """Rows of the ``count`` particles whose codes are nearest to that of ``row``, itself among them."""
        count = min(max(count, 1), len(self.run.codes))
        distance = np.square(self.run.codes - self.run.codes[row]).sum(1)
        return np.argpartition(distance, count - 1)[:count].astype(np.uint32)

    def particle(self, row: int, decoded: Callable[[], NDArray[np.float32]]) -> tuple[dict[str, Any], Pictures]:
        """Facts and pictures of one particle; ``decoded``: makes its map."""
        run, facts, pictures, notes = self.run, dict[str, Any](row=row), Pictures(), list[str]()
        with self.lock:
            source, before, places = self.source, self.poses_given, self.places
        if source is not None and before is not None:
            facts |= {"tomogram": "" if places is None else str(places.tomogram[row])}
            if places is not None:
                facts["place"] = places.centre[row].round(1).tolist()
            facts |= {"turn": float(self.pose_change[0][row]), "shift": float(self.pose_change[1][row])}
            facts["origin_given"] = before[1][row].round(2).tolist()
            try:
                pictures += sections_of(source, row, self.datadir)
            except UserError as error:
                notes.append(str(error))
        facts |= {"euler": run.euler[row].round(2).tolist(), "origin": run.origin[row].round(2).tolist()}
        volume = decoded()
        try:
            index, rows = torch.tensor([row]), open_rows(run)
            pictures += sections(rows.numerator(index)[0].numpy(), "filtered")
            seen = seen_through(torch.from_numpy(volume), rows.weight(index)[0], run.grid.working_box)
            pictures += sections(seen.numpy(), "map through its CTF")
        except UserError as error:
            notes.append(str(error))
        pictures += sections(volume, "map")
        return facts | {"notes": notes}, pictures


def _labels(path: Path, count: int) -> Column:
    labels = load_labels(path, -1)
    if len(labels) != count:
        raise UserError(f"{path}: is of {len(labels)} particles where the run has {count}; analyze it again")
    names = [f"class {i}" for i in range(int(labels.max()) + 1)]
    return np.where(labels < 0, np.nan, labels).astype(np.float32), names


def _worth(path: Path) -> Column:
    labels = load_labels(path, -1)
    worth = np.full(max(int(labels.max()) + 1, 1), np.nan)
    for row in read_quality(path.with_name("quality.csv")):
        if 0 <= row.number < len(worth):
            worth[row.number] = row.worth
    return np.where(labels < 0, np.nan, worth[labels]).astype(np.float32), None


def kind_of(column: pd.Series[Any]) -> str:
    """number or names; "" for a column that says nothing, or has more names than can be shown."""
    value = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    if np.isfinite(value).all():
        return "number" if np.ptp(value) > 0 else ""
    return "names" if 1 < column.nunique() <= min(MOST_NAMES, len(column) - 1) else ""


def _numeric(column: pd.Series[Any]) -> Column:
    return pd.to_numeric(column).to_numpy(np.float32), None


def _named(column: pd.Series[Any]) -> Column:
    index, names = pd.factorize(column, sort=True)
    return index.astype(np.float32), [str(name) for name in names]
