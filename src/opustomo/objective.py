"""The objective: likelihood in the consensus frame with first-order pose errors marginalised, KL, priors, schedules.

Owns: METHOD section 7.  Everything is a pure function; energies are in nats per particle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opustomo.physics.fourier import (
    band_frequencies,
    band_multiplicity,
    from_band,
    irfft3,
    rfft3,
    to_band,
)
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop, centre_pad


@dataclass(frozen=True)
class Nuisance:
    """What is constant per particle about its pose error: factor and overlaps of the six pose modes D.

    ``bands`` (6, n) complex: transforms of D times multiplicity; ``factor`` (b, 6, 6): Cholesky factor of
    ``D^T W D + I``; ``overlap`` (b, 6): ``<D, B>``; ``prior`` (b, 6): prior mean.  Gains are included in W and B.
    """

    bands: Tensor
    factor: Tensor
    overlap: Tensor
    prior: Tensor


def pose_nuisance(modes: Tensor, numerator: Tensor, weight: Tensor, prior: Tensor, size: int) -> Nuisance:
    """modes: (6, C, C, C); numerator: (b, C, C, C); weight: (b, n); prior: (b, 6)."""
    bands = model_band(modes, size)
    products = (bands[:, None] * bands[None].conj()).real * band_multiplicity(size, bands.device)
    gram = torch.einsum("bn,jkn->bjk", weight, products)
    eye = torch.eye(len(modes), device=gram.device)
    overlap = numerator.flatten(1) @ modes.flatten(1).T
    scaled = bands.conj() * band_multiplicity(size, bands.device)
    return Nuisance(scaled, torch.linalg.cholesky(gram + eye), overlap, prior)


def evidence(
    volume: Tensor, band: Tensor, numerator: Tensor, weight: Tensor, nuisance: Nuisance, size: int
) -> tuple[Tensor, Tensor]:
    """``log p(data | V) - log p(data | 0)`` with a Gaussian pose error to first order integrated out, (b,).

    volume: (b, C, C, C) and band, its transform on the band (b, n), as seen by the data.  Also returns the
    posterior mean of the pose error (b, 6) in units of its scale.  With prior N(p, I) of the error it is
    ``-E(V) + 1/2 b^T G^-1 b - 1/2 |p|^2 - 1/2 log det G``, ``b = D^T (B - W V) + p``, ``G = D^T W D + I``.
    """
    weighted = weight * band
    quadratic = ((band.conj() * weighted).real * band_multiplicity(size, band.device)).sum(-1)
    fit = (volume * numerator).sum((-3, -2, -1)) - 0.5 * quadratic
    pull = nuisance.overlap + nuisance.prior - torch.einsum("jn,bn->bj", nuisance.bands, weighted).real
    error = torch.cholesky_solve(pull[..., None], nuisance.factor)[..., 0]
    log_det = 2.0 * nuisance.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return fit + 0.5 * (pull * error - nuisance.prior.square()).sum(-1) - 0.5 * log_det, error


def spectral_prior(band: Tensor, precision: Tensor, size: int) -> Tensor:
    """``1/2 <D, D / tau^2>`` in nats, (b,): the Gaussian prior of a volume with the spectrum ``tau^2``.

    band: (b, n) transform of the decoder's nonlinear part; precision ``1/tau^2``: (n,).  It keeps the decoder from
    answering noise in shells where the linear stage found no variability.
    """
    return 0.5 * (band.abs().square() * (precision * band_multiplicity(size, band.device))).sum(-1)


def residual_density(
    numerator: Tensor, weight: Tensor, mean: Tensor, precision: Tensor, mask: Tensor, size: int
) -> Tensor:
    """What the encoder sees: ``mask IFFT[(B - W mean) / (W + 1/tau^2)]``, (b, C, C, C).

    The consensus is subtracted before the division, so the wedge-shaped consensus signal, the main carrier of
    orientation, cancels.  mean: (C, C, C); precision ``1/tau^2`` of the residual: (n,).
    """
    data = to_band(rfft3(centre_pad(numerator, size)))
    filtered = (data - weight * model_band(mean, size)) / (weight + precision)
    return centre_crop(irfft3(from_band(filtered, size)), numerator.shape[-1]) * mask


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


def learning_rate(peak: float, progress: float, warmup: float = 0.02) -> float:
    """Cosine decay to a twentieth of the peak after a linear warm-up over the first ``warmup`` of the run."""
    if progress < warmup:
        return peak * max(0.05, progress / warmup)
    phase = (progress - warmup) / (1.0 - warmup)
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


def disentanglement(codes: Tensor, bank: Tensor) -> Tensor:
    """Structural disentanglement prior of OPUS-DSD/OPUS-TOMO, per particle in nats (b,).

    codes: (b, z) of one wedge orientation; bank: (m, z) codes of other orientations, detached, in random order.  The
    nearest 128 of the bank attract (structure may not depend on orientation), the farthest 512, mixed 0.8/0.2 with
    random ones, and the other codes of the batch repel; of a small bank half is near and half is far.
    ``L+ = mean log(1 + d+)``, ``L- = 3 mean log(1 + 1/d-)``, d = squared distance + 1e-3.  Without other orientations
    it is zero.
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
    if len(codes) > 1:
        inside = torch.cdist(codes, codes).square() + 1e-3
        others = ~torch.eye(len(codes), dtype=torch.bool, device=codes.device)
        repel = repel + (torch.log1p(1.0 / inside) * others).sum(-1) / (len(codes) - 1)
    return attract + repel
