"""Training: read this file from top to bottom.

Owns: the run from a STAR file to checkpoints.  Data -> cache -> average -> linear stage -> network -> codes of every
particle.  ``train_step`` is one step; ``evaluate`` is the held-out evidence lower bound that has to beat the linear
stage's.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opustomo import checkpoint
from opustomo.analysis import plots
from opustomo.compat.legacy_files import load_indices, load_poses, load_split, save_split
from opustomo.config import TrainConfig
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.readers import with_poses
from opustomo.errors import UserError
from opustomo.linear import LinearModel, infer, pose_modes
from opustomo.linear_stage import LinearResult, corrected_poses, fit_linear, write_results
from opustomo.model.vae import Vae
from opustomo.monitor import Metrics, peak_memory_gb, progress, setup_log
from opustomo.objective import (
    beta_weight,
    disentanglement,
    envelope,
    evidence,
    kl_divergence,
    learning_rate,
    pose_nuisance,
    residual_density,
)
from opustomo.physics.fourier import band_shell, from_band, irfft3, radial, resize_spectrum
from opustomo.physics.grid import Grid
from opustomo.physics.healpix import vector_to_pixel
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop
from opustomo.preparation import make_split, rows_of, set_threads
from opustomo.reconstruct import Rows
from opustomo.resume import Continuation, resolve

log = logging.getLogger("opustomo")

EVALUATION_SAMPLES = 4
BANK_CLASSES_SAMPLE = 12_800
CLIP = 10.0  # gradient norm, in nats per unit of weight


@dataclass(frozen=True)
class Context:
    """Everything a step needs besides the network: data, linear posterior and constants; on the device."""

    rows: Rows
    grid: Grid
    mean: Tensor  # (P, zdim) of the linear posterior
    factor: Tensor  # (P, zdim, zdim), lower
    gain: Tensor  # (P,)
    precision: Tensor  # (n,) of the encoder's Wiener filter
    group: np.ndarray  # (P,) wedge orientation
    device: torch.device
    autocast: bool


# ------------------------------------------------------------------------------------------------ the run


def main(config: TrainConfig, given: frozenset[str] | None = None) -> int:
    """``opustomo train``.  given: names of the options that were typed (for --load)."""
    config, continuation = resolve(config, given)
    _refuse_foreign_output(config, continuation)
    setup_log(config.output, config.verbose)
    started = time.time()
    set_threads(config.workers)
    torch.manual_seed(config.seed)
    device = choose_device(config)
    config = with_sizes(config, device)
    inputs = select_inputs(config)
    train, held, split_file = split_of(config, len(inputs.particles))
    inputs, rows, linear = start_from_linear(config, inputs, train, held, continuation)
    model, context = build(config, inputs, rows, linear, continuation, device)
    save_config(config, inputs, split_file)
    checkpoint.write_map(config.output / "mask.mrc", inputs.mask, inputs.grid)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.wd, fused=device.type == "cuda")
    bank = linear.posterior.code.new_zeros(len(rows), config.zdim)
    bank[:, : linear.model.size] = linear.posterior.code
    first = 0
    if continuation is not None:
        first = continuation.first_epoch
        if continuation.exact:
            optimizer.load_state_dict(continuation.weights["optimizer"])
            bank = continuation.weights["bank"]
    bank = bank.to(device)
    log.info("%.1f million parameters; the data are ready after %.0f s", _millions(model), time.time() - started)
    metrics = Metrics(config.output / "metrics.csv", first)
    bound = float(linear.posterior.evidence[held if len(held) else train].mean())
    for epoch in range(first, config.epochs):
        train_epoch(config, model, context, optimizer, train, bank, epoch, metrics)
        scores = evaluate(model, context, held if len(held) else train, config.bfactor, epoch)
        metrics.append(epoch=epoch, particles=(epoch + 1) * len(train), linear_val_elbo=bound, **scores)
        log.info(
            "epoch %d: held-out bound %.2f nats per particle, linear stage %.2f (%+.2f)",
            epoch, scores["val_elbo"], bound, scores["val_elbo"] - bound,
        )  # fmt: skip
        if (epoch + 1) % config.checkpoint == 0 or epoch + 1 == config.epochs:
            save(config, inputs, model, context, optimizer, bank, linear.model, epoch)
        preview(config, model, context, train, epoch)
    write_verdict(config.output, scores["val_elbo"], bound)
    log.info("finished in %.0f s, peak memory %.1f GB; next: opustomo analyze %s ; opustomo report %s",
             time.time() - started, peak_memory_gb(), config.output, config.output)  # fmt: skip
    return 0


def _refuse_foreign_output(config: TrainConfig, continuation: Continuation | None) -> None:
    """A finished run is never overwritten by a new one."""
    if continuation is None and checkpoint.epochs_of(config.output):
        raise UserError(
            f"-o {config.output}: holds a run already; continue it with --load latest, or choose another folder"
        )


def choose_device(config: TrainConfig) -> torch.device:
    """The device, with one line about it; fewer GPUs than asked keep the global batch."""
    present = torch.cuda.device_count()
    if config.device == "cuda" and present == 0:
        raise UserError("--device cuda: this machine shows no GPU; use --device auto, or look at nvidia-smi")
    use = torch.device("cuda" if present and config.device != "cpu" else "cpu")
    if config.num_gpus > 1:
        log.info(
            "--num-gpus %d: %d GPU(s) present, training in one process on %s with the same global batch of %d",
            config.num_gpus, present, use.type, global_batch(config),
        )  # fmt: skip
    else:
        log.info("training on %s", torch.cuda.get_device_name(0) if use.type == "cuda" else "the CPU")
    return use


def global_batch(config: TrainConfig) -> int:
    """Particles per optimiser step before accumulation: b times the GPUs asked for."""
    return config.batch * (config.num_gpus if config.multigpu else 1)


def with_sizes(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fill in the sizes that depend on the device; refuse those that cannot work."""
    if config.templateres % 16:
        raise UserError(f"--templateres {config.templateres}: must be a multiple of 16; the nearest is "
                        f"{16 * max(1, round(config.templateres / 16))}")  # fmt: skip
    for name in ("epochs", "batch", "zdim", "accum_step", "checkpoint", "num_gpus"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if not 0.0 <= config.valfrac < 1.0:
        raise UserError(f"--valfrac {config.valfrac:g}: must lie in [0, 1)")
    fast = device.type == "cuda"
    return dataclasses.replace(
        config,
        width=config.width or (1.0 if fast else 0.25),
        encoderres=config.encoderres or (12 if fast else 6),
    )


def select_inputs(config: TrainConfig) -> Inputs:
    """Particles with the poses and the subset that were asked for."""
    inputs = read_inputs(config.star, config.input, config.grid, config.templateres)
    particles = inputs.particles
    if config.poses is not None:
        particles = with_poses(particles, *load_poses(config.poses))
    if config.ind is not None:
        particles = particles.subset(load_indices(config.ind, len(particles)))
    for note in particles.notes:
        log.info("%s", note)
    return dataclasses.replace(inputs, particles=particles)


def split_of(config: TrainConfig, count: int) -> tuple[Tensor, Tensor, Path]:
    """Rows for training and for validation; an existing split file is read, otherwise one is made in the run."""
    path = config.output / (config.split.name if config.split is not None else "split.pkl")
    if config.split is not None and config.split.is_file():
        order = load_split(config.split, count)
        path = config.split
    elif path.is_file():
        order = load_split(path, count)
    else:
        order = make_split(count, config.seed)
        save_split(path, order)
    log.info("split: %s", path)
    train, held = checkpoint.split_rows(order, config.valfrac)
    return torch.from_numpy(train), torch.from_numpy(held), path


# ------------------------------------------------------------------------------------------------ linear start


def start_from_linear(
    config: TrainConfig, inputs: Inputs, train: Tensor, held: Tensor, continuation: Continuation | None
) -> tuple[Inputs, Rows, LinearResult]:
    """Rows and the linear stage; with --estpose the poses are corrected by it once and the rows made again."""
    folder = None if config.no_cache else (config.cache or config.output / "cache")
    if continuation is not None:
        inputs = _with_stored_poses(inputs, continuation)
        rows = rows_of(inputs, folder, config.input, config.workers)
        model = _stored_linear(continuation, inputs.grid, config.bfactor)
        posterior = infer(model, rows, torch.arange(len(rows)), inputs.grid, continuation.weights["gain"])
        return inputs, rows, LinearResult(model, posterior, [])
    rows = rows_of(inputs, folder, config.input, config.workers)
    linear = fit_linear(rows, train, held, inputs.grid, inputs.mask, 0, 12, config.seed)
    if linear.model.size > config.zdim:
        linear = fit_linear(rows, train, held, inputs.grid, inputs.mask, config.zdim, 12, config.seed)
    if config.estpose:
        rotation, origin, euler = corrected_poses(inputs.particles, linear, inputs.grid)
        moved = with_poses(inputs.particles, rotation, origin / inputs.grid.box, euler)
        inputs = dataclasses.replace(inputs, particles=moved)
        log.info("--estpose: poses corrected by the linear stage; numerators and weights are made again")
        rows = rows_of(inputs, folder, config.input, config.workers)
        linear = fit_linear(rows, train, held, inputs.grid, inputs.mask, linear.model.size, 12, config.seed)
    write_results(config.output / "linear", linear, rows, inputs.grid, inputs.mask, 4, config.seed)
    return inputs, rows, linear


def _with_stored_poses(inputs: Inputs, continuation: Continuation) -> Inputs:
    poses = [continuation.weights[k].numpy() for k in ("rotation", "origin", "euler")]
    if len(poses[0]) != len(inputs.particles):
        raise UserError(
            f"{inputs.particles.source}: {len(inputs.particles)} particles where the checkpoint has {len(poses[0])}; "
            "give the STAR file (and --ind) of that run"
        )
    return dataclasses.replace(inputs, particles=with_poses(inputs.particles, *poses))


def _stored_linear(continuation: Continuation, grid: Grid, bfactor: float) -> LinearModel:
    """The linear model of a checkpoint on this run's grid (its volumes are resampled if the grid has changed)."""
    state, old = continuation.weights["linear"], Grid(*continuation.weights["grid"])
    volumes = torch.cat([state["mean"][None], state["components"]])
    if tuple(old[:4]) != tuple(grid[:4]):
        band = model_band(volumes, old.working_box)
        wide = from_band(band, old.working_box)
        resized = resize_spectrum(wide, grid.working_box) * (grid.working_box / old.working_box) ** 1.5
        volumes = centre_crop(irfft3(resized), grid.crop)
    power = torch.ones(grid.working_box // 2 + 1)
    scale = (state["pose_scale"][0], state["pose_scale"][1] * grid.working_box / old.working_box)
    return LinearModel(volumes[0], volumes[1:], power, power, scale)


def build(
    config: TrainConfig,
    inputs: Inputs,
    rows: Rows,
    linear: LinearResult,
    continuation: Continuation | None,
    device: torch.device,
) -> tuple[Vae, Context]:
    """The network, started at the linear stage or at a checkpoint, and what its steps need."""
    grid, model, post = inputs.grid, linear.model, linear.posterior
    extra = config.zdim - model.size
    components = torch.cat([model.components, model.mean.new_zeros((extra, *model.mean.shape))])
    modes = pose_modes(model.mean, model.pose_scale, grid)
    network = Vae(
        inputs.mask, model.mean, components, modes,
        templateres=grid.templateres, width=config.width, encoderres=config.encoderres,
    )  # fmt: skip
    if continuation is not None:
        learned = {
            k: v for k, v in continuation.weights["model"].items() if k.startswith(("encoder.", "decoder.", "scale"))
        }
        network.load_state_dict(learned, strict=False)
    # unused dimensions keep their prior
    mean = torch.cat([post.code, post.code.new_zeros(len(post.code), extra)], 1)
    factor = torch.diag_embed(torch.ones_like(mean))
    factor[:, : model.size, : model.size] = torch.linalg.cholesky(post.code_covariance)
    shells = band_shell(grid.working_box)
    power = model_band(model.components if model.size else model.mean[None], grid.working_box).abs().square().sum(0)
    count = torch.zeros(grid.working_box // 2 + 1).index_add(0, shells, torch.ones_like(power))
    curve = torch.zeros_like(count).index_add(0, shells, power) / count.clamp(min=1)
    curve[0] = curve[1]
    share = float(inputs.mask.square().sum()) / grid.working_box**3
    precision = share / radial(curve.clamp(min=1e-3 * float(curve.max())), grid.working_box)
    context = Context(
        rows=rows,
        grid=grid,
        mean=mean.to(device),
        factor=factor.to(device),
        gain=post.gain.to(device),
        precision=precision.to(device),
        group=wedge_groups(inputs.particles.rotation, global_batch(config))
        if config.lamb > 0
        else np.zeros(len(mean), int),
        device=device,
        autocast=device.type == "cuda" and torch.cuda.is_bf16_supported(),
    )
    return network.to(device), context


# ------------------------------------------------------------------------------------------------ batches


def wedge_groups(rotation: np.ndarray, batch: int) -> np.ndarray:
    """Group of each particle by the orientation of its beam axis ``A^T z`` up to sign (HEALPix), (P,).

    The finest of nside 1, 2, 4, 8 that leaves at least four batches a group on average.
    """
    axis = torch.from_numpy(rotation[:, 2, :])
    axis = torch.where(axis[:, 2:] < 0, -axis, axis)
    best = np.zeros(len(rotation), np.int64)
    for nside in (1, 2, 4, 8):
        pixel = vector_to_pixel(axis, nside).numpy()
        if len(rotation) / len(np.unique(pixel)) < 4 * batch:
            break
        best = np.unique(pixel, return_inverse=True)[1]
    return best


def batch_order(index: Tensor, group: np.ndarray, batch: int, seed: int, epoch: int) -> list[Tensor]:
    """Batches of one epoch: every particle once, each batch from one group, remainders pooled.

    A pure function of (seed, epoch): a resumed run draws the same batches.
    """
    generator = np.random.default_rng((seed, epoch))
    full, rest = [], []
    for g in np.unique(group[index.numpy()]):
        members = generator.permutation(index.numpy()[group[index.numpy()] == g])
        cut = len(members) // batch * batch
        full += np.split(members[:cut], cut // batch) if cut else []
        rest.append(members[cut:])
    pooled = generator.permutation(np.concatenate(rest))
    full += [pooled[i : i + batch] for i in range(0, len(pooled), batch)]
    return [torch.from_numpy(full[i]) for i in generator.permutation(len(full))]


def read_batch(context: Context, index: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators and weights of a batch with the particles' gains applied, on the device."""
    gain = context.gain[index.to(context.device)]
    numerator = context.rows.numerator(index).to(context.device, non_blocking=True) * gain[:, None, None, None]
    weight = context.rows.weight(index).to(context.device, non_blocking=True) * gain[:, None].square()
    return numerator, weight


# ------------------------------------------------------------------------------------------------ one step


def posterior(model: Vae, context: Context, index: Tensor, numerator: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (b, zdim) and factor (b, zdim, zdim) of the codes of a batch."""
    density = residual_density(numerator, weight, model.mean, context.precision, model.mask, context.grid.working_box)
    where = index.to(context.device)
    with torch.autocast(context.device.type, torch.bfloat16, enabled=context.autocast):
        mean, factor = model.encode(density, context.mean[where], context.factor[where])
    return mean.float(), factor.float()


def log_evidence(
    model: Vae, context: Context, code: Tensor, numerator: Tensor, weight: Tensor, damping: Tensor | None
) -> Tensor:
    """``log p(data | V(z)) - log p(data | 0)`` with pose errors integrated out, (b,)."""
    size = context.grid.working_box
    with torch.autocast(context.device.type, torch.bfloat16, enabled=context.autocast):
        nonlinear = model.nonlinear(code)
    nonlinear = nonlinear.float()
    if damping is not None:
        damped = from_band(model_band(nonlinear, size) * damping, size)
        nonlinear = centre_crop(irfft3(damped), context.grid.crop)
    volume = model.linear(code) + nonlinear
    nuisance = pose_nuisance(model.pose_modes, numerator, weight, size)
    return evidence(volume, model_band(volume, size), numerator, weight, nuisance, size)[0]


def train_step(
    model: Vae, context: Context, index: Tensor, beta: float, damping: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sample of the negative evidence lower bound: loss, nll and KL (b,) in nats, and the codes' means."""
    numerator, weight = read_batch(context, index)
    mean, factor = posterior(model, context, index, numerator, weight)
    noise = torch.randn(mean.shape, generator=generator).to(context.device)
    code = mean + (factor @ noise[..., None])[..., 0]
    nll = -log_evidence(model, context, code, numerator, weight, damping)
    kl = kl_divergence(mean, factor)
    return nll + beta * kl, nll, kl, mean


def train_epoch(
    config: TrainConfig,
    model: Vae,
    context: Context,
    optimizer: torch.optim.Optimizer,
    train: Tensor,
    bank: Tensor,
    epoch: int,
    metrics: Metrics,
) -> None:
    """One pass over the training particles; a line of metrics at every log interval and at the end."""
    model.train()
    generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    damping = damping_of(config.bfactor, epoch, context)
    batches = batch_order(train, context.group, global_batch(config), config.seed, epoch)
    lot = config.accum_step
    window = Window(metrics, epoch, epoch * len(train))
    pending = 0
    for step, index in enumerate(progress(batches, len(train), f"epoch {epoch}", size=len)):
        done = (epoch + step / len(batches)) / config.epochs
        beta = beta_weight(config.beta, done) * config.beta_control
        rate = learning_rate(config.lr, done)
        loss, nll, kl, code = train_step(model, context, index, beta, damping, generator)
        objective = loss.mean()
        if config.lamb > 0:
            objective = (
                objective + config.lamb * disentanglement(code, bank_sample(bank, context, index, generator)).mean()
            )
        if not torch.isfinite(objective):
            raise UserError(_not_finite(loss, index, epoch))
        (objective / lot).backward()
        bank[index.to(context.device)] = code.detach()
        pending += 1
        if pending == lot or step + 1 == len(batches):
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending = 0
        window.add(len(index), float(objective.detach()), float(nll.mean().detach()), float(kl.mean().detach()))
        if config.log_interval and window.count >= config.log_interval:
            window.write(beta, rate)
            if config.plot:
                preview(config, model, context, index, epoch)
                model.train()
    if window.count:
        window.write(beta, rate)


def _not_finite(loss: Tensor, index: Tensor, epoch: int) -> str:
    bad = index[~torch.isfinite(loss.detach()).cpu()]
    rows = ", ".join(str(int(i) + 1) for i in (bad if len(bad) else index))
    return (
        f"epoch {epoch}: the loss is not finite for particle row(s) {rows}; continue from the last checkpoint with a "
        "lower --lr, and look at these subtomograms with `opustomo check`"
    )


def bank_sample(bank: Tensor, context: Context, index: Tensor, generator: torch.Generator) -> Tensor:
    """Codes of other wedge orientations than the batch's, at most 12,800, drawn at random."""
    own = np.unique(context.group[index.numpy()])
    others = torch.from_numpy(np.flatnonzero(~np.isin(context.group, own)))
    if len(others) > BANK_CLASSES_SAMPLE:
        others = others[torch.randperm(len(others), generator=generator)[:BANK_CLASSES_SAMPLE]]
    return bank[others.to(context.device)]


def damping_of(bfactor: float, epoch: int, context: Context) -> Tensor | None:
    """Envelope of --bfactor on the band, or None when there is none."""
    if bfactor <= 0:
        return None
    return envelope(bfactor, epoch, context.grid.working_box, context.grid.extent, context.device)


class Window:
    """Running means between two lines of metrics.csv."""

    def __init__(self, metrics: Metrics, epoch: int, before: int) -> None:
        self.metrics, self.epoch, self.seen = metrics, epoch, before
        self._clear()

    def _clear(self) -> None:
        self.count, self.sums, self.started = 0, np.zeros(3), time.time()

    def add(self, count: int, *values: float) -> None:
        """Means over ``count`` particles: loss, nll, kl."""
        self.count += count
        self.sums += count * np.array(values)

    def write(self, beta: float, rate: float) -> None:
        """A line of metrics; starts a new window."""
        self.seen += self.count
        loss, nll, kl = self.sums / self.count
        seconds = time.time() - self.started
        self.metrics.append(
            epoch=self.epoch, particles=self.seen, loss=loss, nll=nll, kl=kl, beta=beta, lr=rate, seconds=seconds,
            particles_per_second=self.count / max(seconds, 1e-9),
        )  # fmt: skip
        self._clear()


# ------------------------------------------------------------------------------------------------ after an epoch


@torch.no_grad()
def evaluate(model: Vae, context: Context, index: Tensor, bfactor: float, epoch: int) -> dict[str, float]:
    """Evidence lower bound of held-out particles, means per particle in nats (four samples, fixed noise)."""
    model.eval()
    damping = damping_of(bfactor, epoch, context)
    generator = torch.Generator().manual_seed(0)
    nll_sum = kl_sum = 0.0
    for part in index.split(16):
        numerator, weight = read_batch(context, part)
        mean, factor = posterior(model, context, part, numerator, weight)
        kl_sum += float(kl_divergence(mean, factor).sum())
        for _ in range(EVALUATION_SAMPLES):
            noise = torch.randn(mean.shape, generator=generator).to(context.device)
            code = mean + (factor @ noise[..., None])[..., 0]
            fit = log_evidence(model, context, code, numerator, weight, damping)
            nll_sum -= float(fit.sum()) / EVALUATION_SAMPLES
    nll, kl = nll_sum / len(index), kl_sum / len(index)
    return {"val_nll": nll, "val_kl": kl, "val_elbo": -nll - kl}


@torch.no_grad()
def encode_all(model: Vae, context: Context) -> tuple[Tensor, Tensor]:
    """Codes and their standard deviations of every particle, (P, zdim) each."""
    model.eval()
    means, sigmas = [], []
    for part in torch.arange(len(context.mean)).split(32):
        mean, factor = posterior(model, context, part, *read_batch(context, part))
        means.append(mean.cpu())
        sigmas.append(factor.square().sum(-1).sqrt().cpu())
    return torch.cat(means), torch.cat(sigmas)


def save(
    config: TrainConfig,
    inputs: Inputs,
    model: Vae,
    context: Context,
    optimizer: torch.optim.Optimizer,
    bank: Tensor,
    linear: LinearModel,
    epoch: int,
) -> None:
    """Checkpoint of an epoch: weights and everything needed to go on, codes of every particle, poses."""
    particles, grid = inputs.particles, context.grid
    code, sigma = encode_all(model, context)
    poses = (particles.rotation, particles.origin / grid.box, particles.euler)
    weights: dict[str, Any] = {
        "kind": "network",
        "epoch": epoch,
        "model": {k: v.cpu() for k, v in model.state_dict().items()},
        "shape": {"templateres": grid.templateres, "width": config.width, "encoderres": config.encoderres},
        "optimizer": optimizer.state_dict(),
        "bank": bank.cpu(),
        "gain": context.gain.cpu(),
        "grid": list(grid),
        "linear": {"mean": linear.mean, "components": linear.components, "pose_scale": list(linear.pose_scale)},
        **{
            k: torch.from_numpy(np.ascontiguousarray(v))
            for k, v in zip(("rotation", "origin", "euler"), poses, strict=True)
        },
    }
    checkpoint.save_epoch(config.output, epoch, weights, code, sigma, poses)


def save_config(config: TrainConfig, inputs: Inputs, split_file: Path) -> None:
    """config.yaml and config.pkl: the options as typed and the sizes that followed."""
    values = {"kind": "network", **checkpoint.flatten(config), **inputs.grid._asdict()}
    for name in ("star", "mask", "datadir", "poses", "ind", "cache"):
        values[name] = str(Path(values[name]).resolve()) if values[name] else None
    values |= {"split": str(split_file.resolve()), "particles": len(inputs.particles), "load": None, "latents": None}
    checkpoint.write_config(config.output, values)


@torch.no_grad()
def preview(config: TrainConfig, model: Vae, context: Context, index: Tensor, epoch: int) -> None:
    """``<tmp-prefix>.mrc``, the volume of one particle, and ``<tmp-prefix>.png``: rows of projections.

    Each row: the subtomogram's numerator, the reconstruction seen through its weight, the masked numerator.
    """
    model.eval()
    shown = index[: min(4, len(index))]
    numerator, weight = read_batch(context, shown)
    mean, _ = posterior(model, context, shown, numerator, weight)
    volume = model.linear(mean) + model.nonlinear(mean)
    size = context.grid.working_box
    seen = centre_crop(irfft3(from_band(model_band(volume, size) * weight, size)), context.grid.crop)
    checkpoint.write_map(config.output / f"{config.tmp_prefix}.mrc", volume[0].cpu(), context.grid)
    pictures = torch.stack([numerator, seen, numerator * model.mask], 1).sum(-3).cpu().numpy()
    titles = ("subtomogram", "reconstruction through its CTF", "masked subtomogram")
    plots.save(plots.picture_rows(pictures, titles), config.output / f"{config.tmp_prefix}.png")


def write_verdict(folder: Path, bound: float, linear: float) -> None:
    """Say whether the network earned its place on held-out particles."""
    if math.isfinite(bound) and bound > linear:
        log.info(
            "the network explains held-out particles better than the linear stage, by %.2f nats each", bound - linear
        )
    else:
        log.warning(
            "the network does not explain held-out particles better than the linear stage (%.2f against %.2f nats): "
            "prefer the linear codes in %s/linear, train longer, or lower --lr", bound, linear, folder,
        )  # fmt: skip


def _millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6
