"""Which particles make a batch.

Owns: groups of wedge orientation and the order of an epoch; every particle is drawn exactly once per epoch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opustomo.physics.healpix import vector_to_pixel

BANK_CLASSES, BANK_CODES = 8, 12_800
# HEALPix nside of the beam axis and bins of the tilt axis around it, ever finer
LEVELS = ((1, 1), (1, 3), (2, 3), (2, 6), (4, 6), (4, 12), (8, 12), (8, 24))


def wedge_groups(rotation: np.ndarray, batch: int) -> np.ndarray:
    """Group of each particle by the orientation of its missing wedge in the consensus frame, (P,).

    The beam axis ``A^T z`` (HEALPix) and the tilt axis ``A^T y`` around it, both up to sign, since a wedge is the same
    seen from either side: the finest of ``LEVELS`` that leaves at least four batches a group on average.
    """
    beam, tilt = rotation[:, 2, :], rotation[:, 1, :]
    beam = np.where(beam[:, 2:] < 0, -beam, beam)
    # angle of the tilt axis about the beam, from the horizontal direction; at the pole from x
    level = np.cross([0.0, 0.0, 1.0], beam)
    level = np.where(np.linalg.norm(level, axis=1, keepdims=True) < 1e-6, [1.0, 0.0, 0.0], level)
    upward = np.cross(beam, level)
    angle = np.arctan2((tilt * upward).sum(1), (tilt * level).sum(1)) % np.pi
    best = np.zeros(len(rotation), np.int64)
    for nside, bins in LEVELS:
        pixel = vector_to_pixel(torch.from_numpy(beam), nside).numpy()
        group = pixel * bins + np.minimum((angle * (bins / np.pi)).astype(np.int64), bins - 1)
        if len(rotation) / len(np.unique(group)) < 4 * batch:
            break
        best = np.unique(group, return_inverse=True)[1]
    return best


def bank_rows(index: Tensor, group: np.ndarray, batch: Tensor, generator: torch.Generator) -> Tensor:
    """Rows whose codes a batch is compared with (--lamb): those of 8 other orientations, in random order.

    At most 12,800 of the particles ``index``; none where there is no other orientation.
    """
    members = group[index.numpy()]
    others = np.setdiff1d(members, group[batch.numpy()])
    chosen = others[torch.randperm(len(others), generator=generator)[:BANK_CLASSES].numpy()]
    rows = index[torch.from_numpy(np.isin(members, chosen))]
    return rows[torch.randperm(len(rows), generator=generator)[:BANK_CODES]]


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
