"""``opustomo evaluate``: a run against the truth of a simulated set, every metric of the benchmark.

Owns: which particles each metric looks at, RUN/evaluation.json and the printed table.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from opustomo.analysis import score_codes, score_maps, score_motions, score_poses
from opustomo.analysis.axes import axes_of, joint_groups
from opustomo.analysis.dynamics import hinges, spread_of
from opustomo.analysis.made_from import rows_of_run, source_of
from opustomo.analysis.truth import Truth, read_truth
from opustomo.config import EvaluateConfig
from opustomo.data.atomic import write_text
from opustomo.data.readers import poses_of
from opustomo.errors import UserError
from opustomo.monitor import read_rows

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

FEWEST = 10  # particles below which cross-validated scores mean nothing


def evaluate(run: Run, truth: Path) -> dict[str, Any]:
    """Scores by section: composition, conformation, motion, volumes, poses, invariance, likelihood, cost, junk,
    linear_stage.

    The last has the first three for what the network started from.

    Sections and metrics that the set or the run cannot give are left out (a single state, no decoys, no metrics.csv).
    Decoys are scored under ``junk`` and left out everywhere else.  UserError: no truth, or not of this set.
    """
    known = _truth(run, truth)
    rows = np.flatnonzero(~known.junk)
    if len(rows) < FEWEST:
        raise UserError(f"--truth {truth}: only {len(rows)} particles to score; simulate at least {FEWEST}")
    scores = _codes_and_maps(run, known, rows)
    scores["motion"] = _motion(run, known)
    scores["poses"] = _poses(run, known, rows)
    scores["invariance"] = score_codes.invariance(run.codes[rows], _nuisances(known, rows))
    scores |= _metrics(run)
    if known.junk.any():
        scores["junk"] = {"outlier_auc": score_codes.outlier_auc(score_codes.active(run.codes), known.junk)}
    start = run.linear_stage()
    if start is not None:
        scores["linear_stage"] = _codes_and_maps(start, known, rows)
    return {"run": _identity(run), **{name: section for name, section in scores.items() if section}}


def _truth(run: Run, folder: Path) -> Truth:
    """The truth of the run's particles, which may be some of the set (--ind)."""
    rows = _subset(run)
    if rows is None:
        return read_truth(folder, len(run.codes))
    return read_truth(folder, len(source_of(run.star, run.config))).at(rows)


def _subset(run: Run) -> NDArray[np.int64] | None:
    return rows_of_run(run.path, source_of(run.star, run.config).table) if run.config.get("ind") else None


