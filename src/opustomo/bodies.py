"""Rigid bodies within a molecule: every particle's motion of its bodies, and how the set moves.

Owns: the model ``V_i = move(mean + U z_i; m_i)`` with ``m_i ~ N(0, S)``, m the motions of all bodies (see
``physics.bodies``), and its fit: Gauss-Newton steps to every particle's motion, the S under which the data are
likeliest, the mean by conjugate gradients through the motions.  S has full rank and finds out by itself how few motions
there are.  What all bodies do together is a pose error; the rest, as far as the set shows it, is the conformation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from opustomo.linear import LinearModel
from opustomo.motion_covariance import Told, likeliest_covariance
from opustomo.objective import differentiable_band
from opustomo.physics.bodies import move_bodies, move_with_derivatives
from opustomo.physics.fourier import band_multiplicity
from opustomo.physics.geometry import cross_matrix
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band, model_band_adjoint, seen_through
from opustomo.physics.volume import centred_coordinates
from opustomo.reconstruct import Rows, conjugate_gradients, own_precision

DOF = 6  # of a body: rotation about x, y, z and shift along them
SHRINK, TRIES = 1.0 / 3.0, 4  # of a step that makes things worse
VALUES_AT_ONCE = 2e7  # derivatives held at a time
STILL = 0.05  # voxels: no body is known to stand more still than this where poses are split from conformations
FREEDOM = 10.0  # times the covariance of the set: as good as none where the data tell a motion
LEAST = 0.005  # voxels: of the motions of the set, which have to have an inverse; ten times that costs a nat
RIDGE = 1e-6  # of the metric: a body of a few voxels has motions that move nothing

Bar = Callable[[Iterable[Tensor], int], Iterable[Tensor]]


@dataclass(frozen=True)
class Bodies:
    """weights (B, C, C, C) of sum 1, joints (B, 3) in voxels from C//2, metric (6 B, 6 B): ``<m, metric m>`` is the
    mean square displacement of the density, in square voxels, that the motion m makes (first order)."""

    weights: Tensor
    joints: Tensor
    metric: Tensor

    def __len__(self) -> int:
        return len(self.joints)

    def move(self, volume: Tensor, motion: Tensor) -> Tensor:
        """(b or 1, C, C, C) volumes under motions (b, 6 B)."""
        return move_bodies(volume, self.weights, self.joints, motion.unflatten(1, (-1, DOF)))

    def alike(self, size: float) -> Tensor:
        """(6 B, 6 B), float64: covariance of motions that are all of one size, ``size`` voxels each."""
        return size**2 * torch.linalg.inv(self.metric.double())

    def together(self) -> Tensor:
        """(6 B, 6): the motions of the bodies when the whole turns about voxel C//2 and shifts."""
        lever = -cross_matrix(self.joints)  # w x c = -c x w
        eye = torch.eye(3).to(lever).expand(len(self), 3, 3)
        rows = torch.cat([torch.cat([eye, torch.zeros_like(eye)], 2), torch.cat([lever, eye], 2)], 1)
        return rows.flatten(0, 1)


def with_joints(weights: Tensor, density: Tensor, relative: tuple[int, ...]) -> Bodies:
    """Bodies whose joints are the middles of the density that they share with the body they turn against.

    weights: (B, C, C, C); density: (C, C, C), its positive part counts; relative: for every body another's number, or
    its own: all others.
    """
    mass, place = density.clamp(min=0), centred_coordinates(density.shape[-1], density.device)
    other = [1 - w if r == b else weights[r] for b, (w, r) in enumerate(zip(weights, relative, strict=True))]
    shared = torch.stack([mass * w * o for w, o in zip(weights, other, strict=True)])
    total = shared.sum((1, 2, 3))[:, None].clamp(min=1e-12)
    joints = torch.einsum("bzyx,zyxc->bc", shared, place) / total
    return Bodies(weights, joints, metric_of(weights, joints, mass))


