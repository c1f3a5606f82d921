"""Owns: where the files named in a STAR file are on this machine, and what to say when they are not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from opustomo.errors import UserError

MANIFEST, FOLDERS = "manifest.json", "folders"  # of ``select`` and ``export``, and the key in it
Names = Sequence[str]
Absent = frozenset[int] | None  # None: every file has to be there


class Locator:
    """Finds files below ``--datadir``, else the STAR's folder, else the working directory (names as given).

    STAR files of ``select`` and ``export`` name files as the one did that they are of: last of all they are looked for
    where that one's were, which the manifest beside them says.  Below ``--datadir`` a file may also lie without the
    folders in its name, as with the earlier program, where that is unambiguous.  Folder listings are kept, so that a
    set of 100,000 particles costs one listing a folder.
    """

    def __init__(self, star: Path, datadir: Path | None) -> None:
        self.star = star
        self.datadir = datadir
        self._listings: dict[str, frozenset[str]] = {}
        self._handed = _folders_of_manifest(star.absolute().parent / MANIFEST)
        if datadir is not None and not datadir.is_dir():
            raise UserError(f"--datadir {datadir}: no such folder; give the folder in front of the names in {star}")

    def find(self, names: Names, absent: Absent = None) -> list[str] | None:
        """Absolute paths of all ``names`` (same order) in the first place that has all of them, None if none has.

        absent: those that need not be there, by their number.
        """
        return next((paths for paths in self._places(names) if self.all_exist(paths, absent)), None)

    def all_exist(self, paths: Sequence[str], absent: Absent = None) -> bool:
        """Whether all but the ``absent`` ones are there."""
        return all(self.exists(path) or i in (absent or ()) for i, path in enumerate(paths))

    def require(self, names: Names, what: str, absent: Absent = None) -> tuple[Path, ...]:
        """As find, but UserError naming the first missing file, how many, the folders tried and a fix."""
        found = self.find(names, absent)
        if found is None:
            raise UserError(self._explain(names, what))
        return tuple(map(Path, found))

    def require_most(self, names: Names, what: str) -> tuple[tuple[Path, ...], frozenset[int]]:
        """As require, but half of the files will do; also the numbers of those that are not there."""
        best = self._best(names)
        absent = frozenset(i for i, path in enumerate(best) if not self.exists(path))
        if 2 * len(absent) > len(names):
            raise UserError(self._explain(names, what))
        return tuple(map(Path, best)), absent

    def present(self, names: Names) -> int:
        """How many of ``names`` exist in the place that has most of them."""
        return sum(map(self.exists, self._best(names)))

    def exists(self, path: str | Path) -> bool:
        """Whether the file is there, from a listing of its folder."""
        folder, name = os.path.split(path)
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(entry.name for entry in os.scandir(folder))
            except OSError:
                self._listings[folder] = frozenset()
        return name in self._listings[folder]

    def outside_datadir(self, paths: Sequence[Path]) -> bool:
        """Whether a given ``--datadir`` had no part in finding these files."""
        return self.datadir is not None and not paths[0].is_relative_to(self.datadir.absolute())

    @property
    def folders(self) -> list[Path]:
        """Where files are looked for, in this order."""
        given = [] if self.datadir is None else [self.datadir.absolute()]
        return list(dict.fromkeys([*given, self.star.absolute().parent, Path.cwd(), *self._handed]))

    def _best(self, names: Names) -> list[str]:
        """Paths in the place that has most of them."""
        return max(self._places(names), key=lambda paths: sum(map(self.exists, paths)))

    def _places(self, names: Names) -> Iterator[list[str]]:
        # as text: a Path costs microseconds, several for every particle
        for folder in self.folders:
            yield [os.path.join(folder, name) for name in names]  # noqa: PTH118
            if folder == self.folders[0] and self.datadir is not None:
                flat = [os.path.basename(name) for name in names]  # noqa: PTH119
                if len(set(flat)) == len(set(names)):
                    yield [os.path.join(folder, name) for name in flat]  # noqa: PTH118

    def _explain(self, names: Names, what: str) -> str:
        absent = [i for i, path in enumerate(self._best(names)) if not self.exists(path)]
        count = f"{len(absent)} of {len(names)} {what} missing"
        tried = ", ".join(str(folder) for folder in self.folders)
        first = names[absent[0]]
        return f"{self.star}: {count}, first: {first} (row {absent[0] + 1}); folders tried: {tried}; {self._fix(first)}"

    def _fix(self, name: str) -> str:
        """The ``--datadir`` that would work: RELION names files relative to its project, some folders up.

        Only folders above the STAR file: those beside it may hold files of the same names of another set.
        """
        for folder in self.star.absolute().parents:
            if self.exists(folder / name):
                return f"try --datadir {folder}"
        return "give the folder in front of these names with --datadir"


def _folders_of_manifest(path: Path) -> list[Path]:
    """The folders that a manifest beside a STAR file says; none where it is another program's, or not there."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    listed = found.get(FOLDERS) if isinstance(found, dict) else None
    if not isinstance(listed, list):
        return []
    return [Path(name) for name in listed if isinstance(name, str) and "\0" not in name]
