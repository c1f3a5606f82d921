"""Selections of particles by hand, kept in a run under a name: RUN/selections/NAME.json.

Owns: that file, and the rule that it is of these particles in this order and of no others.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo import __version__
from opustomo.data.atomic import write_text
from opustomo.errors import UserError, reading
from opustomo.stored import read_config

FOLDER = "selections"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST = 1 << 29  # bytes of a file that is read


def path_of(run: Path, name: str) -> Path:
    """Where the selection is.  UserError for a name that is none."""
    if not NAME.fullmatch(name) or name.endswith("."):
        raise UserError(f"--selection {name}: is no name; give up to 64 letters, digits, dots, dashes and underscores")
    return run / FOLDER / f"{name}.json"


def names_in(run: Path) -> list[str]:
    """Names of the selections of a run, in order."""
    found = (path.stem for path in (run / FOLDER).glob("*.json"))
    return sorted(name for name in found if NAME.fullmatch(name))


def write_selection(run: Path, name: str, rows: NDArray[np.integer]) -> Path:
    """Keep rows (from 0, of the run's particles) under a name, in the place of an older one; the file.

    UserError: a bad name, no rows, rows that the run has not.
    """
    path, config = path_of(run, name), read_config(run)
    chosen = _checked(np.unique(rows), int(config["particles"]), path)
    kept = {
        "name": name,
        "particles": int(config["particles"]),
        "identity": config.get("identity"),
        "made_by": f"opustomo {__version__}",
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "rows": chosen.tolist(),
    }
    write_text(path, json.dumps(kept) + "\n")
    return path


def read_selection(run: Path, name: str) -> NDArray[np.int64]:
    """Rows of a selection, ascending.  UserError: not there, damaged, or of other particles than the run's."""
    path, config = path_of(run, name), read_config(run)
    if not path.is_file():
        there = ", ".join(names_in(run)) or "none; `opustomo explore` makes them"
        raise UserError(f"--selection {name}: {path}: not there (selections of this run: {there})")
    with reading(path, "save the selection again"):
        if path.stat().st_size > LARGEST:
            raise ValueError("too large")
        kept = json.loads(path.read_text(encoding="utf-8"))
        rows, whose = np.array(kept["rows"]), (kept["particles"], kept["identity"])
        if rows.ndim != 1 or (rows.size and rows.dtype.kind != "i"):
            raise ValueError("rows are no row numbers")
    if whose != (config.get("particles"), config.get("identity")):
        raise UserError(
            f"{path}: is of other particles than {run} has, or of another order; make the selection again in this run"
        )
    return _checked(np.unique(rows), int(config["particles"]), path)


def _checked(rows: NDArray[np.integer], count: int, path: Path) -> NDArray[np.int64]:
    if len(rows) == 0:
        raise UserError(f"{path}: the selection is empty; choose some particles")
    if rows[0] < 0 or rows[-1] >= count:
        raise UserError(f"{path}: has rows {rows[0]} to {rows[-1]} where the run has 0 to {count - 1}; choose again")
    return rows.astype(np.int64)
