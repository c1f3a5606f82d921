"""The verb ``encode``: other particles of the same molecule in the model of a finished run.

Owns: what is found for new particles: their own poses and gains, and their noise model.  Nothing else is fitted.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opustomo import checkpoint
from opustomo.body_stage import find_in_bodies, with_common, write_bodies
from opustomo.config import EncodeConfig
from opustomo.data.cache import CTF_PACK, hash_mask
from opustomo.data.export import fingerprint_of
from opustomo.data.inputs import Inputs
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import Noise, observe_all, sample_rows
from opustomo.data.readers import read_particles
from opustomo.data.readers.sampling import differ
from opustomo.errors import UserError
from opustomo.linear import LinearModel
from opustomo.linear_fit import (
    MOST_OUTLIERS,
    OUTLIER_LIMIT,
    Fit,
    LinearResult,
    change_over_average,
    correct_poses,
    first_rows,
    judged,
    linear_result,
)
from opustomo.linear_stage import last_poses, stage_state, write_results
from opustomo.mixture import Mixture
from opustomo.monitor import setup_log
from opustomo.physics.fourier import band_frequencies, band_multiplicity
from opustomo.physics.observation import band_volume, model_band
from opustomo.preparation import RowMaker, name_damaged, prepare_process, tell
from opustomo.reconstruct import Rows
from opustomo.training.context import context_of, encode_all
from opustomo.training.start import CLUSTERS, Start, device_of, stored_linear

log = logging.getLogger("opustomo")

SAMPLE = 96  # particles from which the scale of new data is taken
COARSE = 0.15  # of the working box: shells below it
SCALE = 1.3  # grey values that are further off than this factor are brought to the run's; gains do the rest
FEW = 24  # particles, of which the noise cannot be told well
EVIDENCE = -2  # among the features
# what a checkpoint must have besides the model
_NEEDED = frozenset({"linear", "mixture", "usual", "grid", "noise"})


def main(config: EncodeConfig) -> int:
    """``opustomo encode``."""
    run = checkpoint.open_run(config.run, config.epoch)
    _refuse(config, run)
    device = device_of(config.device)
    setup_log(config.output, False)
    prepare_process(config.workers)
    inputs = _new_particles(config, run)
    model = stored_linear(run.weights, run.grid, run.mask)
    make_rows = RowMaker(inputs, config.output / "cache", config.input, config.workers)
    make_rows.noise = noise_in_units_of(model, inputs, config)
    start = _in_model(run, model, inputs, make_rows, config.output / "bodies", device)
    name_damaged(inputs.particles, config.output)
    _name_unusual(run, start.linear)
    if run.kind == "network":
        context = context_of(start.inputs, start.rows, start.linear, np.zeros(len(start.rows), np.int64), device)
        code, sigma = encode_all(run.model.to(device), context, run.codes.shape[1])
    else:
        code, sigma = start.linear.codes.centre().float(), start.linear.codes.spread().float()
    _write(config, run, start, code, sigma)
    out = shlex.quote(str(config.output))
    log.info("%d particles encoded with epoch %d of %s; next: opustomo analyze %s ; opustomo report %s",
             len(code), run.epoch, run.path, out, out)  # fmt: skip
    return 0


def _refuse(config: EncodeConfig, run: checkpoint.Run) -> None:
    if checkpoint.epochs_of(config.output):
        raise UserError(f"-o {config.output}: holds a run already; choose another folder")
    if missing := _NEEDED - run.weights.keys():
        raise UserError(
            f"{run.path}/weights.{run.epoch}.pkl: has no {', '.join(sorted(missing))}, it is of an earlier version; "
            "make the run again to encode with it"
        )


def _new_particles(config: EncodeConfig, run: checkpoint.Run) -> Inputs:
    """The new particles with the run's grid and mask.  Raises UserError for another box or pixel size."""
    particles = read_particles(config.star, config.input, config.output / "cache" / CTF_PACK)
    if particles.box != run.grid.box or differ(particles.pixel_size, run.grid.pixel_size):
        raise UserError(
            f"{config.star}: box {particles.box} of {particles.pixel_size:g} A where {run.path} was made with "
            f"{run.grid.box} of {run.grid.pixel_size:g} A; extract the new particles as those of the run"
        )
    for note in particles.notes:
        log.info("%s", note)
    if len(particles) < FEW:
        log.warning(
            "%d particle(s) are too few to tell their noise well, so codes are less sure than sigma says; encode them "
            "together with others of the same session", len(particles),
        )  # fmt: skip
    return Inputs(particles, run.grid, run.mask, hash_mask(run.mask))