def metric_of(weights: Tensor, joints: Tensor, mass: Tensor) -> Tensor:
    """The metric of ``Bodies``; mass: (C, C, C), 0 or more."""
    turns = -cross_matrix(centred_coordinates(mass.shape[-1], mass.device) - joints[:, None, None, None])
    # displacement w x arm + t at every voxel, (B, C, C, C, 3, 6)
    moves = torch.cat([turns, torch.eye(3).to(turns).expand_as(turns)], -1)
    square = torch.einsum("bzyx,bzyxcj,bzyxck->bjk", mass * weights, moves, moves) / mass.sum().clamp(min=1e-12)
    metric = torch.block_diag(*square)
    return metric + RIDGE * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)


@dataclass(frozen=True)
class BodyModel:
    """mean (C, C, C), components (K, C, C, C) of unit variance, covariance S (6 B, 6 B) of the motions.

    power (M//2+1,), amplitude (C, C, C): spectrum and local amplitude of the mean's prior.
    """

    bodies: Bodies
    mean: Tensor
    components: Tensor
    covariance: Tensor
    power: Tensor
    amplitude: Tensor

    def density(self, code: Tensor) -> Tensor:
        """At rest, of codes (b, K): (b, C, C, C), or (1, C, C, C) where there are no components."""
        if len(self.components) == 0:
            return self.mean[None]
        return self.mean + torch.einsum("bk,kzyx->bzyx", code, self.components)

    def with_linear(self, model: LinearModel) -> BodyModel:
        """Mean, components and the mean's prior of a linear model."""
        return replace(
            self, mean=model.mean, components=model.components, power=model.mean_power, amplitude=model.places[0]
        )

    def to(self, device: torch.device) -> BodyModel:
        """On a device."""
        bodies = Bodies(*(getattr(self.bodies, f.name).to(device) for f in fields(Bodies)))
        rest = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "bodies"}
        return replace(self, bodies=bodies, **rest)

    def freed(self) -> BodyModel:
        """The model with a prior of the motions that hardly holds them back.

        The most likely motion is nearer to 0 than the true one.  In data whose bodies are put back from it a part of
        the motion is left, always the same part: a component of composition would take it up.
        """
        wide = FREEDOM * self.covariance.double() + self.bodies.alike(STILL)
        return replace(self, covariance=wide.to(self.covariance))

    def common(self, motion: Tensor) -> Tensor:
        """The pose error in motions (P, 6 B): rotation vector and shift of the molecule about voxel C//2, (P, 6).

        The pose is that of the bodies that move least: of all ways to split motions into a common one and the rest this
        has the least variance, and the two are uncorrelated (generalised least squares).
        """
        shared = self.bodies.together().double()
        weighted = torch.linalg.solve(self.covariance.double() + self.bodies.alike(STILL), shared)
        return motion @ torch.linalg.solve(shared.T @ weighted, weighted.T).T.to(motion)

    def inner(self, motion: Tensor) -> Tensor:
        """Motions (P, 6 B) less what all bodies do together."""
        return motion - self.common(motion) @ self.bodies.together().T

    def modes(self, count: int) -> tuple[Tensor, Tensor]:
        """The conformation: loading (6 B, count) and root mean square displacement (count,) in voxels.

        ``motion = loading y`` with y of unit variance: principal axes, in the metric of displacements, of what the
        bodies do against each other; the largest first.
        """
        root = torch.linalg.cholesky(self.bodies.metric.double())
        inner = self.inner(self.inner(self.covariance.T).T).double()
        values, vectors = torch.linalg.eigh(root.T @ inner @ root)
        values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
        size = values.sqrt()
        loading = torch.linalg.solve_triangular(root.T, vectors * size, upper=True)
        # the sign: most of a body turns the right-handed way about its largest axis
        sign = torch.where(loading.gather(0, loading.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        return (loading * sign).float(), size.float()

    def projection(self, count: int) -> Tensor:
        """(count, 6 B) that takes a motion to its code y; 0 where the set does not move."""
        loading, size = self.modes(count)
        weighted = loading.T @ self.bodies.metric / size.square().clamp(min=1e-12)[:, None]
        inner = self.inner(torch.eye(len(self.covariance)).to(weighted))
        return torch.where(size[:, None] > 0, weighted @ inner.T, 0.0)


@dataclass(frozen=True)
class Motions:
    """Posterior of P particles: motion (P, 6 B), code (P, K), evidence (P,), standard deviations (P, D) of y.

    The evidence is Laplace's, in nats against an empty map.
    """

    motion: Tensor
    code: Tensor
    evidence: Tensor
    spread: Tensor


@dataclass(frozen=True)
class BodyResult:
    """The fitted bodies: model, motions of all particles at the gains (P,) they were found with, names.

    free: (P, 6 B) motions under the wide prior of ``BodyModel.freed``, from which the bodies are put back;
    dimensions: columns of the conformation code (``--zaffinedim``).
    """

    names: tuple[str, ...]
    model: BodyModel
    motions: Motions
    free: Tensor
    gain: Tensor
    dimensions: int

    @property
    def conformation(self) -> tuple[Tensor, Tensor]:
        """Codes y, of unit variance in the set, and their standard deviations: (P, D) each."""
        return self.motions.motion @ self.model.projection(self.dimensions).T, self.motions.spread

    @property
    def common(self) -> Tensor:
        """What all bodies of a particle do together, (P, 6): an error of its pose (see ``data.poses``)."""
        return self.model.common(self.motions.motion)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        model = {f.name: getattr(self.model, f.name) for f in fields(BodyModel) if f.name != "bodies"}
        bodies, motions = vars(self.model.bodies), vars(self.motions)
        return {"names": list(self.names), "model": model, "bodies": dict(bodies), "motions": dict(motions),
                "free": self.free, "gain": self.gain, "dimensions": self.dimensions}  # fmt: skip

    @classmethod
    def of(cls, state: dict[str, Any]) -> BodyResult:
        """The inverse of ``state``."""
        model = BodyModel(bodies=Bodies(**state["bodies"]), **state["model"])
        motions = Motions(*(state["motions"][f.name] for f in fields(Motions)))
        free = state.get("free", motions.motion)  # runs of before had no others
        return cls(tuple(state["names"]), model, motions, free, state["gain"], int(state["dimensions"]))


def at_rest(count: int, model: BodyModel, dimensions: int) -> Motions:
    """Where every search begins."""
    shapes = (count, len(model.covariance)), (count, len(model.components)), (count,), (count, dimensions)
    return Motions(*(torch.zeros(shape) for shape in shapes))


# ------------------------------------------------------------------------------------------------ one particle


def find_motions(
    model: BodyModel, rows: Rows, index: Tensor, grid: Grid, last: Motions, steps: int, bar: Bar,
    tell: Callable[[Told], object] | None = None,
) -> Motions:  # fmt: skip
    """``last`` with the particles at ``index`` after ``steps`` (1 or more) Gauss-Newton steps.

    rows: gains are in (``AtGain``), here and in all that follows; tell: gets what the data tell of the motions of some
    particles after the others, as it was before the last step.
    """
    motion, code, evidence, spread = (v.clone() for v in (last.motion, last.code, last.evidence, last.spread))
    device, size = model.mean.device, motion.shape[1]
    projection = model.projection(spread.shape[1])
    for part in bar(index.split(batch_of(model, grid)), len(index)) if len(index) else ():
        numerator, weight = rows.numerator(part).to(device), rows.weight(part).to(device)
        start = torch.cat([motion[part], code[part]], 1).to(device)
        place, covariance, value, told = _search(model, numerator, weight, start, grid, steps)
        moving = covariance[:, :size, :size]
        if tell is not None:
            tell(Told(told.pull.cpu(), told.precision.cpu()))
        motion[part], code[part], evidence[part] = place[:, :size].cpu(), place[:, size:].cpu(), value.cpu()
        variance = torch.einsum("dj,bjk,dk->bd", projection, moving, projection)
        spread[part] = variance.clamp(min=0).sqrt().cpu()
    return Motions(motion, code, evidence, spread)


def batch_of(model: BodyModel, grid: Grid) -> int:
    """Particles whose derivatives are held at a time."""
    columns = 2 * len(model.covariance) + len(model.components)
    return max(1, min(64, int(VALUES_AT_ONCE / (columns * grid.crop**3))))


@torch.no_grad()
def _search(
    model: BodyModel, numerator: Tensor, weight: Tensor, start: Tensor, grid: Grid, steps: int
) -> tuple[Tensor, Tensor, Tensor, Told]:
    """Motion and code (b, 6 B + K) of the largest posterior near ``start``, its covariance there, the evidence, and
    what the data tell of the motion."""
    size, count = grid.working_box, len(model.covariance)
    codes = torch.eye(len(model.components)).to(model.mean)
    prior = torch.block_diag(torch.linalg.inv(model.covariance.double()).to(codes), codes)
    weighted = weight * band_multiplicity(size, weight.device)

    def volume(place: Tensor) -> Tensor:
        return model.density(place[:, count:])

    def energy(place: Tensor, which: Tensor) -> Tensor:
        moved = model.bodies.move(volume(place), place[:, :count])
        square = (model_band(moved, size).abs().square() * weighted[which]).sum(-1)
        overlap = (moved * numerator[which]).sum((-3, -2, -1))
        return 0.5 * square - overlap + 0.5 * torch.einsum("bi,ij,bj->b", place, prior, place)

    everyone = torch.arange(len(start), device=start.device)
    place, lowest = start.clone(), energy(start, everyone)
    for _ in range(steps):
        pull, precision = _slope(model, numerator, weighted, volume(place), place[:, :count], size)
        told = Told.of(pull, precision, place, count)
        factor = torch.linalg.cholesky(precision + prior)
        step = torch.cholesky_solve((pull - place @ prior)[..., None], factor)[..., 0]
        left = everyone
        for shrunk in range(TRIES):
            here = place[left] + SHRINK**shrunk * step[left]
            value = energy(here, left)
            better = value < lowest[left]
            place[left[better]], lowest[left[better]] = here[better], value[better]
            left = left[~better]
            if len(left) == 0:
                break
    # the curvature before the last step, which was a small one
    inverse = torch.cholesky_inverse(factor)
    evidence = 0.5 * torch.logdet(prior) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - lowest
    return place, inverse, evidence, told


def _slope(
    model: BodyModel, numerator: Tensor, weighted: Tensor, volume: Tensor, motion: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Derivative of the likelihood with respect to motion and code, (b, q), and its Gauss-Newton curvature."""
    moves = motion.unflatten(1, (-1, DOF))
    moved, columns = move_with_derivatives(volume, model.bodies.weights, model.bodies.joints, moves)
    if len(model.components):
        codes = [model.bodies.move(component[None], motion) for component in model.components]
        columns = torch.cat([columns, torch.stack(codes, 1)], 1)
    parts = torch.view_as_real(model_band(columns, size)).flatten(2)
    heavy = parts * weighted.repeat_interleave(2, 1)[:, None]
    explained = (heavy @ torch.view_as_real(model_band(moved, size)).flatten(1)[..., None])[..., 0]
    pull = (columns.flatten(2) @ numerator.flatten(1)[..., None])[..., 0] - explained
    return pull, heavy @ parts.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ the set


def refit(
    model: BodyModel, rows: Rows, index: Tensor, grid: Grid, mask: Tensor, found: Motions, told: Told, first: Tensor,
    steps: int,
) -> BodyModel:  # fmt: skip
    """The M-step on the particles at ``index``: covariance of the motions, and the mean by conjugate gradients.

    told: of their motions; first (6 B, 6 B): the covariance to begin with.
    """
    mean = _solve_mean(model, rows, index, grid, mask, found, steps)
    covariance = likeliest_covariance(first, told).to(mean.device) + model.bodies.alike(LEAST)
    return replace(model, covariance=covariance.to(mean), mean=mean)


def _solve_mean(
    model: BodyModel, rows: Rows, index: Tensor, grid: Grid, mask: Tensor, found: Motions, steps: int
) -> Tensor:
    """``mean = a U`` as in ``reconstruct.solve_masked``, but with the data's weight seen through the motions."""
    size, device = grid.working_box, model.mean.device
    precision, mask = own_precision(model.power, grid)[0].to(device), mask.to(device)
    reach = mask * model.amplitude
    total: Tensor = torch.zeros_like(precision)
    for part in index.split(256):
        total += rows.weight(part).sum(0).to(device)

    def slope(energy: Callable[[Tensor, Tensor], Tensor], at: Tensor) -> Tensor:
        """Derivative of ``energy(particles, volume)``, summed over all particles, at a volume."""
        summed = torch.zeros_like(at)
        for part in index.split(batch_of(model, grid)):
            volume = at.clone().requires_grad_()
            summed += torch.autograd.grad(energy(part, volume[None]), volume)[0]
        return summed

    def seen(part: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
        """What the particles show of (1 or b, C, C, C), and half its square in units of the noise."""
        moved = model.bodies.move(volume, found.motion[part].to(device))
        weighted = rows.weight(part).to(device) * band_multiplicity(size, device)
        return moved, 0.5 * (differentiable_band(moved, size).abs().square() * weighted).sum()

    def misfit(part: Tensor, volume: Tensor) -> Tensor:
        change = model.density(found.code[part].to(device)) - model.mean
        moved, square = seen(part, volume + change)
        return square - (moved * rows.numerator(part).to(device)).sum()

    def normal(x: Tensor) -> Tensor:
        image = slope(lambda part, volume: seen(part, volume)[1], reach * x)
        return reach * image + mask * seen_through(mask * x, precision, size)

    def conditioned(x: Tensor) -> Tensor:
        return mask * seen_through(mask * x, 1.0 / (total + precision), size)

    x = torch.where(reach > 1e-3, model.mean / reach.clamp(min=1e-3), 0.0)
    left = -reach * slope(misfit, reach * x) - mask * seen_through(mask * x, precision, size)
    return reach * (x + conjugate_gradients(normal, conditioned, left, None, steps))


def straightened(
    model: BodyModel, numerator: Tensor, weight: Tensor, gain: Tensor, motion: Tensor, code: Tensor, grid: Grid
) -> Tensor:
    """Numerators of particles whose bodies are put back, (b, C, C, C): what they say about a volume that is at rest.

    With T the motion and v = mean + U code the density of a particle: ``T^t (B - g W T v) + g W v``.  Together with W
    they have the likelihood's exact slope at v.  Its value is another one by half of ``<v, W v> - <T v, W T v>``, which
    is the particle's own and the same for every volume; its curvature is W's at rest, not ``T^t W T``.
    numerator (b, C, C, C), weight (b, n): the data, without gains; gain g: (b,); motion: (b, 6 B); code: (b, K).
    """
    size = grid.working_box
    weighted = weight * gain[:, None] * band_multiplicity(size, weight.device)
    still = model.density(code).expand_as(numerator)
    volume = still.clone().requires_grad_()
    moved = model.bodies.move(volume, motion)
    square = (differentiable_band(moved, size).abs().square() * weighted).sum()
    slope = torch.autograd.grad((moved * numerator).sum() - 0.5 * square, volume)[0]
    return slope + model_band_adjoint(weighted * model_band(still, size), size, grid.crop)


def first_covariance(sigma: Tensor) -> Tensor:
    """S to begin with: independent motions; sigma (B, 2): degrees of rotation and voxels of shift per axis."""
    each = torch.stack([sigma[:, 0] * (math.pi / 180.0), sigma[:, 1]], 1).repeat_interleave(3, 1)
    return torch.diag(each.flatten().square())
