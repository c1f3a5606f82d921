"""What the codes of a run look like: principal components, traversals, k-means classes and a UMAP embedding.

Owns: the files of ``RUN/analyze.N`` (verb ``analyze``), under the names that scripts for cryoDRGN-like programs expect.
"""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from opustomo.analysis import latent_plots, plots
from opustomo.analysis.axes import as_text, nearest, write_axes
from opustomo.analysis.picked import read_selection
from opustomo.analysis.places import options_of, rows_within
from opustomo.config import AnalyzeConfig
from opustomo.config_analysis import Codes
from opustomo.data.atomic import remove_dead, write_text
from opustomo.data.pickles import load_labels, load_pickle, save_pickle
from opustomo.errors import UserError, reading

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

TRAVERSAL_POINTS = 10
FEWEST_FOR_UMAP = 10
DRAWS = 32  # of each code, for the probability of its class
SAMPLE = 50_000  # particles that are enough to find classes; of more, the others join the nearest
UMAP_SAMPLE = 20_000  # particles that UMAP arranges; of more, the others are put between their neighbours
CERTAIN = 0.9  # probability of its class above which a particle is called certain
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """Principal components of codes (P, zdim): ``codes = mean + scores @ axes``, n = min(P, zdim)."""

    mean: Floats  # (zdim,)
    axes: Floats  # (n, zdim), unit rows
    scores: Floats  # (P, n)
    explained: Floats  # (n,) fraction of the variance; zeros when the codes do not vary


@dataclass(frozen=True)
class Analysis:
    """What ``analyze`` found; everything in it is also in ``folder``."""

    folder: Path  # RUN/analyze.N
    pca_scores: Floats  # (P, n)
    explained: Floats  # (n,)
    labels: NDArray[np.int64]  # (P,) class of every particle, 0-based
    centre_index: NDArray[np.int64]  # (K,) the particle that stands for each class
    umap: Floats | None  # (P, 2)

    @property
    def clusters_folder(self) -> Path:
        """RUN/analyze.N/kmeansK."""
        return self.folder / f"kmeans{len(self.centre_index)}"


def main(config: AnalyzeConfig) -> None:
    """Verb ``analyze``."""
    from opustomo.analysis.dynamics import write_dynamics  # here, so that reading labels does not load torch
    from opustomo.analysis.seen import seen_as, some_of
    from opustomo.analysis.series_motion import write_series
    from opustomo.checkpoint import open_run

    run = open_run(config.run, config.epoch)
    rows = _rows_chosen(config, run)
    wanted: list[Codes] = [config.codes] if config.codes != "all" else ["composition"]
    if config.codes == "all" and run.conformation is not None:
        wanted.append("conformation")
    for codes in wanted:
        seen = seen_as(run, codes, rows is not None)
        seen = seen if rows is None else some_of(seen, rows)
        result = analyze(seen, config.pcs, config.clusters, config.skip_umap, config.seed)
        if codes != "composition":
            write_dynamics(seen, result.folder)
        elif config.dynamics:
            write_series(seen, result.folder)
        sizes = np.bincount(result.labels[result.labels >= 0], minlength=len(result.centre_index))
        log.info("class sizes: %s", ", ".join(f"{k}: {n}" for k, n in enumerate(sizes)))
        log.info("written: %s", result.folder)
        more = options_of(codes, rows is not None)
        path = shlex.quote(str(run.path))
        log.info("next: opustomo volumes %s%s --kmeans %d ; opustomo report %s", path, more, len(sizes), path)


def _rows_chosen(config: AnalyzeConfig, run: Run) -> NDArray[np.int64] | None:
    """Rows of a second round; None: all particles."""
    if config.selection is not None:
        if config.within is not None:
            raise UserError("--selection and --within: give one of them")
        return read_selection(run.path, config.selection)
    return None if config.within is None else rows_within(run.path, run.epoch, config.within)


def analysis_folder(run: Run) -> Path:
    """RUN/analyze.N, or of the codes that the run is seen by, for the epoch that is open."""
    return run.path / f"{run.analysis}.{run.epoch}"


