"""The objective: likelihood in the consensus frame with first-order pose errors marginalised, KL, priors, schedules.

Owns: METHOD section 7.  Everything is a pure function; energies are in nats per particle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from opustomo.physics.fourier import band_frequencies, band_multiplicity
from opustomo.physics.observation import band_volume, model_band, model_band_adjoint

WARM_UP = 0.02  # of a run: the learning rate rises


class _Band(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Tensor, size: int) -> Tensor:
        ctx.crop, ctx.size = volume.shape[-1], size
        return model_band(volume, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return model_band_adjoint(gradients[0], ctx.size, ctx.crop), None


def differentiable_band(volume: Tensor, size: int) -> Tensor:
    """``model_band`` whose gradient is one real transform; what autograd makes of it costs a complex one."""
    band: Tensor = _Band.apply(volume, size)
    return band


@dataclass(frozen=True)
class PoseModes:
    """The six pose modes D, (6, C, C, C), and what the likelihood needs of them for all particles alike.

    ``bands`` (6, n) complex: their transforms; ``products`` (21, n): those of every pair j <= k.
    """

    modes: Tensor
    bands: Tensor
    products: Tensor

    def to(self, device: torch.device) -> PoseModes:
        """On a device."""
        return PoseModes(self.modes.to(device), self.bands.to(device), self.products.to(device))


def on_the_band(modes: Tensor, size: int) -> PoseModes:
    """modes: (6, C, C, C) of ``linear.pose_modes``."""
    bands = model_band(modes, size)
    multiplicity = band_multiplicity(size, bands.device)
    first, second = torch.triu_indices(len(modes), len(modes))
    return PoseModes(modes, bands, (bands[first] * bands[second].conj()).real * multiplicity)


@dataclass(frozen=True)
class Nuisance:
    """What is constant per particle about its pose error: factor and overlaps of the six pose modes D.

    ``bands`` (6, n) complex: as in ``PoseModes``; ``factor`` (b, 6, 6): Cholesky factor of
    ``D^T W D + I``; ``overlap`` (b, 6): ``<D, B>``; ``prior`` (b, 6): prior mean.  Gains are included in W and B.
    """

    bands: Tensor
    factor: Tensor
    overlap: Tensor
    prior: Tensor


def pose_nuisance(pose: PoseModes, numerator: Tensor, weight: Tensor, prior: Tensor) -> Nuisance:
    """numerator: (b, C, C, C); weight: (b, n); prior: (b, 6)."""
    count = len(pose.modes)
    first, second = torch.triu_indices(count, count)
    gram = weight.new_zeros(len(weight), count, count)
    gram[:, first, second] = gram[:, second, first] = weight @ pose.products.T
    overlap = numerator.flatten(1) @ pose.modes.flatten(1).T
    return Nuisance(pose.bands, torch.linalg.cholesky(gram + torch.eye(count, device=gram.device)), overlap, prior)


def evidence(
    volume: Tensor, band: Tensor, numerator: Tensor, weight: Tensor, nuisance: Nuisance, size: int
) -> tuple[Tensor, Tensor]:
    """``log p(data | V) - log p(data | 0)`` with a Gaussian pose error to first order integrated out, (b,).

    volume: (b, C, C, C) and band, its transform on the band (b, n), as seen by the data.  Also returns the
    posterior mean of the pose error (b, 6) in units of its scale.  With prior N(p, I) of the error it is
    ``-E(V) + 1/2 b^T G^-1 b - 1/2 |p|^2 - 1/2 log det G``, ``b = D^T (B - W V) + p``, ``G = D^T W D + I``.
    """
    weighted = weight * band_multiplicity(size, band.device)
    value, error = _Explained.apply(band, weighted, nuisance)
    log_det = 2.0 * nuisance.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * (nuisance.prior.square().sum(-1) + log_det)
    return (volume * numerator).sum((-3, -2, -1)) + value - constant, error


class _Explained(torch.autograd.Function):
    """``-1/2 <V, W V> + 1/2 b^T G^-1 b`` and the pose error ``G^-1 b``, of which only the first has a gradient.

    The gradient is ``-W (V + D G^-1 b)``: written out it is one pass over the band instead of a dozen.
    band (b, n) complex; weighted (b, n): W times multiplicity.
    """

    @staticmethod
    def forward(ctx: Any, band: Tensor, weighted: Tensor, nuisance: Nuisance) -> tuple[Tensor, Tensor]:
        product = weighted * band
        # Re <D, W V> and <V, W V> as real sums over real and imaginary parts
        parts = torch.view_as_real(product).flatten(1)
        modes = torch.view_as_real(nuisance.bands).flatten(1)
        pull = nuisance.overlap + nuisance.prior - parts @ modes.T
        error = torch.cholesky_solve(pull[..., None], nuisance.factor)[..., 0]
        quadratic = (parts * torch.view_as_real(band).flatten(1)).sum(-1)
        moved = torch.view_as_complex((error @ modes).unflatten(1, (-1, 2)))
        ctx.save_for_backward(moved.mul_(weighted).add_(product).neg_())
        ctx.mark_non_differentiable(error)
        return 0.5 * ((pull * error).sum(-1) - quadratic), error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0][:, None] * gradient, None, None


def spectral_prior(band: Tensor, precision: Tensor, size: int) -> Tensor:
    """``1/2 <D, D / tau^2>`` in nats, (b,): the Gaussian prior of a volume with the spectrum ``tau^2``.

    band: (b, n) transform of the decoder's nonlinear part; precision ``1/tau^2``: (n,).  It keeps the decoder from
    answering noise in shells where the linear stage found no variability.
    """
    squares = torch.view_as_real(band).square()
    return 0.5 * (squares * (precision * band_multiplicity(size, band.device))[:, None]).sum((-2, -1))


def residual_density(
    numerator: Tensor, weight: Tensor, mean: Tensor, precision: Tensor, mask: Tensor, size: int
) -> Tensor:
    """What the encoder sees: ``mask IFFT[(B - W mean) / (W + 1/tau^2)]``, (b, C, C, C).

    The consensus is subtracted before the division, so the wedge-shaped consensus signal, the main carrier of
    orientation, cancels.  mean: (C, C, C); precision ``1/tau^2`` of the residual: (n,).
    """
    filtered = (model_band(numerator, size) - weight * model_band(mean, size)) / (weight + precision)
    return band_volume(filtered, size, numerator.shape[-1]) * mask


@lru_cache(maxsize=2)
def envelope(bfactor: float, epoch: int, size: int, extent: float, device: torch.device | str = "cpu") -> Tensor:
    """``exp(-pi^2 B0 s^2)`` on the band, (n,), with the schedule of B0: slightly smaller every epoch.

    bfactor: B0 in Angstrom^2 (B = 4 pi^2 B0); extent: box edge in Angstrom, so that s = |k| / extent.
    """
    strength = bfactor * (1.0 - 0.1 / (1.0 + 3.0 * math.exp(-epoch / 4.0))) * 10.0 / 9.0
    s2 = band_frequencies(size, device).square().sum(-1) / extent**2
    return torch.exp(-(math.pi**2) * strength * s2)


def beta_weight(schedule: str, progress: float) -> float:
    """Weight of the KL term at ``progress`` in [0, 1] of the run.

    ``cos``: cyclic annealing (Fu et al. 2019), four cycles, 0.1 to 1 linearly over three quarters of each.
    """
    if schedule == "constant":
        return 1.0
    phase = (4.0 * progress) % 1.0
    return min(1.0, 0.1 + 0.9 * phase / 0.75)


def learning_rate(peak: float, progress: float) -> float:
    """Cosine decay to a twentieth of the peak after a linear warm-up over the first ``WARM_UP`` of the run."""
    if progress < WARM_UP:
        return peak * max(0.05, progress / WARM_UP)
    phase = (progress - WARM_UP) / (1.0 - WARM_UP)
    return peak * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * phase)))


def total_variation(density: Tensor) -> Tensor:
    """``sum |grad V|`` over the voxels, (b,): forward differences of (b, C, C, C), rounded off below 1e-3.

    It draws a density together into even pieces with few edges; noise, which is all edges, costs most.
    """
    squares = torch.zeros_like(density)
    for axis in (-3, -2, -1):
        last = density.narrow(axis, density.shape[axis] - 1, 1)
        squares = squares + torch.diff(density, dim=axis, append=last).square()
    # smooth at zero, where the decoder starts
    return ((squares + 1e-6).sqrt() - 1e-3).sum((-3, -2, -1))


def magnitude(density: Tensor) -> Tensor:
    """``sum |V|`` over the voxels of (b, C, C, C), (b,): what is not needed becomes zero instead of small."""
    return density.abs().sum((-3, -2, -1))


def resolved(variance: Tensor, prior: Tensor) -> Tensor:
    """How much of the prior's variance (K,) posteriors of variance (b, K) have resolved, (b,): 0 nothing, 1 all.

    The codes of particles that say nothing are the prior's mean, wherever the particles look from: neither their
    distances nor their agreement mean anything.
    """
    return (1.0 - (variance / prior).mean(-1)).clamp(0.0, 1.0)


def disentanglement(codes: Tensor, bank: Tensor, batch: Tensor | None = None, at: int = 0) -> Tensor:
    """Structural disentanglement prior of OPUS-DSD/OPUS-TOMO, per particle in nats (b,).

    codes: (b, z) of one wedge orientation; bank: (m, z) codes of other orientations, detached, in random order.  The
    nearest 128 of the bank attract (structure may not depend on orientation), the farthest 512, mixed 0.8/0.2 with
    random ones, and the other codes of the batch repel; of a small bank half is near and half is far.
    ``L+ = mean log(1 + d+)``, ``L- = 3 mean log(1 + 1/d-)``, d = squared distance + 1e-3.  Without other orientations
    it is zero.  batch: (B, z) codes of the whole batch, of which ``codes`` are those from row ``at`` on (None: all).
    """
    if len(bank) == 0:
        return codes.new_zeros(len(codes))
    distance = torch.cdist(codes, bank).square() + 1e-3
    half = max(1, len(bank) // 2)
    near = distance.topk(min(128, half), largest=False).values
    far = distance.topk(min(512, half)).values
    random = distance[:, :512]
    attract = torch.log1p(near).mean(-1)
    repel = 3.0 * (0.8 * torch.log1p(1.0 / far).mean(-1) + 0.2 * torch.log1p(1.0 / random).mean(-1))
    batch = codes if batch is None else batch
    if len(batch) > 1:
        inside = torch.cdist(codes, batch).square() + 1e-3
        others = ~torch.eye(len(batch), dtype=torch.bool, device=codes.device)[at : at + len(codes)]
        repel = repel + (torch.log1p(1.0 / inside) * others).sum(-1) / (len(batch) - 1)
    return attract + repel
