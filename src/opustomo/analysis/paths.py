"""Ways through the codes of a run: along the particles from one to another, or straight between them.

Owns: the graph of neighbouring particles, z_path.txt and the picture of the way.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree

from opustomo.analysis import latent_plots, plots
from opustomo.analysis.axes import as_text
from opustomo.config import MapChoice
from opustomo.data.atomic import write_text
from opustomo.errors import UserError, reading

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
NEIGHBOURS = 10  # of each particle in the graph; doubled until the ends are connected
MOST = 50_000  # particles that are enough to know where there are many


def graph_path(codes: Floats, anchors: list[int], typical: NDArray[np.bool_], seed: int = 0) -> NDArray[np.int64]:
    """Rows of the particles on the cheapest way through all ``anchors`` (rows) in their order, these included.

    codes: (P, zdim); typical: (P,) particles that may be on the way.  An edge between neighbours costs the square of
    its length: many short steps, where particles are dense, are cheaper than a long one where there are none.
    """
    allowed = np.flatnonzero(typical)
    if len(allowed) > MOST:
        allowed = np.random.default_rng(seed).choice(allowed, MOST, replace=False)
    rows = np.union1d(allowed, anchors)
    places, count = codes[rows], min(NEIGHBOURS, len(rows) - 1)
    ends = np.searchsorted(rows, anchors)
    while True:
        distance, near = cKDTree(places).query(places, count + 1, workers=-1)
        start = np.repeat(np.arange(len(rows)), count)
        # equal codes are neighbours too: an edge of no cost would be none in a sparse matrix
        cost = np.maximum(distance[:, 1:].ravel() ** 2, 1e-12 * max(float(distance.max()) ** 2, 1e-30))
        graph = csr_array((cost, (start, near[:, 1:].ravel())), shape=(len(rows),) * 2)
        total, before = dijkstra(graph, directed=False, indices=ends[:-1], return_predecessors=True)
        if np.isfinite(total[np.arange(len(ends) - 1), ends[1:]]).all():
            break
        count = min(2 * count, len(rows) - 1)
    way = [int(ends[0])]
    for leg, end in enumerate(ends[1:]):
        part = [int(end)]
        while part[-1] != ends[leg]:
            part.append(int(before[leg, part[-1]]))
        way += part[-2::-1]
    return rows[way].astype(np.int64)


def rows_passed(
    codes: Floats, anchors: list[int], dense: bool, typical: NDArray[np.bool_], name: str
) -> NDArray[np.int64]:
    """Rows of the particles on a way through ``anchors``: where there are many (``graph_path``), or none but these.

    UserError, about ``name``: their codes are equal.
    """
    if (np.ptp(codes[anchors], axis=0) == 0).all():
        raise UserError(f"{name}: their codes are equal, there is no way between them; give others")
    return graph_path(codes, anchors, typical) if dense else np.array(anchors)


def along(corners: Floats, points: int) -> Floats:
    """(points, zdim) codes at equal distances along the line through ``corners`` (n, zdim), its ends included."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    at = np.linspace(0, length[-1], points)
    return np.stack([np.interp(at, length, column) for column in corners.T], axis=1)


def path_name(choice: MapChoice) -> str:
    """Folder of a way below analyze.N."""
    kind, ends = ("path", choice.path) if choice.path else ("between", choice.between)
    points = f"_{choice.points}points" if choice.points != MapChoice.points else ""
    return (f"kmeans{choice.kmeans}_" if choice.kmeans else "") + kind + "-".join(map(str, ends)) + points


def write_path(run: Run, choice: MapChoice, folder: Path) -> Path:
    """Write what ``--path`` or ``--between`` asks for below ``folder`` (analyze.N); the path of its z_path.txt.

    ``pathA-B/`` or ``betweenA-B/``, with ``kmeansK_`` in front where A and B are classes and ``_Npoints`` behind where
    --points is given: z_path.txt, the codes; z_path_rows.txt, the particles passed; z_path.png.  UserError: no such
    class or particle, fewer than two ends, fewer than two points, codes that stand still.
    """
    kind, given = ("path", choice.path) if choice.path else ("between", choice.between)
    name = f"--{kind} {' '.join(map(str, given))}"
    if len(given) < 2 or choice.points < 2:
        raise UserError(f"{name} --points {choice.points}: needs at least two ends and two points")
    codes, what, ends = np.asarray(run.codes, np.float64), "particles", list(range(len(run.codes)))
    if choice.kmeans:
        file = folder / f"kmeans{choice.kmeans}" / "centers_ind.txt"
        with reading(file, f"make it with `opustomo analyze {run.path} --clusters {choice.kmeans}`"):
            ends = np.loadtxt(file, dtype=np.int64, ndmin=1).tolist()
        what = "classes"
    if min(given) < 0 or max(given) >= len(ends) or max(ends) >= len(codes):
        raise UserError(f"{name}: {run.path} has {what} 0 to {len(ends) - 1}; give some of them")
    anchors = [int(ends[number]) for number in given]
    rows = rows_passed(codes, anchors, kind == "path", run.typical, name)
    target = folder / path_name(choice) / "z_path.txt"
    way = along(codes[rows], choice.points)
    write_text(target.with_name("z_path_rows.txt"), as_text(rows, "%d"))
    write_text(target, as_text(way))
    plots.save(latent_plots.path_picture(codes, way, anchors, given), target.with_name("z_path.png"))
    log.info("%s: passes %d particles", name, len(rows))
    return target
