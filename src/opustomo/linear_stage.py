"""The linear stage as a step of work: data in, linear model and posteriors out, files and pictures written.

Owns: the verb ``linear``, and the fit and corrected poses that ``train`` starts from.
"""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from torch import Tensor

from opustomo import checkpoint
from opustomo.analysis import plots
from opustomo.compat.legacy_files import save_pickle, save_split
from opustomo.config import LinearConfig
from opustomo.data.atomic import atomic
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.linear import LinearModel, Posterior, average, choose_components, fit, infer
from opustomo.monitor import setup_log
from opustomo.physics.geometry import matrix_to_euler, rotation_from_vector, update_pose
from opustomo.physics.grid import Grid
from opustomo.preparation import make_split, rows_of, set_threads
from opustomo.reconstruct import Rows, reconstruct

log = logging.getLogger("opustomo")

OUTLIER_LIMIT = 8.0  # robust standard deviations of the evidence above its median
HELD_OUT = 0.1  # fraction of particles that choose the number of components
MAX_COMPONENTS = 12
EM_STEPS = 8  # per added component: more of them overfit the components' spectrum (docs/experiments.md)


@dataclass(frozen=True)
class LinearResult:
    """The fitted linear model and the posterior of every particle under it."""

    model: LinearModel
    posterior: Posterior
    trail: list[tuple[int, float]]  # (K, held-out evidence in nats per particle)
    typical: Tensor  # (P,) bool: particles that take part in fits


def typical_particles(rows: Rows, index: Tensor, grid: Grid, mask: Tensor) -> Tensor:
    """Which particles may take part in fits, (P,) bool: all but those that the average explains far too well.

    A bright object (gold, ice, an edge) can outweigh a hundred particles and take a component for itself.  It shows
    in the evidence under the average of the particles at ``index``: robust distance above the median.
    """
    everyone = torch.arange(len(rows))
    evidence = infer(average(rows, index, grid, mask), rows, everyone, grid).evidence
    centre = evidence.median()
    spread = 1.4826 * (evidence - centre).abs().median().clamp(min=1.0)
    typical = evidence <= centre + OUTLIER_LIMIT * spread
    unusual = torch.nonzero(~typical)[:, 0]
    if len(unusual):
        first = ", ".join(str(int(i) + 1) for i in unusual[:8]) + (", ..." if len(unusual) > 8 else "")
        log.warning(
            "%d particle(s) are far brighter than the others (rows %s): left out of the fits, they still get codes; "
            "look at them, and at outlier_score in linear/particles.csv", len(unusual), first,
        )  # fmt: skip
    return typical


