"""HEALPix: which of ``12 nside^2`` equal-area pixels of the sphere a direction falls into.

Owns: the ring numbering, used to group particles by the orientation of their missing wedge.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def vector_to_pixel(vectors: Tensor, nside: int) -> Tensor:
    """Ring-scheme pixel numbers of directions: (..., 3) vectors (x, y, z) of any length > 0 to (...) int64.

    Source: Gorski et al. 2005, section 5: ascending and descending pixel edges count the ring and the place in it.
    """
    x, y, z = (vectors.double() / vectors.double().norm(dim=-1, keepdim=True)).unbind(-1)
    quadrant = (torch.atan2(y, x) * (2.0 / math.pi)) % 4.0  # longitude in [0, 4)
    first, total = 2 * nside * (nside - 1), 12 * nside * nside

    up = (nside * (0.5 + quadrant - 0.75 * z)).floor().long()
    down = (nside * (0.5 + quadrant + 0.75 * z)).floor().long()
    ring = nside + 1 + up - down  # 1 at z = 2/3, 2 nside + 1 at z = -2/3
    place = torch.div(up + down - nside + 1 + (ring + 1) % 2, 2, rounding_mode="floor") % (4 * nside)
    belt = first + (ring - 1) * 4 * nside + place

    within = quadrant % 1.0
    # nside sqrt(3 (1 - |z|)), written so that it keeps its digits at the poles
    width = nside * torch.hypot(x, y) * torch.sqrt(3.0 / (1.0 + z.abs()))
    ring = (within * width).floor().long() + ((1.0 - within) * width).floor().long() + 1
    ring = ring.clamp(max=nside)
    place = (quadrant * ring).floor().long() % (4 * ring)
    cap = torch.where(z > 0, 2 * ring * (ring - 1), total - 2 * ring * (ring + 1)) + place

    return torch.where(z.abs() <= 2.0 / 3.0, belt, cap)