def analyze(run: Run, pcs: int = 4, clusters: int = 16, skip_umap: bool = False, seed: int = 0) -> Analysis:
    """Analyse ``run.codes`` and write RUN/analyze.N: see docs/outputs for the files.

    UserError: K larger than the number of particles, ``pcs`` or ``clusters`` below 1, codes that are not finite.
    """
    codes = np.asarray(run.codes, np.float64)
    _check(codes, pcs, clusters, run.path)
    folder = analysis_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead(folder)
    if run.rows is not None and not _is_of(folder, run.rows):
        (folder / "umap.pkl").unlink(missing_ok=True)  # of an earlier second round
    components = principal_components(codes)
    if pcs > len(components.axes):
        log.warning("%d components instead of %d: the codes have no more", len(components.axes), pcs)
    used = in_use(components.explained)
    if used < min(pcs, len(components.axes)):
        log.warning("the codes vary along %d component(s) only: pc%d and beyond stand still", used, used + 1)
    _write_components(components, pcs, folder)
    labels, centre_index = cluster(codes, clusters, seed, run.typical)
    embedding = stored_umap(folder, len(codes)) if skip_umap else embed(codes, seed)
    if embedding is not None and not skip_umap:
        save_pickle(folder / "umap.pkl", embedding.astype(np.float32))
    result = Analysis(folder, components.scores, components.explained, labels, centre_index, embedding)
    _write_classes(result, codes)
    write_axes(run, folder)
    _draw(result, np.asarray(run.rotation))
    if run.rows is not None:
        return _of_all(result, run.rows, int(run.config["particles"]))
    if run.analysis == "analyze":
        _around(run, result, clusters, seed)
    return result


def _is_of(folder: Path, rows: NDArray[np.int64]) -> bool:
    """Whether the second round in ``folder`` is of these particles."""
    path = folder / "rows.txt"
    return path.is_file() and path.read_text() == as_text(rows, "%d")


def _of_all(result: Analysis, rows: NDArray[np.int64], count: int) -> Analysis:
    """Classes and centres of some particles, told of all ``count``: -1 where a particle was left out."""
    folder = result.folder
    for path in [*folder.glob("pc*/labels.pkl"), result.clusters_folder / "labels.pkl"]:
        everyone = np.full(count, -1, np.int64)
        everyone[rows] = load_labels(path)
        save_pickle(path, everyone)
    write_text(result.clusters_folder / "centers_ind.txt", as_text(rows[result.centre_index], "%d"))
    write_text(folder / "rows.txt", as_text(rows, "%d"))
    return replace(result, labels=everyone, centre_index=rows[result.centre_index])


def _around(run: Run, result: Analysis, clusters: int, seed: int) -> None:
    """What else is known of the particles, over their codes, and how the codes came about."""
    from opustomo.analysis import controls  # here: it reads particles, and those modules read labels from here

    plane, names = pca_plane(result.pca_scores, result.explained)
    over = (plane, names) if result.umap is None else (result.umap, ("UMAP1", "UMAP2"))
    controls.write_controls(run, *over, result.folder)
    controls.write_tomograms(run, result.labels, result.clusters_folder)
    controls.write_convergence(run, clusters, result.folder, seed)


def stored_analysis(run: Run, clusters: int = 0) -> Analysis | None:
    """The analysis on disk of this epoch with ``clusters`` classes (0: the most there are), or None."""
    folder = analysis_folder(run)
    found = {int(p.parent.name[6:]): p.parent for p in folder.glob("kmeans*/labels.pkl") if p.parent.name[6:].isdigit()}
    chosen = found.get(clusters or max(found, default=0))
    if chosen is None:
        return None
    codes = np.asarray(run.codes, np.float64)
    labels = load_labels(chosen / "labels.pkl")
    with reading(chosen / "centers_ind.txt", "run `opustomo analyze` again"):
        index = np.loadtxt(chosen / "centers_ind.txt", dtype=np.int64, ndmin=1)
    if len(labels) != len(codes) or labels.max() >= len(index) or index.max() >= len(codes):
        return None
    components = principal_components(codes)
    umap = stored_umap(folder, len(codes))
    return Analysis(folder, components.scores, components.explained, labels, index, umap)


def principal_components(codes: Floats) -> Components:
    """PCA of (P, zdim) codes by singular values; codes that do not vary have scores and fractions of zero."""
    count = min(codes.shape)
    if np.ptp(codes, axis=0).max() == 0:
        zero = np.zeros((len(codes), count))
        return Components(codes[0].copy(), np.eye(codes.shape[1])[:count], zero, np.zeros(count))
    pca = PCA(count, svd_solver="full").fit(codes)
    return Components(pca.mean_, pca.components_, pca.transform(codes), pca.explained_variance_ratio_)


def in_use(explained: Floats) -> int:
    """Components that carry variance, of fractions ``explained`` (n,): codes may have columns that are not used."""
    return int((explained > 1e-9).sum())


