"""The stage of rigid bodies: from the linear stage to every particle's motion, and the linear stage again at rest.

Owns: ``--masks``.  First the motions of one density are found, then what changes besides is looked for in particles
whose bodies are put back, then both together; what comes after (mixture, network, codes) sees the bodies at rest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from opustomo.bodies import (
    DOF,
    BodyModel,
    BodyResult,
    Motions,
    at_rest,
    find_motions,
    first_covariance,
    refit,
    with_joints,
)
from opustomo.body_division import divide
from opustomo.body_rows import StraightRows, refuse_without_room, straight_rows
from opustomo.data.atomic import write_csv
from opustomo.data.bodies import BodyMasks, auto_count, mask_files, parts_of, read_bodies
from opustomo.data.mrc import write_volume
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.linear_fit import LinearResult, Plan, fit_linear
from opustomo.monitor import progress
from opustomo.motion_covariance import Told
from opustomo.physics.bodies import soft_bodies
from opustomo.physics.fourier import fourier_resize
from opustomo.physics.grid import Grid
from opustomo.physics.volume import centre_pad
from opustomo.reconstruct import AtGain, Rows

log = logging.getLogger("opustomo")

SOFT = 8.0, 0.75  # Angstrom, but at least so many voxels: the softness of a body's edge
SAMPLE = 4096  # particles that are enough to learn how a set moves
ROUNDS, MORE = 4, 1  # of EM before anything else is allowed to change, and after it
LEARNED = 3  # rounds more of both where the division is learned
FIRST_STEPS, STEPS, LAST_STEPS, MEAN_STEPS = 4, 1, 4, 3


def bodies_of(asked: str, grid: Grid, dimensions: int) -> BodyMasks | int:
    """What ``--masks`` asks for, or into how many parts the density is to be divided once it is known.

    Raises UserError where it cannot be had, or has fewer motions than the conformation code dimensions.
    """
    found: BodyMasks | int | None = auto_count(asked)
    if found is None:
        found = read_bodies(mask_files(asked), grid)
    count = found if isinstance(found, int) else len(found.names)
    if dimensions > DOF * (count - 1):
        raise UserError(
            f"--zaffinedim {dimensions}: {count} bodies move against each other in {DOF * (count - 1)} ways at most"
        )
    return found


def fit_bodies(
    asked: BodyMasks | int, particles: Particles, rows: Rows, linear: LinearResult, plan: Plan, grid: Grid,
    mask: Tensor, folder: Path | None, dimensions: int, device: torch.device,
) -> tuple[BodyResult, StraightRows, LinearResult]:  # fmt: skip
    """Motions of all particles, rows with the bodies at rest, and the linear stage of these.

    rows, linear, plan: of the linear stage without bodies; mask (C, C, C); folder: for files that take time to make
    (None: they stay in memory); dimensions: of the conformation code.  Raises UserError where there is no room for
    them, or no density to move.
    """
    refuse_without_room(folder, len(rows), grid)
    density = linear.model.mean
    if not (density * mask > 0).any():
        raise UserError("--masks: the average has no positive density in the mask; look at it (opustomo average)")
    masks = parts_of(density, mask, asked, plan.seed, grid) if isinstance(asked, int) else asked
    usual = linear.typical
    train, held = plan.train[usual[plan.train]], plan.held[usual[plan.held]]
    some = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(plan.seed))[:SAMPLE].sort().values]
    others, gain = _not_in(some, len(rows)), linear.posterior.gain
    width = max(SOFT[0] / grid.working_pixel, SOFT[1])
    bodies = with_joints(soft_bodies(masks.distance, width), density * mask, masks.relative)
    first = first_covariance(masks.sigma)
    start = BodyModel(bodies, linear.model.mean, linear.model.components[:0], first, linear.model.mean_power,
                      linear.model.places[0])  # fmt: skip
    model, scaled = start.to(device), AtGain(rows, gain)
    found = at_rest(len(rows), model, dimensions)
    at_poses = replace(plan, train=train, held=held, estpose=False)

    def settle(model: BodyModel, found: Motions, rounds: int, what: str) -> tuple[BodyModel, Motions]:
        for number in range(rounds):
            steps = FIRST_STEPS if not found.motion[some].any() else STEPS
            told: list[Told] = []
            bar = _bar(f"{what}, round {number + 1}")
            found = find_motions(model, scaled, some, grid, found, steps, bar, told.append)
            log.info("%s, round %d of %d: %.2f nats per particle; %s", what, number + 1, rounds,
                     float(found.evidence[some].mean()), _moving(model, grid, dimensions))  # fmt: skip
            if isinstance(asked, int):
                model = divide(model, scaled, some, grid, found, _bar(f"{what}, division {number + 1}"))
            model = refit(model, scaled, some, grid, mask, found, Told.joined(told), first, MEAN_STEPS)
        return model, found

    def rest(model: BodyModel, found: Motions) -> tuple[BodyResult, StraightRows, LinearResult]:
        found = find_motions(model, scaled, others, grid, found, LAST_STEPS, _bar("motions of the others"))
        found = find_motions(model, scaled, some, grid, found, STEPS, _bar("motions once more"))
        result = BodyResult(masks.names, model.to(torch.device("cpu")), found, found.motion, gain, dimensions)
        result = set_free(result, rows, grid, device)
        straight = straight_rows(folder, result, rows, grid, device)
        straight.hold()
        return result, straight, fit_linear(particles, lambda _: straight, grid, mask, at_poses)[2]

    learned = LEARNED if isinstance(asked, int) else 0
    model, found = settle(model, found, ROUNDS + learned, "bodies")
    result, straight, changes = rest(model, found)
    del straight  # its file, which the next one replaces, and its memory
    model = model.with_linear(changes.model).to(device)
    found = replace(result.motions, code=changes.posterior.code)
    model, found = settle(model, found, MORE + learned, "bodies and components")
    result, straight, last = rest(model, found)
    _judge(result, linear, train, held)
    return result, straight, with_common(last, result)


def find_in_bodies(
    known: BodyResult, rows: Rows, gain: Tensor, grid: Grid, folder: Path | None, device: torch.device
) -> tuple[BodyResult, StraightRows]:
    """Motions of other particles in bodies that are held, and their rows with these at rest; gain (P,)."""
    model, everyone = known.model.to(device), torch.arange(len(rows))
    found = at_rest(len(rows), model, known.dimensions)
    scaled, steps = AtGain(rows, gain), FIRST_STEPS + LAST_STEPS
    found = find_motions(model, scaled, everyone, grid, found, steps, _bar("motions"))
    result = set_free(replace(known, motions=found, gain=gain), rows, grid, device)
    return result, straight_rows(folder, result, rows, grid, device)


def set_free(result: BodyResult, rows: Rows, grid: Grid, device: torch.device) -> BodyResult:
    """The result with ``free``: its motions, but what bodies do against each other under the prior that hardly holds
    it; rows: of its particles."""
    model, everyone = result.model.freed().to(device), torch.arange(len(rows))
    wide = find_motions(
        model, AtGain(rows, result.gain), everyone, grid, result.motions, STEPS, _bar("motions set free")
    )
    motion = result.motions.motion
    return replace(result, free=motion + result.model.inner(wide.motion - motion))


def _not_in(index: Tensor, count: int) -> Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[index] = False
    return torch.nonzero(keep)[:, 0]


def with_common(linear: LinearResult, result: BodyResult) -> LinearResult:
    """The pose errors of a linear stage at rest, with what all bodies did together."""
    return replace(linear, pose_error=linear.pose_error + result.common)


def _bar(what: str) -> Callable[[Iterable[Tensor], int], Iterable[Tensor]]:
    return lambda parts, total: progress(parts, total, what, size=len)


def _moving(model: BodyModel, grid: Grid, dimensions: int) -> str:
    sizes = model.modes(dimensions)[1] * grid.working_pixel
    return "root mean square displacements " + ", ".join(f"{float(size):.2f}" for size in sizes) + " A"


def _judge(result: BodyResult, linear: LinearResult, train: Tensor, held: Tensor) -> None:
    """Whether the bodies earn their place, in words."""
    judged, who = (held, "held-out particles") if len(held) else (train, "the particles, none held out,")
    before, after = float(linear.codes.evidence[judged].mean()), float(result.motions.evidence[judged].mean())
    said = f"bodies: evidence of {who} %.2f nats, linear stage without them %.2f (%+.2f)"
    if after > before:
        log.info(said, after, before, after - before)
    else:
        log.warning(said + "; these bodies do not explain the data better: leave --masks out, or give others",
                    after, before, after - before)  # fmt: skip


def write_bodies(folder: Path, result: BodyResult, mask: Tensor, grid: Grid) -> None:
    """motions.csv, and what belongs to every body as NAME.mrc in the box of the subtomograms.

    Per particle the conformation code with its standard deviation, and what every body does: rotation vectors in
    degrees about the body's joint and shifts in Angstrom, axes of the consensus frame; without what all bodies do
    together, which is in the poses.
    """
    inner = result.model.inner(result.motions.motion).unflatten(1, (-1, DOF))
    unit = torch.tensor([180.0 / math.pi] * 3 + [grid.working_pixel] * 3)
    numbers = torch.cat([*result.conformation, (inner * unit).flatten(1)], 1)
    names = [f"{what}{j + 1}" for what in ("y", "sd") for j in range(result.dimensions)]
    names += [f"{body}_{what}" for body in result.names for what in ("rx", "ry", "rz", "x", "y", "z")]
    lines = ([i, *(f"{value:.5g}" for value in row)] for i, row in enumerate(numbers.tolist(), 1))
    write_csv(folder / "motions.csv", ["row", *names], lines)
    for body, weight in zip(result.names, result.model.bodies.weights, strict=True):
        own = fourier_resize(centre_pad(weight * mask, grid.working_box), grid.box).clamp(0.0, 1.0)
        write_volume(folder / f"{body}.mrc", own.numpy(), grid.pixel_size)
