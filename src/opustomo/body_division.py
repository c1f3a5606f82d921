"""Which part of the density moves with which body, where nobody has said so (``--masks auto:N``).

Owns: the M-step for the weights of the bodies.  A first division by place alone puts their borders anywhere; what is on
the wrong side then moves wrongly, and the components of composition take it up.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from opustomo.bodies import DOF, Bar, Bodies, BodyModel, Motions, batch_of, metric_of
from opustomo.objective import differentiable_band
from opustomo.physics.bodies import move_bodies
from opustomo.physics.fourier import band_multiplicity
from opustomo.physics.grid import Grid
from opustomo.reconstruct import Rows

KNOTS = 4.0  # voxels between the points at which a change is told: borders are smooth
STEPS, PACE = 16, 0.1  # of a pass; of Adam, in logits: a pass moves a border by a voxel or two
UNSURE = 0.02  # no voxel is so sure of its body that data could not change it


def divide(model: BodyModel, rows: Rows, index: Tensor, grid: Grid, found: Motions, bar: Bar) -> BodyModel:
    """The model with weights that explain the particles at ``index`` better: one pass of Adam over their likelihood.

    Joints and motions stay; rows: gains are in.
    """
    device, size, bodies = model.mean.device, grid.working_box, model.bodies
    start = bodies.weights.clamp(min=UNSURE / (len(bodies) - 1)).log()
    knots = max(4, round(grid.crop / KNOTS))
    change = torch.zeros(len(bodies), 1, knots, knots, knots, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([change], PACE)

    def weights() -> Tensor:
        smooth = functional.interpolate(change, start.shape[1:], mode="trilinear", align_corners=True)[:, 0]
        return torch.softmax(start + smooth, 0)

    order = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(len(index)))]
    for part in bar(order.chunk(STEPS), len(order)):
        optimiser.zero_grad()
        for piece in part.split(batch_of(model, grid)):
            numerator = rows.numerator(piece).to(device)
            weight = rows.weight(piece).to(device) * band_multiplicity(size, device)
            volume = model.density(found.code[piece].to(device))
            motion = found.motion[piece].to(device).unflatten(1, (-1, DOF))
            moved = move_bodies(volume, weights(), bodies.joints, motion)
            square = (differentiable_band(moved, size).abs().square() * weight).sum()
            ((0.5 * square - (moved * numerator).sum()) / len(part)).backward()
        optimiser.step()
    divided = weights().detach()
    return replace(
        model, bodies=Bodies(divided, bodies.joints, metric_of(divided, bodies.joints, model.mean.clamp(min=0)))
    )
