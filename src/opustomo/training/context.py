"""What the steps of a network see, and the codes that a held network gives every particle.

Owns: the data, the linear posterior and the constants of a step, on its device; the posterior of a batch; the pass over
all particles that every epoch of ``train`` and the verb ``encode`` end with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from opustomo import parallel
from opustomo.data.inputs import Inputs
from opustomo.linear import LinearModel, pose_modes, pose_prior
from opustomo.linear_fit import LinearResult
from opustomo.mixture import CodePosterior, Mixture, Statistics, condition
from opustomo.model.vae import Vae
from opustomo.objective import PoseModes, on_the_band, residual_density
from opustomo.physics.fourier import radial, shell_mean
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.reconstruct import Rows


@dataclass(frozen=True)
class Context:
    """Everything a step needs besides the network: data, linear posterior and constants; on the device."""

    rows: Rows
    grid: Grid
    statistics: Statistics  # what the linear stage knows of every code
    mixture: Mixture  # prior of the codes
    gain: Tensor  # (P,)
    pose_prior: Tensor  # (P, 6) prior mean of the pose error at the rows' poses, in units of its scale
    linear: Tensor  # (1+K, 2n) mean and components on the band, real and imaginary parts
    pose: PoseModes
    precision: Tensor  # (n,) of the encoder's Wiener filter
    group: np.ndarray  # (P,) wedge orientation
    device: torch.device
    autocast: bool

    def to(self, device: torch.device) -> Context:
        """The same on another device."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")} | {"device": device}
        return dataclasses.replace(self, **moved, autocast=_autocast(device))


def _autocast(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def context_of(inputs: Inputs, rows: Rows, linear: LinearResult, group: np.ndarray, device: torch.device) -> Context:
    """What a network needs to know of the particles; group (P,): wedge orientations."""
    size = inputs.grid.working_box
    return Context(
        rows=rows,
        grid=inputs.grid,
        statistics=linear.statistics.to(device),
        mixture=linear.mixture.to(device),
        gain=linear.posterior.gain.to(device),
        pose_prior=pose_prior(linear.model, rows, torch.arange(len(rows))).to(device),
        linear=linear_bands(linear.model, inputs.grid).to(device),
        pose=on_the_band(pose_modes(linear.model.mean, linear.model.pose_scale, inputs.grid), size).to(device),
        precision=residual_precision(linear.model, inputs.mask, inputs.grid).to(device),
        group=group,
        device=device,
        autocast=_autocast(device),
    )


def linear_bands(model: LinearModel, grid: Grid) -> Tensor:
    """Mean and components on the band, real and imaginary parts side by side, (1+K, 2n)."""
    bands = model_band(torch.cat([model.mean[None], model.components]), grid.working_box)
    return torch.view_as_real(bands).flatten(1)


def residual_precision(model: LinearModel, mask: Tensor, grid: Grid) -> Tensor:
    """``1/tau^2`` on the band, (n,), of what is not the mean: the spectrum of the components together.

    The spectrum of masked volumes is divided by the mask's share of the box (see ``reconstruct.shell_power``).
    """
    volumes = model.components if model.size else model.mean[None]
    curve = shell_mean(model_band(volumes, grid.working_box).abs().square().sum(0), grid.working_box)
    share = float(mask.square().sum()) / grid.working_box**3
    return share / radial(curve.clamp(min=1e-3 * float(curve.max())), grid.working_box)


# ------------------------------------------------------------------------------------------------ codes of a batch


@dataclass(frozen=True)
class Batch:
    """The particles at rows index (b,): numerator (b, C, C, C) and weight (b, n), gains applied, on the device."""

    index: Tensor
    numerator: Tensor
    weight: Tensor


def read_batch(context: Context, index: Tensor) -> Batch:
    """What the data say of the particles at ``index``."""
    gain = context.gain[index.to(context.device)]
    numerator = context.rows.numerator(index).to(context.device, non_blocking=True) * gain[:, None, None, None]
    weight = context.rows.weight(index).to(context.device, non_blocking=True) * gain[:, None].square()
    return Batch(index, numerator, weight)


def known(context: Context, index: Tensor) -> CodePosterior:
    """What the linear stage knows of the codes of a batch."""
    return condition(context.mixture, context.statistics.at(index.to(context.device)))


def posterior_of(model: Vae, context: Context, linear: CodePosterior, batch: Batch) -> CodePosterior:
    """Posterior of the codes of a batch: the linear stage's, moved by the encoder if there is one."""
    if model.encoder is None:
        return linear
    density = residual_density(
        batch.numerator, batch.weight, model.mean, context.precision, model.mask, context.grid.working_box
    )
    with torch.autocast(context.device.type, torch.bfloat16, enabled=context.autocast):
        shift, log_scale = model.encode(density, linear.centre().float(), linear.spread().float())
    return linear.moved(shift.double(), log_scale.double())


@torch.no_grad()
def encode_all(model: Vae, context: Context, zdim: int) -> tuple[Tensor, Tensor]:
    """Codes and their standard deviations of every particle, (P, zdim) each; several processes share the work.

    Dimensions without a component have the prior's code: as many columns as ``--zdim``, as users of such files expect.
    """
    model.eval()
    shape = len(context.gain), context.mixture.mean.shape[1]
    means, sigmas = torch.zeros(shape), torch.zeros(shape)
    for index in parallel.turns(torch.arange(shape[0]).split(32)):
        posterior = known(context, index)
        if model.encoder is not None:
            posterior = posterior_of(model, context, posterior, read_batch(context, index))
        means[index] = posterior.centre().float().cpu()
        sigmas[index] = posterior.spread().float().cpu()
    unused = (0, zdim - shape[1])
    parallel.total(means), parallel.total(sigmas)  # every row is zero in all processes but one
    return functional.pad(means, unused), functional.pad(sigmas, unused, value=1.0)
