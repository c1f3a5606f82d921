"""What the codes should not show, or may: every number of the STAR file over them, classes by tomogram, epochs.

Owns: controls.csv, tomograms.csv, convergence.csv and their pictures below analyze.N.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from opustomo.analysis import latent_plots, plots
from opustomo.analysis.made_from import run_particles
from opustomo.data.atomic import write_csv
from opustomo.data.particles import turn_of_each
from opustomo.data.readers.relion import identities, tomograms
from opustomo.errors import UserError

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
NEIGHBOURS = 15  # whose mean predicts a particle's number
SAMPLE = 20_000  # particles that are enough to know how well
NOTABLE = 0.1  # R^2 above which the log names a column
PANELS = 24  # columns in the picture


def write_controls(run: Run, embedding: Floats, names: tuple[str, str], folder: Path) -> dict[str, float]:
    """controls.csv and controls.png: each numeric column of the STAR file over ``embedding`` (P, 2); R^2 by name.

    R^2: how much of a column's variance the mean of a particle's neighbours in the code tells, less what it tells with
    the column shuffled.  Columns that do not vary are left out; nothing is written without the run's STAR file.
    """
    known = run_particles(run)
    columns = {} if known is None else numeric_columns(known[0].table.particles.iloc[known[1]])
    if known is None or not columns:
        return {}
    particle = identities(known[0].table)[known[1]]
    explained = told_by_codes(np.asarray(run.codes, np.float64), columns, particle)
    order = sorted(columns, key=lambda name: -explained[name])
    rows = [[name, f"{explained[name]:.4f}", *(f"{v:.6g}" for v in np.percentile(columns[name], [0, 50, 100]))]
            for name in order]  # fmt: skip
    write_csv(folder / "controls.csv", ["column", "r2", "lowest", "median", "highest"], rows)
    shown = {name: columns[name] for name in order[:PANELS]}
    plots.save(latent_plots.controls(embedding, shown, explained, names), folder / "controls.png")
    told = [f"{name} ({explained[name]:.2f})" for name in order if explained[name] > NOTABLE]
    if told:
        log.info("columns of the STAR file that the codes tell (R^2): %s; see controls.png", ", ".join(told))
    return explained


def numeric_columns(table: pd.DataFrame) -> dict[str, Floats]:
    """Columns that are all finite numbers and vary, (P,) each."""
    found = {}
    for name in table.columns:
        value = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
        if np.isfinite(value).all() and np.ptp(value) > 0:
            found[str(name)] = value
    return found


def told_by_codes(
    codes: Floats, columns: Mapping[str, Floats], particle: NDArray[Any], seed: int = 0
) -> dict[str, float]:
    """R^2 of each column (P,) from the neighbours in ``codes`` (P, zdim); 0 where it is that of a shuffled column.

    particle: (P,) which one each row is of; of its copies (``expand``), whose columns are the same, one is looked at.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(codes))
    some = order[turn_of_each(particle[order]) == 0][:SAMPLE]
    if len(some) < 2 * NEIGHBOURS or np.ptp(codes, axis=0).max() == 0:
        return dict.fromkeys(columns, 0.0)
    # equal codes have no nearest one: a little noise deals them out at random
    places = codes[some] + rng.normal(0, 1e-6 * codes.std() + 1e-30, (len(some), codes.shape[1]))
    near = cKDTree(places).query(places, NEIGHBOURS + 1, workers=-1)[1][:, 1:]

    def r2(value: Floats) -> float:
        return float(1 - np.mean((value - value[near].mean(1)) ** 2) / np.var(value))

    return {
        name: r2(value[some]) - r2(rng.permutation(value[some])) if np.ptp(value[some]) > 0 else 0.0
        for name, value in columns.items()
    }


