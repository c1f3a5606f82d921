"""What training starts from: device and sizes, particles, split, rows, linear stage, network.

Owns: everything between the options and the first step.  ``train`` reads as one script because this is not in it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opustomo import checkpoint, parallel
from opustomo.bodies import BodyResult
from opustomo.body_rows import straight_rows
from opustomo.body_stage import bodies_of, fit_bodies, with_common, write_bodies
from opustomo.config import TrainConfig
from opustomo.data.batches import wedge_groups
from opustomo.data.bodies import absolute
from opustomo.data.export import fingerprint_of
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.observe import Noise
from opustomo.data.particles import Particles
from opustomo.data.pickles import load_indices, load_split, save_split
from opustomo.data.split import make_split, parted, split_rows
from opustomo.errors import UserError
from opustomo.linear import LinearModel, infer
from opustomo.linear_fit import (
    MAX_COMPONENTS,
    Fit,
    LinearResult,
    Plan,
    change_over_average,
    features,
    fit_linear,
    linear_result,
    usual_range,
)
from opustomo.linear_stage import keep, kept, write_results
from opustomo.mixture import Mixture
from opustomo.model.vae import Vae
from opustomo.physics.fourier import from_band, irfft3, resize_spectrum
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop
from opustomo.preparation import RowMaker, name_damaged
from opustomo.reconstruct import AMPLITUDE_RANGE, Rows
from opustomo.training import memory
from opustomo.training.context import Context, context_of
from opustomo.training.resume import LEARNED, Continuation

log = logging.getLogger("opustomo")

CLUSTERS = 4  # of the linear stage, whose maps are written
NOT_NEGATIVE = (
    "lr", "wd", "beta_control", "prior", "tv", "l1", "lamb", "bfactor", "width", "encoderres", "log_interval",
    "checkpoint_minutes", "keep",
)  # fmt: skip


def choose_device(config: TrainConfig) -> torch.device:
    """The device, with one line about it; fewer GPUs than asked keep the global batch."""
    use, processes = device_of(config.device), parallel.count()
    where = torch.cuda.get_device_name() if use.type == "cuda" else "the CPU"
    if processes > 1:
        where = f"{processes} processes, this one on {where}"
    if config.num_gpus > processes:
        log.info(
            "--num-gpus %d: %d GPU(s) present; training on %s, with the same global batch of %d",
            config.num_gpus, torch.cuda.device_count(), where, global_batch(config),
        )  # fmt: skip
    else:
        log.info("training on %s; a batch has %d particles", where, global_batch(config))
    return use


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names: auto, cpu or cuda.  Raises UserError for a GPU that is not there."""
    present = torch.cuda.device_count()
    if name == "cuda" and present == 0:
        raise UserError("--device cuda: this machine shows no GPU; use --device auto, or look at nvidia-smi")
    return torch.device("cuda" if present and name != "cpu" else "cpu")


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile cannot generate code for ``device``."""
    try:
        torch.compile(_scaled)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"--compile: torch.compile does not work here ({reason}); it needs a C++ compiler with Python's headers on "
            "CPUs and Triton on GPUs: install them, or leave --compile out"
        ) from None
    if device.type == "cpu":
        log.warning("--compile: meant for GPUs; on CPUs a compiled decoder was slower (docs/experiments.md)")


def _scaled(x: Tensor) -> Tensor:
    return 2.0 * x.sin()


def global_batch(config: TrainConfig) -> int:
    """Particles per optimiser step before accumulation: b times the GPUs asked for, on however many it runs."""
    return config.batch * (config.num_gpus if config.multigpu else 1)


def with_sizes(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fill in the sizes that depend on the device; refuse those that cannot work."""
    if config.templateres % 16:
        raise UserError(f"--templateres {config.templateres}: must be a multiple of 16; the nearest is "
                        f"{16 * max(1, round(config.templateres / 16))}")  # fmt: skip
    for name in ("epochs", "batch", "zdim", "zaffinedim", "accum_step", "checkpoint", "num_gpus"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be a number of 0 or more")
    if not 0.0 <= config.valfrac < 1.0:
        raise UserError(f"--valfrac {config.valfrac:g}: must lie in [0, 1)")
    if Path(config.tmp_prefix).name != config.tmp_prefix:
        raise UserError(f"--tmp-prefix {config.tmp_prefix}: is a name, not a path; the files are written into -o")
    fast = device.type == "cuda"
    return dataclasses.replace(
        config,
        width=config.width or (1.0 if fast else 0.25),
        # only --lamb asks for codes other than the linear stage's, which nothing has bettered
        encoderres=config.encoderres or ((12 if fast else 6) if config.lamb > 0 else 0),
    )


def with_memory(
    config: TrainConfig, given: frozenset[str] | None, grid: Grid, particles: int, device: torch.device, fresh: bool
) -> tuple[TrainConfig, bool]:
    """The batch that fits in memory and whether the decoder is to be recomputed, see ``memory.plan``.

    fresh: not a continuation; only there, and only where -b was not typed, the batch may become smaller.  Of several
    processes each needs memory for its share of the batch.
    """
    typed = config.batch != TrainConfig.batch if given is None else "batch" in given
    components = min(MAX_COMPONENTS, config.zdim)
    share = math.ceil(global_batch(config) / parallel.count())  # of a batch, in each process
    several = config.multigpu or parallel.count() > 1  # the batch of the run is not this process's
    fit = memory.plan(
        grid, components, config.width, config.encoderres, share, particles, device,
        adjustable=fresh and not typed and not several,
    )  # fmt: skip
    return config if several else dataclasses.replace(config, batch=fit.batch), fit.recomputed


def select_inputs(config: TrainConfig) -> Inputs:
    """Particles with the poses and the subset that were asked for."""
    inputs = read_inputs(config.star, config.input, config.grid, config.templateres, shared_cache(config), config.poses)
    particles = inputs.particles
    if config.ind is not None:
        particles = particles.subset(load_indices(config.ind, len(particles)))
    for note in particles.notes:
        log.info("%s", note)
    return dataclasses.replace(inputs, particles=particles)


def shared_cache(config: TrainConfig) -> Path | None:
    """Folder of the rows at the poses given; None: no cache."""
    return None if config.no_cache else config.cache or config.output / "cache"


@dataclass(frozen=True)
class Split:
    """Row numbers for training and for validation, and the file that has them."""

    train: Tensor
    held: Tensor
    file: Path


def split_of(config: TrainConfig, names: NDArray[np.object_]) -> Split:
    """Which of the particles ``names`` train; an existing split file is read, otherwise one is made in the run."""
    count = len(names)
    path = config.output / (config.split.name if config.split is not None else "split.pkl")
    if config.split is not None and config.split.is_file():
        order = load_split(config.split, count)
        path = config.split
    elif path.is_file():
        order = load_split(path, count)
    else:
        order = make_split(names, config.seed)
        save_split(path, order)
    log.info("split: %s", path)
    train, held = split_rows(order, config.valfrac, names)
    if shared := parted(names, train, held):
        log.warning(
            "%s parts copies of %d particles: they are trained on and held out; a split that is made here, without "
            "--split, keeps them together", path, shared,
        )  # fmt: skip
    return Split(torch.from_numpy(train), torch.from_numpy(held), path)


@dataclass(frozen=True)
class Start:
    """Inputs at the poses of the rows, the rows, their noise model and folder (None: none), and the linear stage.

    bodies: where they are rigid bodies; ``rows`` and ``linear`` then see them at rest.
    """

    inputs: Inputs
    rows: Rows
    noise: Noise
    place: Path | None
    linear: LinearResult
    bodies: BodyResult | None = None

    @property
    def rotation(self) -> np.ndarray:
        """A (p, 3, 3) of the particles that take part in fits."""
        return self.inputs.particles.rotation[self.linear.typical.numpy()]


def start_from_linear(config: TrainConfig, inputs: Inputs, split: Split, continuation: Continuation | None) -> Start:
    """Particles at their last poses, their rows and the linear stage; from a checkpoint, or fitted."""
    folder, shared = (None, None) if config.no_cache else (config.output / "cache", config.cache)
    # steps read a few rows at a time: a continuation need not wait for all of them
    make_rows = RowMaker(inputs, folder, config.input, config.workers, shared, hold=continuation is None)
    if continuation is None:
        start = _fitted(config, inputs, make_rows, split)
    else:
        start = _continued(config, inputs, make_rows, continuation)
    name_damaged(start.inputs.particles, config.output)
    return start


def _fitted(config: TrainConfig, inputs: Inputs, make_rows: RowMaker, split: Split) -> Start:
    """From the data alone; with --masks the linear stage once more, of bodies at rest."""
    grid, mask, bodies = inputs.grid, inputs.mask, None
    # before the hours that what comes first may take
    asked = None if config.masks is None else bodies_of(config.masks, grid, config.zaffinedim)
    plan = Plan(split.train, split.held, config.estpose, config.seed, limit=min(MAX_COMPONENTS, config.zdim))
    particles, rows, linear = fit_linear(inputs.particles, make_rows, grid, mask, plan)
    if asked is not None:
        bodies, rows, linear = fit_bodies(
            asked, particles, rows, linear, plan, grid, mask, body_files(config), config.zaffinedim,
            device_of(config.device),
        )  # fmt: skip
        write_bodies(config.output / "bodies", bodies, mask, grid)
    results = config.output / "linear"
    write_results(results, linear, rows, grid, mask, CLUSTERS, config.seed)
    keep(results, linear, rows, make_rows.noise_model)
    inputs = dataclasses.replace(inputs, particles=particles)
    return Start(inputs, rows, make_rows.noise_model, make_rows.place, linear, bodies)


def _continued(config: TrainConfig, inputs: Inputs, make_rows: RowMaker, continuation: Continuation) -> Start:
    """From a checkpoint; what it does not hold of every particle is read from beside it, or made again."""
    stored, grid, bodies = continuation.weights, inputs.grid, None
    particles = inputs.particles if continuation.new_poses else _with_stored_poses(inputs.particles, stored)
    if tuple(stored["grid"]) == tuple(grid):
        make_rows.noise = Noise(**stored["noise"])
    rows: Rows = make_rows(particles)
    model, mixture = stored_linear(stored, grid, inputs.mask), Mixture(**stored["mixture"])
    if "bodies" in stored:
        bodies = BodyResult.of(stored["bodies"])
        rows = straight_rows(body_files(config), bodies, rows, grid, device_of(config.device))
    results, typical = config.output / "linear", stored["typical"]
    known = kept(results, model, stored["gain"], mixture, rows, make_rows.noise_model)
    posterior = known[0] if known else infer(model, rows, torch.arange(len(rows)), grid, stored["gain"])
    brightness = change_over_average(model, posterior.code)
    usual = (stored["usual"][0], stored["usual"][1]) if continuation.optimiser else None
    if known:
        _, about, codes, error = known
        usual = usual or usual_range(features(posterior, brightness))
        linear = LinearResult(model, posterior, about, mixture, error, [], typical, brightness, usual, codes)
    else:
        linear = linear_result(Fit(model, posterior, []), mixture, rows, grid, typical, brightness, usual)
        linear = linear if bodies is None else with_common(linear, bodies)
        keep(results, linear, rows, make_rows.noise_model)
    inputs = dataclasses.replace(inputs, particles=particles)
    return Start(inputs, rows, make_rows.noise_model, make_rows.place, linear, bodies)


def body_files(config: TrainConfig) -> Path | None:
    """Folder of what the stage of bodies keeps; None with --no-cache."""
    return None if config.no_cache else config.output / "bodies"


def _with_stored_poses(particles: Particles, stored: dict[str, Any]) -> Particles:
    count = len(stored["euler"])
    if count != len(particles):
        raise UserError(
            f"{particles.source}: {len(particles)} particles where the checkpoint has {count}; "
            "give the STAR file (and --ind) of that run"
        )
    return dataclasses.replace(particles, **{k: stored[k].numpy() for k in ("rotation", "origin", "euler")})


def stored_linear(weights: dict[str, Any], grid: Grid, mask: Tensor) -> LinearModel:
    """The linear model of a checkpoint on this run's grid (its volumes are resampled if the grid has changed)."""
    state, old = weights["linear"], Grid(*weights["grid"])
    volumes = torch.cat([state["mean"][None], state["amplitude"], state["components"]])
    if tuple(old[:4]) != tuple(grid[:4]):
        band = model_band(volumes, old.working_box)
        wide = from_band(band, old.working_box)
        resized = resize_spectrum(wide, grid.working_box) * (grid.working_box / old.working_box) ** 1.5
        volumes = centre_crop(irfft3(resized), grid.crop)
        volumes[1:3] = volumes[1:3].clamp(*(square**0.5 for square in AMPLITUDE_RANGE))
    mean, components = volumes[0] * (mask > 0), volumes[3:] * (mask > 0)  # the mask may have shrunk
    power = torch.ones(grid.working_box // 2 + 1)
    scale = (state["pose_scale"][0], state["pose_scale"][1] * grid.working_box / old.working_box)
    return LinearModel(mean, components, power, power, scale, volumes[1:3])


def build(
    config: TrainConfig, start: Start, continuation: Continuation | None, device: torch.device
) -> tuple[Vae, Context]:
    """The network, started at the linear stage or at a checkpoint, and what its steps need."""
    grid, model = start.inputs.grid, start.linear.model
    network = Vae(
        start.inputs.mask, model.mean, model.components, start.inputs.mask * model.places[1],
        templateres=grid.templateres, width=config.width, encoderres=config.encoderres,
    )  # fmt: skip
    if continuation is not None:
        learned = {k: v for k, v in continuation.weights["model"].items() if k.split(".")[0] in LEARNED}
        network.load_state_dict(learned, strict=False)
    group = _orientation_groups(config, start.inputs.particles.rotation)
    return network.to(device), context_of(start.inputs, start.rows, start.linear, group, device)


def _orientation_groups(config: TrainConfig, rotation: np.ndarray) -> np.ndarray:
    """Wedge orientation of each particle (P,) for --lamb; one group without it."""
    if config.lamb == 0:
        return np.zeros(len(rotation), np.int64)
    group = wedge_groups(rotation, global_batch(config))
    if not group.any():
        log.warning(
            "--lamb %g has no effect: %d particles in batches of %d are too few for groups of one wedge orientation; "
            "a smaller -b makes groups possible", config.lamb, len(rotation), global_batch(config),
        )  # fmt: skip
    return group


def save_config(
    config: TrainConfig, kind: checkpoint.Kind, inputs: Inputs, rows: Path | None, split: Split | None
) -> None:
    """config.yaml and config.pkl: the options as typed, the sizes that followed, who trains and where the rows are."""
    values = {"kind": kind, **checkpoint.flatten(config), **inputs.grid._asdict()}
    values["rows"] = str(rows.resolve()) if rows else None
    values["identity"] = fingerprint_of(inputs.particles.names)
    for name in ("output", "star", "mask", "datadir", "poses", "ind", "cache"):
        values[name] = str(Path(values[name]).resolve()) if values[name] else None
    values["split"] = None
    if split is not None:
        values |= {"split": str(split.file.resolve()), "trained_rows": len(split.train)}
    values["masks"] = absolute(config.masks) if config.masks else None
    values |= {"particles": len(inputs.particles), "load": None, "latents": None}
    checkpoint.write_config(config.output, values)