def _codes_and_maps(run: Run, known: Truth, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Composition, conformation and volumes: what a network is compared with the linear stage in."""
    codes = run.codes[rows]
    states = 1 if known.state is None else len(np.unique(known.state[rows]))
    scores: dict[str, Any] = {}
    axes = axes_of(run)
    groups = joint_groups(axes)[rows] if axes else np.zeros(len(rows), np.int64)
    if known.state is not None and states > 1:
        scores["composition"] = score_codes.composition(score_codes.active(codes), known.state[rows])
        scores["composition"]["groups"] = len(np.unique(groups))
        scores["composition"]["groups_ari"] = float(adjusted_rand_score(known.state[rows], groups))
    scores["conformation"] = _conformation(run, known)
    # the classes that analyze shows and volumes decodes: groups along discrete axes, or k-means where there are none
    classes = groups if groups.any() else score_codes.kmeans_classes(codes, states)
    scores["volumes"] = score_maps.volumes(run, known, rows, classes)
    return scores


def _identity(run: Run) -> dict[str, Any]:
    return {"path": str(run.path), "kind": run.kind, "epoch": run.epoch, "particles": len(run.codes)}


def _conformation(run: Run, truth: Truth) -> dict[str, Any]:
    """Scores of every coordinate that varies, over the particles that have it."""
    scores = {}
    for name, value in truth.coordinates.items():
        rows = np.flatnonzero(np.isfinite(value) & ~truth.junk)
        if len(rows) >= FEWEST and np.ptp(value[rows]) > 0:
            scores[name] = score_codes.conformation(score_codes.active(run.codes)[rows], value[rows])
    return scores


def _motion(run: Run, truth: Truth) -> dict[str, Any]:
    """Scores of the conformation of a run with bodies, over the particles that have the part that turns."""
    if run.conformation is None or truth.hinge is None:
        return {}
    rows = np.flatnonzero(np.isfinite(truth.hinge.angle) & ~truth.junk)
    if len(rows) < FEWEST or np.ptp(truth.hinge.angle[rows]) == 0:
        return {}
    bodies = run.bodies
    found = hinges(bodies.model.bodies, bodies.motions.motion[torch.from_numpy(rows)])[0]
    deviation = spread_of(found, bodies.model.covariance)
    codes = (run.conformation[rows].astype(np.float64), run.codes[rows].astype(np.float64))
    state = None if truth.state is None else truth.state[rows]
    return score_motions.score(*codes, found, deviation, truth.hinge.at(rows), run.grid.working_pixel, state)


def _poses(run: Run, truth: Truth, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Errors of the STAR file's poses and of the run's."""
    if truth.euler is None or truth.origin is None:
        return {}
    rotation, origin = poses_of(source_of(run.star, run.config), run.grid.pixel_size)
    subset = _subset(run)
    if subset is not None:
        rotation, origin = rotation[subset], origin[subset]
    if len(rotation) != len(run.codes):
        raise UserError(
            f"{run.star}: has {len(rotation)} particles but the run has {len(run.codes)} codes; give back the STAR "
            "file that the run was made with"
        )
    true = (score_poses.rotation_matrices(truth.euler)[rows], truth.origin[rows])
    before = score_poses.pose_errors(rotation[rows], origin[rows], *true)
    after = score_poses.pose_errors(np.asarray(run.rotation, float)[rows], np.asarray(run.origin, float)[rows], *true)
    ratio = {name: after[name] / before[name] for name in before if before[name] > 1e-3}
    return {"before": before, "after": after, "ratio": ratio}


def _nuisances(truth: Truth, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    if truth.euler is not None:
        found |= score_poses.directions(score_poses.rotation_matrices(truth.euler)[rows])
    for name, value in (("defocus", truth.defocus), ("tilt_count", truth.tilt_count)):
        if value is not None:
            found[name] = value[rows].astype(np.float64)
    return found


def _metrics(run: Run) -> dict[str, Any]:
    """Held-out likelihood (nats per particle) and cost of the run, from its metrics.csv up to the epoch scored."""
    table = [row for row in read_rows(run.path / "metrics.csv") if int(row["epoch"]) <= run.epoch]
    last = {name: _last(table, name) for name in ("val_elbo", "linear_val_elbo", "seconds", "particles_per_second")}
    known = {name: value for name, value in last.items() if value is not None}
    likelihood: dict[str, float] = {n: known[n] for n in ("val_elbo", "linear_val_elbo") if n in known}
    if len(likelihood) == 2:
        likelihood["gain_over_linear"] = known["val_elbo"] - known["linear_val_elbo"]
    cost = {name: known[name] for name in ("seconds", "particles_per_second") if name in known}
    return {"likelihood": likelihood, "cost": cost}


def _last(table: list[dict[str, str]], column: str) -> float | None:
    values = [row[column] for row in table if row.get(column)]
    return float(values[-1]) if values else None


def table_text(scores: dict[str, Any]) -> str:
    """The scores as aligned lines, one section after the other."""
    lines = []
    for section, values in scores.items():
        lines.append(section)
        rows = list(_flatten(values))
        width = max((len(name) for name, _ in rows), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines)


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{name} ")
        elif not isinstance(value, list):  # FSC curves are for evaluation.json
            rows.append((prefix + name, f"{value:.3f}" if isinstance(value, float) else str(value)))
    return rows


def json_text(scores: dict[str, Any]) -> str:
    """The scores as JSON; values that are not finite become null."""
    return json.dumps(_finite(scores), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(config: EvaluateConfig) -> None:
    """Verb ``evaluate``: prints the scores and writes RUN/evaluation.json."""
    from opustomo.checkpoint import open_run

    run = open_run(config.run, config.epoch)
    scores = evaluate(run, config.truth)
    write_text(run.path / "evaluation.json", json_text(scores) + "\n")
    print(json_text(scores) if config.json else table_text(scores))
