"""``train --encode-mode fixed``: one map of all particles, no codes and no network.

Owns: the run folder of kind ``map``.  Poses are corrected in the rounds of the linear stage without components.  Each
half of the particles has a map of its own, which alone corrects its poses, so that their FSC is an honest one.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo import checkpoint
from opustomo.average import half_maps, half_sets, half_totals, write_maps
from opustomo.config import TrainConfig
from opustomo.data.inputs import Inputs
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import Noise
from opustomo.data.particles import Particles
from opustomo.data.poses import move_poses
from opustomo.errors import UserError
from opustomo.linear_fit import Plan, pose_error, settle
from opustomo.monitor import setup_log
from opustomo.physics.volume import centre_crop, centre_pad
from opustomo.preparation import RowMaker, name_damaged, prepare_process, tell
from opustomo.training.resume import spelt_option, typed_options
from opustomo.training.start import save_config, select_inputs

log = logging.getLogger("opustomo")

USED = frozenset(
    {
        "star", "output", "datadir", "angpix", "box", "relion31", "contrast", "normalisation", "format", "damaged",
        "tilt_limit", "mask", "downfrac", "poses", "ind", "encode_mode", "estpose", "no_cache", "workers", "verbose",
    }
)  # fmt: skip


def main(config: TrainConfig, given: frozenset[str] | None) -> int:
    """``opustomo train --encode-mode fixed``.  given: names of the options that were typed (None: not known)."""
    _refuse(config)
    setup_log(config.output, config.verbose)
    idle = [spelt_option(k, v) for k, v in typed_options(config, given).items() if k not in USED]
    if idle:
        log.warning("no effect with --encode-mode fixed, which has no network: %s", ", ".join(idle))
    prepare_process(config.workers)
    inputs = select_inputs(config)
    particles, size = inputs.particles, inputs.grid.working_box
    noise = estimate_noise(
        particles, inputs.grid, inputs.mask,
        contrast=config.input.contrast, normalisation=config.input.normalisation, workers=config.workers,
    )  # fmt: skip
    tell(len(particles), inputs.grid, noise)
    half = half_sets(particles)
    particles, typical = _corrected(config, inputs, noise, half) if config.estpose else (particles, np.ones(len(half)))
    name_damaged(particles, config.output)
    whole = inputs.grid._replace(crop=size)
    share = torch.from_numpy(typical).float()[None]
    [numerator], [weight] = half_totals(particles, whole, noise, share, half, config.workers)
    mask = centre_pad(inputs.mask, size)
    halves, full, fsc = half_maps(numerator, weight, size, mask)
    write_maps(config.output, halves, full, fsc, mask, whole, int(typical.sum()))
    mean = centre_crop(full, inputs.grid.crop) * inputs.mask
    state = {"mask": inputs.mask, "mean": mean, "components": mean.new_zeros((0, *mean.shape))}
    _write_run(config, dataclasses.replace(inputs, particles=particles), noise, state, typical)
    select = _select_line(config) if config.estpose else ""
    log.info("next: opustomo report %s%s", shlex.quote(str(config.output)), select)
    return 0


def _refuse(config: TrainConfig) -> None:
    if config.load is not None:
        raise UserError(
            f"--load {config.load}: --encode-mode fixed takes minutes and has nothing to continue; leave --load out"
        )
    if config.masks is not None:
        raise UserError(
            f"--masks {config.masks}: --encode-mode fixed makes one map without motions; leave one of them out"
        )
    if checkpoint.epochs_of(config.output):
        raise UserError(f"-o {config.output}: holds a run already; choose another folder")


def _corrected(
    config: TrainConfig, inputs: Inputs, noise: Noise, half: NDArray[np.int64]
) -> tuple[Particles, NDArray[np.float64]]:
    """Particles at their last poses, every half's from its own map, and 1 for those that take part, else 0, (P,)."""
    grid, mask, particles = inputs.grid, inputs.mask, inputs.particles
    rotation, origin, euler = (np.array(a) for a in (particles.rotation, particles.origin, particles.euler))
    typical = np.ones(len(particles))
    for h in (0, 1):
        members = np.flatnonzero(half == h)
        own = particles.subset(members)
        log.info("half %d: %d particles", h + 1, len(own))
        folder = None if config.no_cache else config.output / "cache" / f"half{h + 1}"
        make_rows = RowMaker(
            dataclasses.replace(inputs, particles=own), folder, config.input, config.workers, noise=noise
        )
        plan = Plan(torch.arange(len(own)), torch.arange(0), estpose=True, seed=config.seed, limit=0)
        settled = settle(own, make_rows, grid, mask, plan)
        found = settled.fit
        left = pose_error(found.model, settled.rows, grid, found.posterior.code, found.posterior.gain)
        last = move_poses(settled.particles, left, grid)
        rotation[members], origin[members], euler[members] = last.rotation, last.origin, last.euler
        typical[members] = settled.typical.numpy()
    return dataclasses.replace(particles, rotation=rotation, origin=origin, euler=euler), typical


def _write_run(
    config: TrainConfig, inputs: Inputs, noise: Noise, state: dict[str, Any], typical: NDArray[np.float64]
) -> None:
    """config.yaml, mask.mrc, and weights, codes without columns and poses of epoch 0."""
    particles, grid = inputs.particles, inputs.grid
    # sizes of a network that is not there
    config = dataclasses.replace(config, zdim=0, width=0.0, encoderres=0, bfactor=0.0, epochs=1)
    save_config(config, "map", inputs, None, None)
    checkpoint.write_map(config.output / "mask.mrc", inputs.mask, grid)
    weights = {"kind": "map", "epoch": 0, "model": state, "grid": list(grid), "noise": dataclasses.asdict(noise)}
    weights["typical"] = torch.from_numpy(typical > 0)
    codes = torch.zeros(len(particles), 0)
    poses = (particles.rotation, particles.origin / grid.box, particles.euler)
    checkpoint.save_epoch(config.output, 0, weights, codes, codes, poses)


def _select_line(config: TrainConfig) -> str:
    star, run, out = (shlex.quote(str(path)) for path in (config.star, config.output, config.output / "corrected"))
    return f" ; opustomo select {star} --run {run} -o {out} --corrected"
