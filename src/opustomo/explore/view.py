"""A run and its particles, as the page asks for it: columns, codes of maps, pictures.

Owns: the names of what can be decoded, and that a particle's map is that of all its codes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.analysis.dynamics import Hinge, hinges
from opustomo.analysis.latents import in_use, principal_components, traversal
from opustomo.analysis.made_from import open_rows, run_particles
from opustomo.analysis.paths import along, rows_passed
from opustomo.analysis.picked import read_selection
from opustomo.analysis.places import options_of, stem
from opustomo.analysis.seen import along_conformation, seen_as
from opustomo.analysis.volumes import read_codes
from opustomo.checkpoint import Run, open_run
from opustomo.config_analysis import Codes
from opustomo.data.places import Places, places_of
from opustomo.data.readers import poses_of
from opustomo.data.readers.source import Source
from opustomo.data.sections import Pictures, sections, sections_of
from opustomo.errors import UserError
from opustomo.explore.columns import Column, Values, called, of_run, of_star
from opustomo.physics.geometry import matrix_to_euler, rotation_angle
from opustomo.physics.observation import seen_through

Floats = NDArray[np.float64]
FEWEST_POINTS, MOST_POINTS = 2, 100
POINTS = 10  # of a series of the commands, unless they are told
AT = re.compile(
    r"mean|row:\d+|selection:[\w.-]+|(?:pc|motion):\d+|(?:path|between):\d+(?:-\d+)+|"
    r"class:(?:conformation\.|joint\.)?(?:filter\.)?(?:kmeans\d+|groups):\d+"
)


@dataclass(frozen=True)
class Place:
    """A code, or a series of them (n, zdim), of ``run``; the command that decodes the same, "" where there is none."""

    run: Run
    codes: NDArray[np.floating[Any]]
    titles: list[str]
    command: str = ""


class View:
    """A run at one epoch; what is asked for once is kept.

    Two locks, under which one thread finds out while the others wait: a large STAR file takes its time, and nobody who
    does not need it is to wait for it.
    """

    def __init__(self, path: Path, epoch: int = -1) -> None:
        self.run: Run = open_run(path, epoch)
        self.lock, self.reading = threading.RLock(), threading.RLock()
        self.columns: dict[str, Column] = {}

    def look(self) -> dict[str, Column]:
        """The columns there are now: ``analyze`` may have been run since."""
        with self.lock:
            self.columns = of_run(self)
            return self.columns

    # --- the run by its codes ---

    @cached_property
    def seen(self) -> dict[Codes, Run]:
        """The run by composition; where there are bodies by their conformation and by both, too."""
        found: dict[Codes, Run] = {"composition": self.run}
        if self.run.conformation is not None:
            found |= {codes: seen_as(self.run, codes) for codes in get_args(Codes)[1:]}
        return found

    @property
    def whole(self) -> Run:
        """By all codes of a particle."""
        return self.seen.get("joint", self.run)

    @property
    def analyses(self) -> dict[str, tuple[Codes, bool]]:
        """Which codes, and whether a second round, by what stands before the names of classes."""
        return {f"{codes}." * (codes != "composition") + "filter." * second: (codes, second)
                for codes in self.seen for second in (False, True)}  # fmt: skip

    def folder_of(self, prefix: str) -> Path:
        """Of an analysis."""
        return self.run.path / f"{stem(*self.analyses[prefix])}.{self.run.epoch}"

    @cached_property
    def components(self) -> Any:
        """Principal components of the composition."""
        return principal_components(np.asarray(self.run.codes, np.float64))

    @cached_property
    def conformations(self) -> list[int]:
        """Numbers (from 1) of those that move anything; [] without bodies."""
        if self.run.conformation is None:
            return []
        size = self.run.bodies.model.modes(self.run.bodies.dimensions)[1]
        return [i + 1 for i in torch.nonzero(size > 1e-3 * size.max())[:, 0].tolist()]

    @cached_property
    def hinges(self) -> list[Hinge]:
        """Of every pair of bodies, those that move most first."""
        return hinges(self.run.bodies.model.bodies, self.run.bodies.motions.motion)

    # --- the particles in the STAR file: with ``reading`` held ---

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
        try:
            pixel = self.run.grid.pixel_size
            return places_of(self.source, self.run.rotation, self.run.origin, pixel, None, self.datadir)
        except UserError:
            return None

    @cached_property
    def pose_change(self) -> tuple[Floats, Floats]:
        """(P,) degrees and Angstrom between the poses of the file and the run's."""
        if self.poses_given is None:
            raise UserError(f"{self.run.star}: is not there, so how far poses moved is not known; put it back")
        rotation, origin = self.poses_given
        turned = rotation_angle(torch.from_numpy(rotation), torch.from_numpy(self.run.rotation)).numpy()
        return turned, np.linalg.norm(origin - self.run.origin, axis=1) * self.run.grid.pixel_size

    @cached_property
    def star_columns(self) -> dict[str, Column]:
        """What the STAR file adds to the columns."""
        return of_star(self)

    def column(self, name: str) -> Values:
        """A number or name of every particle.  UserError where there is none such."""
        with self.lock:
            found = (self.columns or self.look()).get(name)
            if found is not None:
                return found.get()
        with self.reading:
            if name not in self.star_columns:
                raise UserError(f"there is no column {name[:80]!r} in this run")
            return self.star_columns[name].get()

    # --- what can be decoded ---

    def offered(self) -> list[tuple[str, str]]:
        """What the menu of maps has, as ``place`` takes it, and its label."""
        found = [("mean", "mean code")]
        for name, column in self.columns.items():
            if name.startswith("class:"):
                found += [
                    (f"{name}:{i}", f"{label} of {column.label}") for i, label in enumerate(column.get()[1] or [])
                ]
        found += [(f"pc:{i + 1}", f"along PC{i + 1}") for i in range(in_use(self.components.explained))]
        return found + [(f"motion:{i}", f"along conformation {i}") for i in self.conformations]

    def place(self, at: str, points: int = POINTS) -> Place:
        """The codes that ``at`` names: see AT.  UserError where they are not there."""
        if not AT.fullmatch(at):
            raise UserError(f"{at[:80]!r} names no code of this run")
        if not FEWEST_POINTS <= points <= MOST_POINTS:
            raise UserError(f"{points} maps: give {FEWEST_POINTS} to {MOST_POINTS}")
        kind, _, rest = at.partition(":")
        with self.lock:
            if kind in ("path", "between"):
                return self._way(kind, rest, points)
            return getattr(self, f"_{kind}")(rest, points)

    def _row(self, text: str, points: int) -> Place:
        return Place(self.whole, self.whole.codes[[self.checked(text)]], [f"particle {int(text) + 1}"])

    def _mean(self, text: str, points: int) -> Place:
        return Place(self.run, np.asarray(self.run.codes, np.float64).mean(0, keepdims=True), ["mean code"])

    def _selection(self, text: str, points: int) -> Place:
        codes = np.asarray(self.whole.codes[read_selection(self.run.path, text)], np.float64)
        return Place(self.whole, codes.mean(0, keepdims=True), [f"mean of {text}"])

    def _class(self, text: str, points: int) -> Place:
        name, number = text.split(":")
        *_, kind = name.split(".")
        prefix = name.removesuffix(kind)
        if prefix not in self.analyses:
            raise UserError(f"{name}: this run has no bodies, so there are classes of its composition alone")
        run = self.seen[self.analyses[prefix][0]]
        codes = read_codes(self.folder_of(prefix) / kind / "centers.txt", run.codes.shape[1])
        if int(number) >= len(codes):
            raise UserError(f"{name}: has classes 0 to {len(codes) - 1}, not {number}")
        option = "--groups" if kind == "groups" else f"--kmeans {kind[6:]}"
        command = f"volumes {{run}}{options_of(*self.analyses[prefix])} {option}"
        return Place(run, codes[[int(number)]], [f"class {number} of {called(prefix, kind)}"], command)

    def _pc(self, text: str, points: int) -> Place:
        if not 1 <= int(text) <= len(self.components.axes):
            raise UserError(f"pc {text}: there are components 1 to {len(self.components.axes)}")
        codes = traversal(self.components, int(text), points)
        score = (codes - self.components.mean) @ self.components.axes[int(text) - 1]
        told = f"volumes {{run}} --pc {text}" if points == POINTS else ""
        return Place(self.run, codes, [f"PC{text} {value:+.2f}" for value in score], told)

    def _motion(self, text: str, points: int) -> Place:
        run = self.seen.get("conformation")
        if run is None:
            raise UserError(f"{self.run.path}: has no conformation; train with --masks to have one")
        codes = along_conformation(run, int(text), points)
        told = f"volumes {{run}} --conformation {text}" if points == POINTS else ""
        return Place(run, codes, [f"conformation {text}, {value:+.2f}" for value in codes[:, int(text) - 1]], told)

    def _way(self, kind: str, text: str, points: int) -> Place:
        anchors = [self.checked(word) for word in text.split("-")]
        codes = np.asarray(self.whole.codes, np.float64)
        rows = rows_passed(codes, anchors, kind == "path", self.run.typical, f"{kind} {text}")
        more = "" if self.whole is self.run else options_of("joint", False)
        told = f"volumes {{run}}{more} --{kind} {' '.join(map(str, anchors))} --points {points}"
        return Place(
            self.whole, along(codes[rows], points), [f"{kind}, {i + 1} of {points}" for i in range(points)], told
        )

    def checked(self, text: str) -> int:
        """A row number of this run.  UserError where it has no such particle."""
        if not text.isdigit() or len(text) > 12 or int(text) >= len(self.run.codes):
            raise UserError(f"{self.run.path}: has rows 0 to {len(self.run.codes) - 1}, not {text[:20]}")
        return int(text)

    def nearest(self, row: int, count: int) -> NDArray[np.uint32]:
        """Rows of the ``count`` particles whose codes are nearest to that of ``row``, itself among them."""
        codes = self.whole.codes
        count = min(max(count, 1), len(codes))
        distance = np.square(codes - codes[row]).sum(1)
        return np.argpartition(distance, count - 1)[:count].astype(np.uint32)

    # --- one particle ---

    def particle(self, row: int, decoded: Callable[[], NDArray[np.float32]]) -> tuple[dict[str, Any], Pictures]:
        """Facts and pictures of one particle; ``decoded``: makes its map."""
        run, pictures, notes = self.run, Pictures(), list[str]()
        facts = {"row": row, "euler": run.euler[row].tolist(), "origin": run.origin[row].tolist()}
        with self.reading:
            source, before, places = self.source, self.poses_given, self.places
            change = None if before is None else self.pose_change
        if places is not None:
            facts |= {"tomogram": str(places.tomogram[row]), "place": places.centre[row].tolist()}
        if before is not None and change is not None:
            facts |= {"euler_given": matrix_to_euler(torch.from_numpy(before[0][row])).tolist(),
                      "origin_given": before[1][row].tolist(),
                      "turn": float(change[0][row]), "shift": float(change[1][row])}  # fmt: skip
        try:
            pictures += [] if source is None else sections_of(source, row, self.datadir)
        except UserError as error:
            notes.append(str(error))
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
