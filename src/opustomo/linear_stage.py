"""The linear stage as a step of work: data in, files and pictures out.

Owns: the verb ``linear`` and the folder ``linear`` that ``train`` writes too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opustomo import checkpoint
from opustomo.config import LinearConfig
from opustomo.data.atomic import write_csv
from opustomo.data.export import fingerprint_of
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.observe import Noise
from opustomo.data.pickles import save_pickle, save_split
from opustomo.data.poses import move_poses
from opustomo.data.split import make_split, split_rows
from opustomo.data.tensors import save_arrays, save_tensors
from opustomo.errors import UserError
from opustomo.linear import LinearModel, Posterior
from opustomo.linear_fit import HELD_OUT, LinearResult, Plan, fit_linear
from opustomo.mixture import CodeMoments, Mixture, Statistics
from opustomo.monitor import setup_log
from opustomo.physics.grid import Grid
from opustomo.preparation import RowMaker, name_damaged, prepare_process
from opustomo.reconstruct import Rows, reconstruct, shell_snr, totals

log = logging.getLogger("opustomo")

LOGGED_SHELLS = 8
KEPT = "posterior.pkl"

# ------------------------------------------------------------------------------------------------ the verb


def main(config: LinearConfig) -> int:
    """``opustomo linear``."""
    setup_log(config.output, False)
    prepare_process(config.workers)
    inputs = read_inputs(config.star, config.input, config.grid, cache=config.output / "cache")
    make_rows = RowMaker(inputs, config.output / "cache", config.input, config.workers)
    order = make_split(inputs.particles.names, config.seed)
    save_split(config.output / "split.pkl", order)
    train, held = (torch.from_numpy(part) for part in split_rows(order, HELD_OUT, inputs.particles.names))
    plan = Plan(
        train, held, config.estpose, config.seed, config.components, iterations=config.iterations, use_held=True
    )
    particles, rows, result = fit_linear(inputs.particles, make_rows, inputs.grid, inputs.mask, plan)
    name_damaged(particles, config.output)
    _write_run(config, dataclasses.replace(inputs, particles=particles), make_rows.noise_model, result, len(train))
    write_results(config.output / "linear", result, rows, inputs.grid, inputs.mask, config.clusters, config.seed)
    out = shlex.quote(str(config.output))
    log.info("next: opustomo analyze %s ; opustomo report %s", out, out)
    return 0


def _write_run(config: LinearConfig, inputs: Inputs, noise: Noise, result: LinearResult, trained: int) -> None:
    grid = inputs.grid
    values: dict[str, Any] = {
        "kind": "linear", **checkpoint.flatten(config), **grid._asdict(),
        "star": str(config.star.resolve()), "split": str((config.output / "split.pkl").resolve()),
        "valfrac": HELD_OUT, "trained_rows": trained,
        "zdim": result.model.size, "width": 0.0, "encoderres": 0, "bfactor": 0.0,
        "poses": None, "ind": None, "particles": len(inputs.particles),
        "identity": fingerprint_of(inputs.particles.names),
    }  # fmt: skip
    checkpoint.write_config(config.output, values)
    checkpoint.write_map(config.output / "mask.mrc", inputs.mask, grid)
    state = {"mask": inputs.mask, "mean": result.model.mean, "components": result.model.components}
    weights = {"kind": "linear", "epoch": 0, "model": state, **stage_state(inputs, noise, result)}
    code, sigma = result.codes.centre().float(), result.codes.spread().float()
    poses = last_poses(inputs, result, config.estpose)
    checkpoint.save_epoch(config.output, 0, weights, code, sigma, poses)


def stage_state(inputs: Inputs, noise: Noise, result: LinearResult) -> dict[str, Any]:
    """What a checkpoint keeps of the linear stage and of the particles that it speaks of."""
    model, particles = result.model, inputs.particles
    return {
        "gain": result.posterior.gain,
        "typical": result.typical,
        "usual": list(result.usual),
        "grid": list(inputs.grid),
        "noise": dataclasses.asdict(noise),
        "mixture": dataclasses.asdict(result.mixture),
        "linear": {
            "mean": model.mean,
            "components": model.components,
            "amplitude": model.places,
            "pose_scale": list(model.pose_scale),
        },
        # origins in pixels: a resumed run has the very same poses, so that its cache is still good
        **{k: torch.from_numpy(np.ascontiguousarray(getattr(particles, k))) for k in ("rotation", "origin", "euler")},
    }


def last_poses(
    inputs: Inputs, result: LinearResult, estpose: bool, *, map_held: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Poses as ``save_epoch`` takes them: those of the rows, moved by what the linear stage still finds."""
    particles = inputs.particles
    if estpose:
        particles = move_poses(particles, result.pose_error, inputs.grid, map_held=map_held)
    return particles.rotation, particles.origin / inputs.grid.box, particles.euler