def traversal(components: Components, pc: int, points: int = TRAVERSAL_POINTS) -> Floats:
    """(points, zdim) codes along component ``pc`` (1-based): 5th to 95th percentile of its scores, the others 0."""
    score = components.scores[:, pc - 1]
    first, last = (float(value) for value in np.percentile(score, [5, 95]))
    steps = np.linspace(first, last, points)
    codes: Floats = components.mean + steps[:, None] * components.axes[pc - 1]
    return codes


def cluster(
    codes: Floats, k: int, seed: int, typical: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """k-means of (P, zdim) codes: labels (P,) and, per class, its member nearest to the centre (K,).

    typical: (P,) particles that make the classes; outliers only join the nearest, or they would take classes for
    themselves.  Of more than 50,000 a random sample makes them.  Classes are numbered so that neighbours in number are
    neighbours in code space.  Fewer distinct codes than ``k`` give as many classes as there are distinct codes.
    """
    makers = np.ones(len(codes), bool) if typical is None else typical
    distinct = len(np.unique(codes[makers], axis=0))
    if distinct < k:
        log.warning("only %d distinct codes: %d classes instead of %d", distinct, distinct, k)
        k = distinct
    fit = KMeans(k, n_init=10, random_state=seed).fit(codes[_some(np.flatnonzero(makers), SAMPLE, seed)])
    order = np.arange(k) if k < 3 else leaves_list(linkage(fit.cluster_centers_, "average", optimal_ordering=True))
    labels = np.argsort(order)[fit.predict(codes)]
    centres = fit.cluster_centers_[order]
    distance = np.where(makers, np.linalg.norm(codes - centres[labels], axis=1), np.inf)
    # the nearest *member*: a centre between two dense classes may have a nearer neighbour in the other one
    nearest = [int(np.flatnonzero(labels == c)[distance[labels == c].argmin()]) for c in range(k)]
    return labels.astype(np.int64), np.array(nearest, np.int64)


def _some(rows: NDArray[np.integer], most: int, seed: int) -> NDArray[np.integer]:
    """At most ``most`` of row numbers, at random but in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def class_probability(
    codes: NDArray[np.floating], sigma: NDArray[np.floating], labels: NDArray[np.integer], seed: int = 0
) -> Floats:
    """(P,) how likely each particle belongs to its class, given how well its code is known.

    The share of codes drawn from N(code, sigma^2) whose nearest particle (of at most 50,000) is of the same class.  It
    holds for any partition.
    codes, sigma: (P, zdim); columns that do not vary say nothing and are left out.
    """
    used = np.ptp(codes, axis=0) > 0
    if not used.any():
        return np.ones(len(codes))
    centre, spread = np.asarray(codes, np.float64)[:, used], np.asarray(sigma, np.float64)[:, used]
    some = _some(np.arange(len(centre)), SAMPLE, seed)
    tree, rng, same = cKDTree(centre[some]), np.random.default_rng(seed), np.zeros(len(codes))
    for _ in range(DRAWS):
        nearest = tree.query(centre + spread * rng.standard_normal(centre.shape), workers=-1)[1]
        same += labels[some[nearest]] == labels
    probability: Floats = same / DRAWS
    return probability


def embed(codes: Floats, seed: int) -> Floats | None:
    """UMAP of (P, zdim) codes to (P, 2), reproducible for a seed; None for too few or constant codes.

    Of more than 20,000 a random sample is embedded; the others stand at the mean of their nearest neighbours in it,
    weighted by closeness, where ``UMAP.transform`` would start from too.
    """
    if len(codes) < FEWEST_FOR_UMAP or np.ptp(codes, axis=0).max() == 0:
        log.warning("no UMAP: it needs at least %d particles and codes that vary", FEWEST_FOR_UMAP)
        return None
    some = _some(np.arange(len(codes)), UMAP_SAMPLE, seed)
    part, of = codes[some], f" of {len(codes)}" if len(some) < len(codes) else ""
    log.info("UMAP of %d%s codes (the first fit on a machine compiles for about a minute) ...", len(part), of)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of umap's own imports and compiler, nothing a user could act on
        from umap import UMAP

        first = principal_components(part).scores[:, :2]
        first = np.pad(first, ((0, 0), (0, 2 - first.shape[1])))
        first = 10 * first / np.abs(first).max() + np.random.default_rng(seed).normal(0, 1e-3, first.shape)
        # n_jobs=1 is what a fixed seed needs; started from the PCA, distances between groups keep some meaning
        fit = UMAP(n_neighbors=min(15, len(part) - 1), random_state=seed, n_jobs=1, init=first.astype(np.float32))
        result: Floats = np.asarray(fit.fit_transform(part.astype(np.float32)), np.float64)
    if of:
        distance, near = cKDTree(part).query(codes, 5, workers=-1)
        weight = 1.0 / np.maximum(distance, 1e-6 * max(float(distance.max()), 1e-30))
        result = (result[near] * (weight / weight.sum(1, keepdims=True))[..., None]).sum(1)
    log.info("UMAP took %.0f s", time.perf_counter() - start)
    return result


def _check(codes: Floats, pcs: int, clusters: int, where: Path) -> None:
    if pcs < 1 or clusters < 1:
        raise UserError(f"--pcs {pcs} --clusters {clusters}: both must be at least 1")
    if clusters > len(codes):
        raise UserError(f"--clusters {clusters}: {where} has {len(codes)} particles; give at most that many")
    bad = np.flatnonzero(~np.isfinite(codes).all(axis=1))
    if bad.size:
        raise UserError(f"{where}: the code of particle {bad[0] + 1} is not a finite number; train again from an "
                        "earlier checkpoint with a smaller --lr")  # fmt: skip
    if np.ptp(codes, axis=0).max() == 0:
        log.warning("the codes of all %d particles are equal: one class, no variance", len(codes))


def stored_umap(folder: Path, particles: int) -> Floats | None:
    """(P, 2) of umap.pkl in ``folder``; None, and a line in the log, where it is not there or of other particles."""
    path = folder / "umap.pkl"
    with reading(path, "run `opustomo analyze` again"):
        found = np.asarray(load_pickle(path), np.float64) if path.is_file() else None
    if found is not None and found.shape == (particles, 2):
        return found
    log.info(
        "no UMAP pictures: %s", "umap.pkl belongs to other particles" if found is not None else f"no {path} stored"
    )
    return None


def _write_components(components: Components, pcs: int, folder: Path) -> None:
    write_text(folder / "explained_variance.txt", as_text(components.explained, "%.6f"))
    for pc in range(1, min(pcs, len(components.axes)) + 1):
        codes, score = traversal(components, pc), components.scores[:, pc - 1]
        write_text(folder / f"pc{pc}" / "z_pc.txt", as_text(codes))
        steps = (codes - components.mean) @ components.axes[pc - 1]
        save_pickle(folder / f"pc{pc}" / "labels.pkl", nearest(score, steps))


def _write_classes(result: Analysis, codes: Floats) -> None:
    folder = result.clusters_folder
    save_pickle(folder / "labels.pkl", result.labels)
    write_text(folder / "centers.txt", as_text(codes[result.centre_index]))
    write_text(folder / "centers_ind.txt", as_text(result.centre_index, "%d"))


def pca_plane(scores: Floats, explained: Floats) -> tuple[Floats, tuple[str, str]]:
    """(P, 2) coordinates on the first two components and their axis names; a missing one is zero."""
    xy = np.pad(scores[:, :2], ((0, 0), (0, max(0, 2 - scores.shape[1]))))
    share = [*explained[:2], 0.0, 0.0]
    return xy, (f"PC1 ({share[0]:.0%})", f"PC2 ({share[1]:.0%})")


def _draw(result: Analysis, rotation: Floats) -> None:
    """Every picture of the folder; the beam axis in the consensus frame is A^T z, the third row of A."""
    folder, kmeans, direction = result.folder, result.clusters_folder, rotation[:, 2, :]
    plane, names = pca_plane(result.pca_scores, result.explained)
    plots.save(plots.explained_variance(result.explained), folder / "explained_variance.png")
    if in_use(result.explained) < 2:
        codes = plots.histogram(plane[:, 0], np.zeros(len(plane), np.int64), 1, names[0], "Codes")
        classes = plots.histogram(plane[:, 0], result.labels, len(result.centre_index), names[0], "Classes")
    else:
        codes = plots.scatter(plane, names, "Codes")
        classes = plots.classes(plane, result.labels, result.centre_index, names, "Classes")
    if in_use(result.explained) > 1:
        plots.save(latent_plots.density(plane, names, "Density of the codes"), folder / "z_density.png")
    plots.save(codes, folder / "z_pca.png")
    plots.save(classes, kmeans / "z_pca.png")
    if result.umap is None:
        return
    axes = ("UMAP1", "UMAP2")
    plots.save(plots.viewing_direction(result.umap, direction, axes, "Viewing direction"), folder / "umap.png")
    plots.save(plots.hexbin(result.umap, axes, "Particles"), folder / "umap_hexbin.png")
    plots.save(plots.classes(result.umap, result.labels, result.centre_index, axes, "Classes"), kmeans / "umap.png")