def write_tomograms(run: Run, labels: NDArray[np.integer], folder: Path) -> None:
    """tomograms.csv and tomograms.png in ``folder``: particles of each class of ``labels`` (P,) in every tomogram."""
    names = tomogram_names(run)
    if names is None:
        return
    count = int(labels.max()) + 1
    shown, index = np.unique(names, return_inverse=True)
    table = np.zeros((len(shown), count), np.int64)
    np.add.at(table, (index, labels), 1)
    share = table.sum(0) / table.sum()
    expected = table.sum(1, keepdims=True) * share
    chi = ((table - expected) ** 2 / np.maximum(expected, 1e-12)).sum(1)
    rows = [[name, int(line.sum()), *line.tolist(), f"{value:.2f}"]
            for name, line, value in zip(shown, table, chi, strict=True)]  # fmt: skip
    header = ["tomogram", "particles", *(f"class{c}" for c in range(count)), "chi2"]
    write_csv(folder / "tomograms.csv", header, rows)
    plots.save(plots.tomogram_fractions(np.asarray(labels), names, count), folder / "tomograms.png")


def tomogram_names(run: Run) -> NDArray[np.str_] | None:
    """(P,) tomogram of every particle; None without the STAR file or where there is but one."""
    known = run_particles(run)
    if known is None:
        return None
    names = tomograms(known[0].table).astype(str)[known[1]]
    return names if len(np.unique(names)) > 1 else None


def write_convergence(run: Run, clusters: int, folder: Path, seed: int = 0) -> Path | None:
    """convergence.csv and convergence.png: how codes and classes change up to this epoch; None for a single epoch.

    Of every epoch and the one kept before it: ``code_r2``, the variance of the codes that the best linear map from the
    earlier ones explains; ``neighbours_kept``, the share of each particle's nearest eight that stay; ``classes_ari``,
    agreement of k-means with ``clusters`` classes.  ``classes_ari_last`` is the agreement with this epoch's classes.
    """
    from opustomo.checkpoint import epochs_of, load_tensors

    epochs = [epoch for epoch in epochs_of(run.path) if epoch <= run.epoch]
    try:
        stored = [load_tensors(run.path / f"z.{epoch}.pkl") for epoch in epochs]
    except UserError as error:
        log.warning("epochs are not compared: %s", error)
        return None
    kept = [(epoch, z) for epoch, z in zip(epochs, stored, strict=True) if len(z["mu"]) == len(run.codes)]
    if len(kept) < 2:
        return None
    some = np.random.default_rng(seed).permutation(len(run.codes))[:SAMPLE]
    codes = [z["mu"].numpy().astype(np.float64)[some] for _, z in kept]
    labels = [_classes(code, clusters, seed) for code in codes]
    columns: dict[str, list[float]] = {"code_r2": [np.nan], "neighbours_kept": [np.nan], "classes_ari": [np.nan]}
    for i in range(1, len(kept)):
        before, after = (kept[j][1]["nn"].numpy()[some] for j in (i - 1, i))
        same = (before[:, :, None] == after[:, None, :]).any(2).mean() if before.size and after.size else np.nan
        columns["code_r2"].append(linear_r2(codes[i - 1], codes[i]))
        columns["neighbours_kept"].append(float(same))
        columns["classes_ari"].append(float(adjusted_rand_score(labels[i - 1], labels[i])))
    columns["classes_ari_last"] = [float(adjusted_rand_score(labels[-1], label)) for label in labels]
    numbers = [epoch for epoch, _ in kept]
    rows = [[n, *("" if np.isnan(c[i]) else f"{c[i]:.4f}" for c in columns.values())] for i, n in enumerate(numbers)]
    write_csv(folder / "convergence.csv", ["epoch", *columns], rows)
    figure = latent_plots.convergence(np.array(numbers), {name: np.array(c) for name, c in columns.items()})
    return plots.save(figure, folder / "convergence.png")


def linear_r2(before: Floats, after: Floats) -> float:
    """Share of the variance of ``after`` (P, K) that the best affine map of ``before`` (P, J) explains; 1 for none."""
    design = np.column_stack([before, np.ones(len(before))])
    total = float(np.square(after - after.mean(0)).sum())
    residual = after - design @ np.linalg.lstsq(design, after, rcond=None)[0]
    return 1.0 if total == 0 else float(1 - np.square(residual).sum() / total)


def _classes(codes: Floats, clusters: int, seed: int) -> NDArray[np.int64]:
    count = min(clusters, len(np.unique(codes, axis=0)))
    return np.asarray(KMeans(count, n_init=3, random_state=seed).fit_predict(codes), np.int64)