# ------------------------------------------------------------------------------------------------ a second start


def keep(folder: Path, result: LinearResult, rows: Rows, noise: Noise) -> None:
    """posterior.pkl: what is known about every particle, so that a continuation does not read all rows for it."""
    key = _key(result.model, result.posterior.gain, result.mixture, rows, noise)
    if key is not None:
        known = {name: vars(getattr(result, name)) for name in ("posterior", "statistics", "codes")}
        save_tensors(folder / KEPT, {"key": key, **known, "pose_error": result.pose_error})


def kept(
    folder: Path, model: LinearModel, gain: Tensor, mixture: Mixture, rows: Rows, noise: Noise
) -> tuple[Posterior, Statistics, CodeMoments, Tensor] | None:
    """What ``keep`` wrote for this very model and these rows: posterior, statistics, codes and pose error, or None."""
    path, key = folder / KEPT, _key(model, gain, mixture, rows, noise)
    try:
        stored = checkpoint.load_tensors(path) if key is not None and path.is_file() else {}
    except UserError:
        stored = {}  # it is made again
    if stored.get("key") != key or key is None:
        return None
    posterior, statistics = Posterior(**stored["posterior"]), Statistics(**stored["statistics"])
    return posterior, statistics, CodeMoments(**stored["codes"]), stored["pose_error"]


def _key(model: LinearModel, gain: Tensor, mixture: Mixture, rows: Rows, noise: Noise) -> str | None:
    """Everything that a posterior depends on, as one hash; None for rows without a place on disk."""
    mark = getattr(rows, "fingerprint", "")
    if not mark:
        return None
    digest = hashlib.sha256(f"{mark} {model.pose_scale} {noise.contrast}".encode())
    for tensor in (model.mean, model.components, model.places, gain, noise.power, rows.moved, *vars(mixture).values()):
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def outlier_score(features: Tensor, usual: tuple[Tensor, Tensor]) -> Tensor:
    """How unlike the particles that were fitted a particle is, (P,): robust distance of its features from theirs."""
    return ((features - usual[0]) / usual[1]).square().mean(1).sqrt()


def write_results(
    folder: Path, result: LinearResult, rows: Rows, grid: Grid, mask: Tensor, clusters: int, seed: int
) -> None:
    """linear.npz, particles.csv, mean and component maps, cluster maps from the data, and pictures."""
    # matplotlib and scikit-learn: a continuation does without
    from opustomo.analysis import plots
    from opustomo.analysis.independence import independent_components

    model, post, codes = result.model, result.posterior, result.codes
    code = codes.centre().float()
    independent, mixing = (a.astype(np.float32) for a in independent_components(code.numpy(), seed))
    score = outlier_score(result.features, result.usual)
    pull = result.statistics.first[:, 1:] - result.statistics.second[:, 0, 1:]
    save_arrays(
        folder / "linear.npz",
        code=code.numpy(), covariance=codes.covariance().float().numpy(), gain=post.gain.numpy(),
        evidence=codes.evidence.numpy(), pose=result.pose_error.numpy(), pose_scale=np.array(model.pose_scale),
        gaussian=codes.share.float().numpy(), gaussian_mean=result.mixture.mean.numpy(),
        gaussian_covariance=result.mixture.covariance.numpy(), gaussian_share=result.mixture.share.numpy(),
        information=result.statistics.second[:, 1:, 1:].float().numpy(), pull=pull.float().numpy(),
        independent=independent, mixing=mixing, outlier=score.numpy(), trail=np.array(result.trail),
    )  # fmt: skip
    checkpoint.write_map(folder / "mean.mrc", model.mean, grid)
    _write_particles(folder / "particles.csv", result, code, score)
    _write_snr(folder / "snr.csv", result, rows, grid, mask)
    shown = [model.mean]
    for j, component in enumerate(model.components):
        checkpoint.write_map(folder / f"component{j + 1}.mrc", component, grid)
        shown += [model.mean - 2 * component, model.mean + 2 * component]
    titles = ["mean", *(f"component {j // 2 + 1}: {'+-'[j % 2 == 0]}2 sd" for j in range(len(shown) - 1))]
    plots.save(plots.montage(torch.stack(shown).numpy(), titles), folder / "components.png")
    if model.size and result.typical.any():
        typical = result.typical.numpy()
        distinct = len(np.unique(code.numpy()[typical], axis=0))
        _write_clusters(folder, code.numpy(), typical, rows, grid, mask, min(clusters, distinct), seed)
    if not result.typical.all():
        save_pickle(folder / "typical.pkl", torch.nonzero(result.typical)[:, 0].numpy())
        log.info("to go on without the outliers: opustomo train ... --ind %s", folder / "typical.pkl")


