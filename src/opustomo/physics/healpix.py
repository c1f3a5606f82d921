"""HEALPix pixel numbers of directions, ring scheme.  Source: Gorski et al. 2005, section 4."""

from __future__ import annotations

import torch
from torch import Tensor


def vector_to_pixel(vectors: Tensor, nside: int) -> Tensor:
    """Directions (..., 3), any length, to pixel numbers 0 .. 12 nside^2 - 1 (int64)."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    z, phi = unit[..., 2], torch.atan2(unit[..., 1], unit[..., 0])
    quarter = torch.remainder(phi / (torch.pi / 2), 4.0)
    # equatorial belt
    rise, fall = nside * (0.5 + quarter - 0.75 * z), nside * (0.5 + quarter + 0.75 * z)
    up, down = rise.floor().long(), fall.floor().long()
    ring = nside + 1 + up - down
    shift = 1 - ring % 2
    inside = torch.remainder((up + down - nside + shift + 1).div(2, rounding_mode="floor"), 4 * nside)
    belt = 2 * nside * (nside - 1) + (ring - 1) * 4 * nside + inside
    # polar caps
    fraction = quarter - quarter.floor()
    size = nside * torch.sqrt((3.0 * (1.0 - z.abs())).clamp(min=0.0))
    left, right = (fraction * size).floor().long(), ((1.0 - fraction) * size).floor().long()
    cap_ring = left + right + 1
    cap_index = torch.remainder((quarter * cap_ring).floor().long(), 4 * cap_ring)
    north = 2 * cap_ring * (cap_ring - 1) + cap_index
    south = 12 * nside * nside - 2 * cap_ring * (cap_ring + 1) + cap_index
    return torch.where(z.abs() <= 2.0 / 3.0, belt, torch.where(z > 0, north, south))