def fit_linear(
    rows: Rows, train: Tensor, held: Tensor, grid: Grid, mask: Tensor, components: int, iterations: int, seed: int
) -> LinearResult:
    """Linear model of the training rows and the posterior of all rows; K by held-out evidence unless given."""
    if len(train) < 2:
        raise UserError(f"{len(train)} particle(s) to fit: at least 2 are needed; add particles or lower --valfrac")
    typical = typical_particles(rows, train, grid, mask)
    train, held = train[typical[train]], held[typical[held]]
    # without held-out particles a tenth of the training ones choose K, or it would rise to the limit
    probe = held if len(held) else train[:: round(1 / HELD_OUT)]
    fitted = train if len(held) or components else train[~torch.isin(train, probe)]
    limit = components or min(MAX_COMPONENTS, max(1, len(train) // 4))
    model, trail = choose_components(rows, fitted, probe, grid, mask, limit, iterations, seed, bool(components))
    posterior = infer(model, rows, torch.arange(len(rows)), grid)
    rotation, shift = math.degrees(model.pose_scale[0]), model.pose_scale[1] * grid.working_pixel
    log.info(
        "linear stage: %d components; evidence of held-out particles %.2f nats (average alone %.2f); the data show "
        "pose errors of %.2f degrees and %.2f A per axis",
        model.size, float(posterior.evidence[probe].mean()), trail[0][1], rotation, shift,
    )  # fmt: skip
    return LinearResult(model, posterior, trail, typical)


def corrected_poses(
    particles: Particles, result: LinearResult, grid: Grid
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Poses moved by the posterior mean of the pose error, without the mean move: rotation, origin (px), Euler."""
    turn = result.posterior.pose[:, :3] * result.model.pose_scale[0]
    shift = result.posterior.pose[:, 3:] * result.model.pose_scale[1] * (grid.box / grid.working_box)
    # a common move of all particles is a change of the map, not of the poses
    turn, shift = turn - turn.mean(0), shift - shift.mean(0)
    rotation, origin = update_pose(
        torch.from_numpy(particles.rotation),
        torch.from_numpy(particles.origin),
        rotation_from_vector(turn).double(),
        shift.double(),
    )
    return rotation.numpy(), origin.numpy(), matrix_to_euler(rotation).numpy()


# ------------------------------------------------------------------------------------------------ the verb


def main(config: LinearConfig) -> int:
    """``opustomo linear``."""
    setup_log(config.output, False)
    set_threads(config.workers)
    inputs = read_inputs(config.star, config.input, config.grid)
    rows = rows_of(inputs, config.output / "cache", config.input, config.workers)
    order = make_split(len(rows), config.seed)
    save_split(config.output / "split.pkl", order)
    train, held = checkpoint.split_rows(order, HELD_OUT)
    result = fit_linear(
        rows, torch.from_numpy(train), torch.from_numpy(held), inputs.grid, inputs.mask,
        config.components, config.iterations, config.seed,
    )  # fmt: skip
    # the number of components is chosen: the last steps use every particle, the held-out ones too
    model = fit(result.model, rows, torch.nonzero(result.typical)[:, 0], inputs.grid, inputs.mask, 4)
    result = replace(result, model=model, posterior=infer(model, rows, torch.arange(len(rows)), inputs.grid))
    _write_run(config, inputs, result)
    write_results(config.output / "linear", result, rows, inputs.grid, inputs.mask, config.clusters, config.seed)
    log.info("next: opustomo analyze %s ; opustomo report %s", config.output, config.output)
    return 0


def _write_run(config: LinearConfig, inputs: Inputs, result: LinearResult) -> None:
    grid, post = inputs.grid, result.posterior
    values: dict[str, Any] = {
        "kind": "linear", **checkpoint.flatten(config), **grid._asdict(),
        "star": str(config.star.resolve()), "split": str((config.output / "split.pkl").resolve()),
        "valfrac": HELD_OUT, "zdim": result.model.size, "width": 0.0, "encoderres": 0, "bfactor": 0.0,
        "poses": None, "ind": None, "particles": len(inputs.particles),
    }  # fmt: skip
    checkpoint.write_config(config.output, values)
    checkpoint.write_map(config.output / "mask.mrc", inputs.mask, grid)
    rotation, origin, euler = corrected_poses(inputs.particles, result, grid)
    state = {"mask": inputs.mask, "mean": result.model.mean, "components": result.model.components}
    sigma = post.code_covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    poses = (rotation, origin / grid.box, euler)
    checkpoint.save_epoch(config.output, 0, {"kind": "linear", "epoch": 0, "model": state}, post.code, sigma, poses)


def outlier_score(code: Tensor, gain: Tensor, evidence: Tensor) -> Tensor:
    """How unlike the others a particle is, (P,): robust distance of code and gain from their centre.

    Medians and median absolute deviations, so that the outliers themselves do not set the scale.
    """
    features = torch.cat([code, gain[:, None], evidence[:, None]], 1)
    centre = features.median(0).values
    spread = 1.4826 * (features - centre).abs().median(0).values
    return ((features - centre) / spread.clamp(min=1e-6)).square().mean(1).sqrt()


def write_results(
    folder: Path, result: LinearResult, rows: Rows, grid: Grid, mask: Tensor, clusters: int, seed: int
) -> None:
    """linear.npz, particles.csv, mean and component maps, cluster maps from the data, and pictures."""
    model, post = result.model, result.posterior
    independent, mixing = independent_components(post.code.numpy(), seed)
    score = outlier_score(post.code, post.gain, post.evidence)
    with atomic(folder / "linear.npz") as temporary, temporary.open("wb") as handle:
        np.savez(
            handle,
            code=post.code.numpy(), covariance=post.code_covariance.numpy(), gain=post.gain.numpy(),
            evidence=post.evidence.numpy(), pose=post.pose.numpy(), pose_scale=np.array(model.pose_scale),
            independent=independent, mixing=mixing, outlier=score.numpy(), trail=np.array(result.trail),
        )  # fmt: skip
    checkpoint.write_map(folder / "mean.mrc", model.mean, grid)
    _write_particles(folder / "particles.csv", post, score)
    shown = [model.mean]
    for j, component in enumerate(model.components):
        checkpoint.write_map(folder / f"component{j + 1}.mrc", component, grid)
        shown += [model.mean - 2 * component, model.mean + 2 * component]
    titles = ["mean", *(f"component {j // 2 + 1}: {'+-'[j % 2 == 0]}2 sd" for j in range(len(shown) - 1))]
    plots.save(plots.montage(torch.stack(shown).numpy(), titles), folder / "components.png")
    if model.size:
        _write_clusters(folder, post.code.numpy(), rows, grid, mask, min(clusters, len(score)), seed)


def independent_components(code: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Codes rotated to independence (P, K) and the mixing (K, K): distinct changes on distinct axes (FastICA)."""
    k = code.shape[1]
    if k < 2 or len(code) <= 2 * k:
        return code, np.eye(k, dtype=np.float32)
    ica = FastICA(k, whiten="unit-variance", random_state=seed, max_iter=2000, tol=1e-3)
    turned = ica.fit_transform(code.astype(np.float64))
    return turned.astype(np.float32), ica.mixing_.astype(np.float32)


def _write_particles(path: Path, post: Posterior, score: Tensor) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(
            ["row", "gain", "evidence_nats", "outlier_score", *(f"z{j + 1}" for j in range(post.code.shape[1]))]
        )
        for i in range(len(score)):
            numbers = [post.gain[i], post.evidence[i], score[i], *post.code[i]]
            writer.writerow([i + 1, *(f"{float(v):.5g}" for v in numbers)])


def _write_clusters(
    folder: Path, code: NDArray[np.float32], rows: Rows, grid: Grid, mask: Tensor, clusters: int, seed: int
) -> None:
    labels = KMeans(clusters, n_init=10, random_state=seed).fit_predict(code)
    save_pickle(folder / "labels.pkl", labels.astype(np.int64))
    volumes = []
    for j in range(clusters):
        volumes.append(reconstruct(rows, torch.from_numpy((labels == j).astype(np.float32)), grid, mask))
        checkpoint.write_map(folder / f"cluster{j}.mrc", volumes[-1], grid)
    titles = [f"cluster {j}: {int((labels == j).sum())}" for j in range(clusters)]
    plots.save(plots.montage(torch.stack(volumes).numpy(), titles), folder / "clusters.png")
    plots.save(plots.scatter(code[:, :2] if code.shape[1] > 1 else np.c_[code, code]), folder / "codes.png")
