"""Which particles make a batch.

Owns: groups of wedge orientation and the order of an epoch; every particle is drawn exactly once per epoch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opustomo.physics.healpix import vector_to_pixel


def wedge_groups(rotation: np.ndarray, batch: int) -> np.ndarray:
    """Group of each particle by the orientation of its beam axis ``A^T z`` up to sign (HEALPix), (P,).

    The finest of nside 1, 2, 4, 8 that leaves at least four batches a group on average.
    """
    axis = torch.from_numpy(rotation[:, 2, :])
    axis = torch.where(axis[:, 2:] < 0, -axis, axis)
    best = np.zeros(len(rotation), np.int64)
    for nside in (1, 2, 4, 8):
        pixel = vector_to_pixel(axis, nside).numpy()
        if len(rotation) / len(np.unique(pixel)) < 4 * batch:
            break
        best = np.unique(pixel, return_inverse=True)[1]
    return best


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
