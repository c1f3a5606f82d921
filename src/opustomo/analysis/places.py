"""Where the analyses of a run are: ``analyze.N`` of composition, ``defanalyze.N`` of conformation, ``jointanalyze.N``.

Owns: these names, and which particles a second round (``analyze.filter.N``) is of.  Nothing heavy is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.config_analysis import Codes
from opustomo.data.pickles import load_labels
from opustomo.errors import UserError

FOLDERS = {"composition": "analyze", "conformation": "defanalyze", "joint": "jointanalyze"}


def stem(codes: Codes, filtered: bool) -> str:
    """Name of an analysis without its epoch; filtered: of the second round."""
    return FOLDERS[codes] + ".filter" * filtered


def options_of(codes: Codes, filtered: bool) -> str:
    """What to add to a command that is to look at this analysis."""
    return (f" --codes {codes}" if codes != "composition" else "") + (" --filtered" if filtered else "")


def rows_within(run: Path, epoch: int, within: str) -> NDArray[np.int64]:
    """Rows of the particles in classes ``K:2-5,8`` of RUN/analyze.N/kmeansK, ascending.

    Raises UserError where it cannot be read so, or there are no such classes.
    """
    match = re.fullmatch(r"(\d+):([\d,-]+)", within)
    fix = f"--within {within}: give K and classes of k-means, counted from 0, as in 16:2-5,8"
    if not match:
        raise UserError(fix)
    chosen: set[int] = set()
    for part in match[2].split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(fix)
        chosen |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    path = run / f"{stem('composition', False)}.{epoch}" / f"kmeans{match[1]}" / "labels.pkl"
    if not path.is_file():
        raise UserError(
            f"--within {within}: {path}: not there; make it with `opustomo analyze {run} --clusters {match[1]}`"
        )
    labels = load_labels(path)
    absent = sorted(chosen - set(labels.tolist()))
    if absent:
        raise UserError(f"--within {within}: no particle is in class {absent[0]}; there are 0 to {labels.max()}")
    return np.flatnonzero(np.isin(labels, sorted(chosen)))
