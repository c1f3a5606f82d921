"""The linear stage: ``V_i = mean + U z_i + D p_i`` with ``z, p ~ N(0, I)``, fitted in closed form (METHOD 4b).

Owns: probabilistic PCA with known transfer functions and a solvent mask.  D are the six derivatives of the mean with
respect to rotation and shift, scaled by the pose error that the data show: consensus poses are wrong, and what a
first-order pose error explains must not end up in the code z.  Training starts from this result and has to beat it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from opustomo.mixture import CHUNK, Mixture, single, with_gain
from opustomo.physics.fourier import band_multiplicity, band_shell, radial, spectral_gradient
from opustomo.physics.grid import Grid
from opustomo.physics.observation import band_volume, model_band
from opustomo.physics.volume import centre_crop, centre_pad, centred_coordinates
from opustomo.pose_scale import POSE, USUAL_POSE, likeliest_pose_scale
from opustomo.reconstruct import (
    Rows,
    batch_size,
    batches,
    local_amplitude,
    mean_volume,
    precision_of,
    shell_power,
    solve_masked,
    totals,
    unpack,
    upper,
)

log = logging.getLogger("opustomo")

GAIN_VARIANCE = 0.01  # prior variance of a particle's contrast: 10 %
PROBES = 4  # random volumes from which each further component is found
PRIOR_VARIANCE_SHARE = 0.45  # measured: full posterior variance overfits the components' spectrum (docs/experiments.md)


@dataclass(frozen=True)
class LinearModel:
    """mean (C, C, C); components (K, C, C, C), scaled so that z has unit variance; spectra (M//2+1,).

    pose_scale: standard deviation of the pose error per axis: rotation in radians, shift in working voxels.
    amplitude: (2, C, C, C) local amplitude in the prior of the mean and of the components; None: 1 everywhere.
    """

    mean: Tensor
    components: Tensor
    mean_power: Tensor
    component_power: Tensor
    pose_scale: tuple[float, float] = USUAL_POSE
    amplitude: Tensor | None = None

    @property
    def size(self) -> int:
        """K."""
        return self.components.shape[0]

    @property
    def places(self) -> Tensor:
        """The amplitude as a tensor (2, C, C, C)."""
        return self.mean.new_ones((2, *self.mean.shape)) if self.amplitude is None else self.amplitude

    def decode(self, codes: Tensor) -> Tensor:
        """(b, K) codes to (b, C, C, C)."""
        return self.mean + torch.einsum("bk,kzyx->bzyx", codes, self.components)


@dataclass(frozen=True)
class Posterior:
    """Joint posterior of (z, p) of P particles: mean (P, K+6), covariance (P, K+6, K+6), gain (P,), evidence (P,).

    The evidence is in nats relative to the empty model: ``log p(data | model) - log p(data | V = 0)``.
    """

    mean: Tensor
    covariance: Tensor
    gain: Tensor
    evidence: Tensor

    @property
    def code(self) -> Tensor:
        """(P, K)."""
        return self.mean[:, :-POSE]

    @property
    def pose(self) -> Tensor:
        """(P, 6) in units of the model's pose scale."""
        return self.mean[:, -POSE:]


def pose_modes(mean: Tensor, pose_scale: tuple[float, float], grid: Grid) -> Tensor:
    """Derivatives of ``V(R^T (x - t))`` at the identity times the pose scale: (..., C, C, C) to (..., 6, C, C, C).

    Rotation vector w (active, radians, about x, y, z): ``-(w x x) . grad V``; shift t: ``-grad V``.
    """
    padded = centre_pad(mean, grid.working_box)
    gx, gy, gz = spectral_gradient(padded)
    x, y, z = centred_coordinates(grid.working_box, mean.device).unbind(-1)
    turn, move = pose_scale
    rotation = torch.stack([z * gy - y * gz, x * gz - z * gx, y * gx - x * gy], -4) * turn
    shift = torch.stack([-gx, -gy, -gz], -4) * move
    return centre_crop(torch.cat([rotation, shift], -4), grid.crop)


def columns(model: LinearModel, grid: Grid) -> Tensor:
    """(1 + K + 6, C, C, C): mean, components, pose modes."""
    return torch.cat([model.mean[None], model.components, pose_modes(model.mean, model.pose_scale, grid)])


def statistics(volumes: Tensor, rows: Rows, index: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Sufficient statistics: ``<V_a, B_i>`` (b, q) and ``<V_a, W_i V_b>`` (b, q, q) for volumes (q, C, C, C)."""
    bands = model_band(volumes, grid.working_box)
    first, second = upper(len(volumes))
    products = (bands[first] * bands[second].conj()).real * band_multiplicity(grid.working_box)
    linear, quadratic = [], []
    for part in batches(index, batch_size(grid)):
        linear.append(rows.numerator(part).flatten(1) @ volumes.flatten(1).T)
        quadratic.append(unpack((rows.weight(part) @ products.T).double(), len(volumes)))
    return torch.cat(linear).double(), torch.cat(quadratic)


def posterior(
    linear: Tensor, quadratic: Tensor, gain: Tensor, pose_prior: Tensor, mixture: Mixture | None = None
) -> Posterior:
    """Posterior from the statistics and gains g (b,).

    Precision ``G = g^2 U^T W U + P``, mean ``G^-1 [U^T (g B - g^2 W mean) + P m]``.
    pose_prior: (b, 6) prior mean of the pose error in units of its scale.  m and P are mean and precision of the prior:
    of each Gaussian of ``mixture`` (None: N(0, I)) and of the pose error; the result has the moments of them all.
    """
    every = torch.arange(len(linear)).split(CHUNK)
    parts = [_posterior(linear[i], quadratic[i], gain[i], pose_prior[i], mixture) for i in every]
    return (
        parts[0]
        if len(parts) == 1
        else Posterior(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Posterior)))
    )


def _posterior(
    linear: Tensor, quadratic: Tensor, gain: Tensor, pose_prior: Tensor, mixture: Mixture | None
) -> Posterior:
    """``posterior`` of few enough particles that all their Gaussians fit in memory."""
    linear, quadratic = with_gain(linear, quadratic, gain)
    codes = single(linear.shape[1] - 1 - POSE) if mixture is None else mixture
    precision = torch.stack([torch.block_diag(p, torch.eye(POSE).to(p)) for p in torch.linalg.inv(codes.covariance)])
    every = codes.mean.expand(len(linear), -1, -1)
    prior = torch.cat([every, pose_prior[:, None].expand(-1, every.shape[1], -1)], -1)  # (b, J, K+6)
    pull = torch.einsum("bjk,jkl->bjl", prior, precision)
    factor = torch.linalg.cholesky(quadratic[:, None, 1:, 1:] + precision)
    right = (linear[:, 1:] - quadratic[:, 0, 1:])[:, None] + pull
    mean = torch.cholesky_solve(right[..., None], factor)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * torch.logdet(codes.covariance)
    fit = (linear[:, 0] - 0.5 * quadratic[:, 0, 0])[:, None] + 0.5 * (right * mean - pull * prior).sum(-1)
    joint = fit - log_det + codes.share.log()
    evidence = torch.logsumexp(joint, 1)
    share = (joint - evidence[:, None]).exp()
    centre = torch.einsum("bj,bjk->bk", share, mean)
    offset = mean - centre[:, None]
    each = torch.cholesky_inverse(factor) + offset[..., :, None] * offset[..., None, :]
    return Posterior(centre, torch.einsum("bj,bjkl->bkl", share, each), gain, evidence)


def with_mean(code: Tensor) -> Tensor:
    """z~ = (1, z): (b, K) to (b, K+1)."""
    return torch.cat([code.new_ones(len(code), 1), code], 1)


def particle_gain(linear: Tensor, quadratic: Tensor, code: Tensor) -> Tensor:
    """Contrast of each particle (b,): ``(<V,B> + 1/v) / (<V,WV> + 1/v)`` for its own V, kept positive."""
    extended = with_mean(code)
    overlap = (extended * linear).sum(-1)
    power = torch.einsum("ba,bac,bc->b", extended, quadratic, extended)
    return ((overlap + 1.0 / GAIN_VARIANCE) / (power + 1.0 / GAIN_VARIANCE)).clamp(min=0.05)


def pose_prior(model: LinearModel, rows: Rows, index: Tensor) -> Tensor:
    """Prior mean of the pose error, (b, 6), in units of its scale: back to the poses of the file.

    Rows made at moved poses are still particles whose given pose is what it was; without this a second look would
    count the same evidence twice.
    """
    scale = torch.tensor(model.pose_scale).repeat_interleave(3)
    return -rows.moved[index] / scale


def infer(model: LinearModel, rows: Rows, index: Tensor, grid: Grid, gain: Tensor | None = None) -> Posterior:
    """Posterior of the particles at ``index``; gains are estimated by three alternations unless given."""
    moments = statistics(columns(model, grid), rows, index, grid)
    prior = pose_prior(model, rows, index).double()
    gain = estimate_gain(*moments, prior) if gain is None else gain
    return to_single(posterior(*moments, gain.double(), prior))


def estimate_gain(linear: Tensor, quadratic: Tensor, prior: Tensor, mixture: Mixture | None = None) -> Tensor:
    """Contrast of each particle, (b,), by three alternations with its code; arguments as for ``posterior``."""
    gain = torch.ones(len(linear))
    for _ in range(3):
        post = posterior(linear, quadratic, gain.double(), prior, mixture)
        # at the precision of a checkpoint, so that a resumed run finds the same posterior to the last bit
        gain = particle_gain(linear, quadratic, post.mean).float()
    return gain


def own_pose_error(model: LinearModel, rows: Rows, index: Tensor, grid: Grid, code: Tensor, gain: Tensor) -> Tensor:
    """Posterior mean of the pose error, (b, 6) in units of its scale, given each particle's code (b, K) and gain (b,).

    The modes are derivatives of the particle's own density; in the joint posterior of ``infer`` they are the mean's.
    """
    size, prior = grid.working_box, pose_prior(model, rows, index)
    multiplicity, found = band_multiplicity(size), []
    for part in torch.arange(len(index)).split(max(1, batch_size(grid) // 16)):
        volumes = model.decode(code[part]) * gain[part, None, None, None]
        modes = pose_modes(volumes, model.pose_scale, grid)
        bands, weighted = model_band(modes, size), (rows.weight(index[part]) * multiplicity)[:, None]
        gram = ((bands * weighted) @ bands.conj().transpose(-1, -2)).real + torch.eye(POSE)
        explained = (bands.conj() * weighted * model_band(volumes, size)[:, None]).real.sum(-1)
        overlap = torch.einsum("bjzyx,bzyx->bj", modes, rows.numerator(index[part]))
        found.append(torch.linalg.solve(gram, (overlap - explained + prior[part])[..., None])[..., 0])
    return torch.cat(found)


def to_single(post: Posterior) -> Posterior:
    """At float32."""
    return Posterior(post.mean.float(), post.covariance.float(), post.gain.float(), post.evidence.float())


# ------------------------------------------------------------------------------------------------ maximisation


def accumulate(rows: Rows, index: Tensor, grid: Grid, post: Posterior) -> tuple[Tensor, Tensor]:
    """Normal equations of all columns given posteriors: ``sum_i E(z~ z~^T) g^2 W_i(k)`` (n, q, q) and
    ``sum_i E(z~) g B_i`` (q, C, C, C)."""
    extended = with_mean(post.mean)
    moments = extended[:, :, None] * extended[:, None, :]
    moments[:, 1:, 1:] += post.covariance
    first, second = upper(extended.shape[1])
    flat = moments[:, first, second] * post.gain[:, None].square()
    weighted = extended * post.gain[:, None]
    system = torch.zeros(len(band_shell(grid.working_box)), flat.shape[1])
    right = torch.zeros(extended.shape[1], grid.crop**3)
    position = 0
    for part in batches(index, batch_size(grid)):
        here = slice(position, position + len(part))
        position += len(part)
        system.addmm_(rows.weight(part).T, flat[here])
        right.addmm_(weighted[here].T, rows.numerator(part).flatten(1))
    return unpack(system, extended.shape[1]), right.unflatten(1, (grid.crop,) * 3)


def maximise(model: LinearModel, rows: Rows, index: Tensor, grid: Grid, mask: Tensor, post: Posterior) -> LinearModel:
    """One M-step: mean, components and their spectra; the pose modes are held and their share is subtracted."""
    system, right = accumulate(rows, index, grid, post)
    free = 1 + model.size
    modes = model_band(pose_modes(model.mean, model.pose_scale, grid), grid.working_box)
    held = torch.einsum("nad,dn->an", system[:, :free, free:].to(modes.dtype), modes)
    right = right[:free] - band_volume(held, grid.working_box, grid.crop)
    system = system[:, :free, :free]
    spectra = torch.cat([model.mean_power[None], model.component_power.expand(model.size, -1)])
    precision = precision_of(spectra, grid, 1e-8 * float(model.mean_power.max()))
    start = torch.cat([model.mean[None], model.components])
    each = torch.cat([model.places[:1], model.places[1:].expand(model.size, *mask.shape)])
    solved = solve_masked(system, right, precision, mask, grid, start, 5, each)
    diagonal = system.diagonal(dim1=-2, dim2=-1).T
    power = shell_power(solved, diagonal, precision, mask, grid, PRIOR_VARIANCE_SHARE)
    shared = power[1:].mean(0) if model.size else model.component_power
    changed = local_amplitude(solved[1:], mask, grid) if model.size else model.places[1]
    return replace(
        model,
        mean=solved[0], components=solved[1:], mean_power=power[0], component_power=shared,
        amplitude=torch.stack([local_amplitude(solved[:1], mask, grid), changed]),
    )  # fmt: skip


def rescale(model: LinearModel, post: Posterior, pose_scale: tuple[float, float], *, codes: bool = True) -> LinearModel:
    """Bring codes and gains to unit scale (parameter expansion: EM converges in fewer steps), and take a pose scale.

    Without ``codes`` those stay as they are: a mixture has their scale.
    """
    root = torch.eye(model.size)
    if codes:
        second = (post.mean.T @ post.mean / len(post.mean) + post.covariance.mean(0)).double()
        values, vectors = torch.linalg.eigh(second[:-POSE, :-POSE])
        root = ((vectors * values.clamp(min=1e-9).sqrt()) @ vectors.T).float()
    gain = float(post.gain.mean())
    return replace(
        model,
        mean=model.mean * gain,
        components=gain * torch.einsum("kj,kzyx->jzyx", root, model.components),
        pose_scale=pose_scale,
    )


def principal_axes(model: LinearModel) -> LinearModel:
    """Rotate the components to PCA order: orthogonal volumes, largest variance first, a fixed sign."""
    if model.size == 0:
        return model
    flat = model.components.flatten(1).double()
    _, vectors = torch.linalg.eigh(flat @ flat.T)
    turned = (vectors.flip(-1).T @ flat).float()
    sign = torch.where(turned.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return replace(model, components=(turned * sign).unflatten(1, model.mean.shape))


def average(rows: Rows, index: Tensor, grid: Grid, mask: Tensor) -> LinearModel:
    """The model without components: the masked average."""
    mean, power = mean_volume(*totals(rows, index, torch.ones(len(index)), grid), mask, grid)
    return LinearModel(mean, mean.new_zeros((0, *mean.shape)), power, 0.1 * power)


def add_components(model: LinearModel, count: int, grid: Grid, mask: Tensor, seed: int) -> LinearModel:
    """Append masked noise with the mean's low-resolution spectrum and a twentieth of its power."""
    size = grid.working_box
    generator = torch.Generator().manual_seed(seed)
    shell = band_shell(size).float()
    noise = torch.view_as_complex(torch.randn((count, len(shell), 2), generator=generator))
    envelope = radial(0.05 * model.mean_power, size).sqrt() * torch.exp(-((shell / (0.25 * size)) ** 2))
    fresh = band_volume(noise * envelope, size, grid.crop) * mask
    return replace(model, components=torch.cat([model.components, fresh]))


def fit(
    model: LinearModel,
    rows: Rows,
    index: Tensor,
    grid: Grid,
    mask: Tensor,
    iterations: int,
) -> LinearModel:
    """EM from ``model`` on the particles at ``index``."""
    for _ in range(iterations):
        model = maximise(model, rows, index, grid, mask, infer(model, rows, index, grid))
        moments, prior = statistics(columns(model, grid), rows, index, grid), pose_prior(model, rows, index).double()
        gain = estimate_gain(*moments, prior)
        scale = likeliest_pose_scale(model.pose_scale, *moments, gain, prior)
        model = rescale(model, to_single(posterior(*moments, gain.double(), prior)), scale)
    return principal_axes(model)


def choose_components(
    rows: Rows,
    train: Tensor,
    held: Tensor,
    grid: Grid,
    mask: Tensor,
    limit: int,
    iterations: int,
    seed: int,
    *,
    exactly: bool = False,
) -> tuple[LinearModel, list[tuple[int, float]]]:
    """Grow K while the evidence of held-out particles rises; best model, (K, evidence) pairs.

    ``exactly``: go to ``limit`` components whatever the evidence says.
    """
    # the pose scale has to settle first, or its progress would pass for that of a component
    model = fit(average(rows, train, grid, mask), rows, train, grid, mask, 2 * iterations)
    top = float(infer(model, rows, held, grid).evidence.mean())
    best, trail, failures = model, [(0, top)], 0
    log.info("linear stage: K = 0, the average alone: held-out evidence %.2f nats per particle", top)
    for k in range(1, limit + 1):
        # several at once: a single random start can take dozens of steps to turn towards what is there
        model = fit(add_components(model, PROBES, grid, mask, seed + k), rows, train, grid, mask, iterations // 2)
        model = fit(replace(model, components=model.components[:k]), rows, train, grid, mask, iterations)
        trail.append((k, float(infer(model, rows, held, grid).evidence.mean())))
        log.info("linear stage: K = %d, held-out evidence %.2f nats per particle", *trail[-1])
        if k == 1:
            single = model
        if exactly or trail[-1][1] > top:
            best, top, failures = model, trail[-1][1], 0
        else:
            failures += 1
        if failures == 2:
            break
    if best.size == 0 and limit:
        log.warning(
            "held-out particles are explained best by the average alone: one component is kept so that there is a "
            "code, but take no class for real that the data do not show by themselves (opustomo quality)"
        )
        return single, trail
    return best, trail