def noise_in_units_of(model: LinearModel, inputs: Inputs, config: EncodeConfig) -> Noise:
    """Noise model of new particles, their grey values turned to the model's contrast and, where far off, its scale.

    Raises UserError where the particles show nothing of the model, or its negative against a stated contrast.
    """
    particles, grid, options = inputs.particles, inputs.grid, config.input
    noise = estimate_noise(
        particles, grid, inputs.mask,
        contrast=options.contrast, normalisation=options.normalisation, workers=config.workers,
    )  # fmt: skip
    size = grid.working_box
    # wrong poses blur what is fine: the scale is that of the coarse shape
    coarse = model_band(model.mean, size) * (band_frequencies(size).norm(dim=-1) < COARSE * size)
    shape = band_volume(coarse, size, grid.crop)
    power = coarse.abs().square() * band_multiplicity(size)
    overlap = expected = 0.0
    rows = sample_rows(len(particles), SAMPLE).tolist()
    for _, numerator, weight in observe_all(particles, rows, grid, noise, config.workers):
        overlap += float((shape * numerator).sum())
        expected += float((power * weight).sum())
    stated = options.contrast != "auto"
    if (overlap if stated else abs(overlap)) < 3.0 * math.sqrt(expected):  # what noise alone would show
        fix = f"leave out --contrast {options.contrast}, or " if overlap < 0 else ""
        raise UserError(
            f"{config.star}: the particles do not show the molecule of {config.run}; {fix}give particles aligned to "
            "the same consensus map"
        )
    scale = overlap / expected
    if not 1.0 / SCALE < abs(scale) < SCALE:
        log.info("grey values: %.2f times those of the run for the same density; they are rescaled", abs(scale))
    else:
        scale = math.copysign(1.0, scale)
    factor, level = noise.contrast / scale, noise.power / scale**2
    noise = dataclasses.replace(noise, contrast=factor, power=level, contrast_sure=True)
    tell(len(particles), grid, noise)
    return noise


def _in_model(
    run: checkpoint.Run, model: LinearModel, inputs: Inputs, make_rows: RowMaker, folder: Path, device: torch.device
) -> Start:
    """New particles in a held linear model, at poses corrected in rounds if those of the run were.

    folder: of what is kept where the run has bodies, whose motions are then found as well.
    """
    grid, particles, bodies = inputs.grid, inputs.particles, None
    rows: Rows = make_rows(particles)

    def again(_: Fit | None, rows: Rows) -> Fit:
        return judged(model, rows, grid, [])

    found = again(None, rows)
    if run.config["estpose"]:
        everyone = torch.arange(len(rows))
        particles, rows, found = correct_poses(particles, rows, found, make_rows, grid, everyone, again, map_held=True)
    if "bodies" in run.weights:
        bodies, rows = find_in_bodies(run.bodies, rows, found.posterior.gain, grid, folder, device)
        found = again(None, rows)
    brightness = change_over_average(model, found.posterior.code)
    usual = (run.weights["usual"][0], run.weights["usual"][1])
    evidence, centre, spread = found.posterior.evidence, usual[0][EVIDENCE], usual[1][EVIDENCE]
    # below 0 an empty box explains a particle better; at a low signal-to-noise ratio that happens to good ones too
    typical = (evidence >= (centre - 2.0 * spread).clamp(max=0.0)) & (evidence <= centre + OUTLIER_LIMIT * spread)
    typical &= (brightness <= 1.0) & torch.from_numpy(particles.usable)
    mixture = Mixture(**run.weights["mixture"])
    linear = linear_result(found, mixture, rows, grid, typical, brightness, usual)
    linear = linear if bodies is None else with_common(linear, bodies)
    inputs = dataclasses.replace(inputs, particles=particles)
    return Start(inputs, rows, make_rows.noise_model, make_rows.place, linear, bodies)


def _name_unusual(run: checkpoint.Run, linear: LinearResult) -> None:
    """Say which particles are like none of the run's, and whether that is a matter of all of them."""
    centre, spread = (float(values[EVIDENCE]) for values in linear.usual)
    log.info(
        "evidence: median %.1f nats; of the run's particles %.1f with a spread of %.1f",
        float(linear.posterior.evidence.median()), centre, spread,
    )  # fmt: skip
    unusual = ~linear.typical
    if int(unusual.sum()) > MOST_OUTLIERS * len(unusual):
        log.warning(
            "%d of %d particles have an evidence far from that of the run's: are they the same molecule, aligned to "
            "the same consensus map, at a like signal-to-noise ratio?", int(unusual.sum()), len(unusual),
        )  # fmt: skip
    elif unusual.any():
        log.warning(
            "%d particle(s) are like none of the run's (rows %s): likely not the molecule; look at them, and at "
            "outlier_score in linear/particles.csv", int(unusual.sum()), first_rows(unusual),
        )  # fmt: skip


def _write(config: EncodeConfig, run: checkpoint.Run, start: Start, code: Tensor, sigma: Tensor) -> None:
    """The run folder of the new particles: the run's model and settings with what is theirs."""
    values = run.config | checkpoint.flatten(config.input)
    values |= {"box": run.grid.box, "encoded_with": str(run.path.resolve()), "particles": len(code)}
    values |= {"rows": str(start.place.resolve()) if start.place else None, "cache": None, "no_cache": False}
    values |= dict.fromkeys(("poses", "ind", "split", "trained_rows"))
    values["identity"] = fingerprint_of(start.inputs.particles.names)
    for name, path in (("star", config.star), ("output", config.output), ("datadir", config.input.datadir)):
        values[name] = str(path.resolve()) if path else None
    checkpoint.write_config(config.output, values)
    checkpoint.write_map(config.output / "mask.mrc", run.mask, run.grid)
    seed = int(run.config["seed"])
    write_results(config.output / "linear", start.linear, start.rows, run.grid, run.mask, CLUSTERS, seed)
    kept = {name: run.weights[name] for name in ("kind", "epoch", "model", "shape") if name in run.weights}
    weights = kept | stage_state(start.inputs, start.noise, start.linear)
    poses = last_poses(start.inputs, start.linear, bool(run.config["estpose"]), map_held=True)
    conformation = None
    if start.bodies is not None:
        weights["bodies"], conformation = start.bodies.state(), start.bodies.conformation
        write_bodies(config.output / "bodies", start.bodies, run.mask, run.grid)
    checkpoint.save_epoch(config.output, run.epoch, weights, code, sigma, poses, conformation)
