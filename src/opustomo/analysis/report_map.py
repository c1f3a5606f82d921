"""What the report shows of a run that is one map (``train --encode-mode fixed``): map, half-map FSC, poses.

Owns: the tiles and sections of that page; ``report`` puts them together.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from opustomo.analysis import page, plots
from opustomo.analysis.made_from import rows_of_run, source_of
from opustomo.analysis.page import Section
from opustomo.analysis.score_poses import pose_errors
from opustomo.data.readers import poses_of
from opustomo.errors import reading

if TYPE_CHECKING:
    from opustomo.checkpoint import Run


def tiles(run: Run) -> Iterator[str]:
    """Numbers of the set and of the map."""
    grid, typical = run.grid, int(run.typical.sum())
    left = len(run.codes) - typical
    yield page.tile(f"{len(run.codes):,}", f"particles, {left:,} left out" if left else "particles")
    yield page.tile(f"{grid.working_pixel:.4g} Å", f"working pixel: {2 * grid.working_pixel:.3g} Å at best")


def sections(run: Run) -> Iterator[Section]:
    """Map, FSC, poses and what to do next."""
    drawn = plots.montage(run.decode(run.codes[:1]), ["masked map"])
    note = "The average of all particles at their last poses, filtered by the FSC of its halves."
    yield Section("map", "The map", note, page.row([page.figure(drawn, "Front and side, and central slices")]))
    path = run.path / "fsc.csv"
    if path.is_file():
        with reading(path, "remove it, or train again"):
            fsc = np.loadtxt(path, delimiter=",", skiprows=1)[:, 2]
        drawn = plots.fsc_curves(np.arange(len(fsc)) / run.grid.extent, {"half maps": fsc})
        note = "Each half of the particles has had its poses corrected against its own map, from the poses of the file."
        note = note if run.config["estpose"] else "Poses are those of the file, which both halves share."
        yield Section("fsc", "Half maps", note, page.row([page.figure(drawn, "From fsc.csv")]))
    if run.config["estpose"] and run.star.is_file():
        yield _poses(run)
    yield _next(run)


def _poses(run: Run) -> Section:
    source = source_of(run.star, run.config)
    rows = rows_of_run(run.path, source.table)
    index = slice(None) if rows is None else rows
    rotation, origin = poses_of(source, run.grid.pixel_size)
    moved = pose_errors(run.rotation, run.origin, rotation[index], origin[index])
    units = {"angle": "degrees", "shift": "pixels"}
    names = {name: f"{name.split('_')[0]}, {name.split('_')[1]} ({units[name.split('_')[0]]})" for name in moved}
    note = "How far the poses have been moved from those of the STAR file: median and 90th percentile."
    return Section("poses", "Poses", note, page.table({names[k]: f"{v:.2f}" for k, v in moved.items()}))


def _next(run: Run) -> Section:
    where, star = shlex.quote(str(run.path)), shlex.quote(str(run.star))
    body = ""
    if run.config["estpose"]:
        line = f"opustomo select {star} --run {where} --corrected -o corrected"
        body += page.command("A STAR file (pre0.star) with every column and the poses as corrected", line)
    body += page.command("Are all particles alike? Codes and classes", f"opustomo train {star} -o network")
    return Section("next", "What to do next", "", body)