def _write_particles(path: Path, result: LinearResult, code: Tensor, score: Tensor) -> None:
    probability, number = result.codes.share.max(1)
    names = ["gain", "evidence_nats", "outlier_score", "gaussian", "probability"]
    columns = [result.posterior.gain, result.codes.evidence, score, number, probability, *code.T]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    header = ["row", *names, *(f"z{j + 1}" for j in range(code.shape[1]))]
    write_csv(path, header, ([i, *(f"{value:.5g}" for value in row)] for i, row in enumerate(rows, 1)))


def _write_snr(path: Path, result: LinearResult, rows: Rows, grid: Grid, mask: Tensor) -> None:
    """snr.csv, and the same in a few columns of the log: what one particle's data are worth in each shell."""
    used = torch.nonzero(result.typical)[:, 0]
    weight = totals(rows, used, result.posterior.gain[used].square(), grid)[0] / len(used)
    columns = torch.cat([result.model.mean[None], result.model.components])
    found, values = shell_snr(columns, weight, mask, grid)
    # codes have unit variance: the powers of the components add up to that of the variability
    average, variability = found[0], found[1:].sum(0)
    shells = [shell for shell in range(1, len(values)) if values[shell] > 0]
    table = [(s, grid.extent / s, *(float(column[s]) for column in (values, average, variability))) for s in shells]
    header = ["shell", "resolution_angstrom", "values", "snr_average", "snr_variability"]
    write_csv(path, header, ([shell, *(f"{number:.5g}" for number in numbers)] for shell, *numbers in table))
    shown = table[:: max(1, math.ceil(len(table) / LOGGED_SHELLS))]
    for words, column in (("resolution (A)", 1), ("average", 3), ("variability", 4)):
        title = f"{words}:" if column == 1 else f"signal over noise of one particle, {words}:"
        log.info("%-46s%s", title, "".join(f"{row[column]:>9.3g}" for row in shown))


def _write_clusters(
    folder: Path,
    code: NDArray[np.float32],
    typical: NDArray[np.bool_],
    rows: Rows,
    grid: Grid,
    mask: Tensor,
    clusters: int,
    seed: int,
) -> None:
    from sklearn.cluster import KMeans  # a second to import: a continuation does without

    from opustomo.analysis import plots

    # centres of the typical particles: a bright object would have a cluster of its own
    labels = KMeans(clusters, n_init=10, random_state=seed).fit(code[typical]).predict(code)
    save_pickle(folder / "labels.pkl", labels.astype(np.int64))
    volumes = []
    for j in range(clusters):
        members = (labels == j) & typical
        volumes.append(reconstruct(rows, torch.from_numpy(members.astype(np.float32)), grid, mask))
        checkpoint.write_map(folder / f"cluster{j}.mrc", volumes[-1], grid)
    titles = [f"cluster {j}: {int(((labels == j) & typical).sum())}" for j in range(clusters)]
    plots.save(plots.montage(torch.stack(volumes).numpy(), titles), folder / "clusters.png")
    drawn = plots.scatter(code[:, :2]) if code.shape[1] > 1 else plots.histogram(code[:, 0], labels, clusters)
    plots.save(drawn, folder / "codes.png")
