"""Which particles are trained on and which are held out.

Owns: the permutation of the rows in ``split.pkl``, whose first part trains, and that copies of a particle (``expand``)
stay together: they share its noise, so that one which is trained on tells nothing about one which is held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from opustomo.data.particles import particle_numbers

Rows = NDArray[np.int64]


def make_split(names: NDArray[np.object_], seed: int) -> Rows:
    """A permutation of the rows of particles ``names``, copies one after another; its first part trains."""
    number = particle_numbers(names)
    place = np.argsort(np.random.default_rng(seed).permutation(int(number.max(initial=-1)) + 1))
    return np.argsort(place[number], kind="stable").astype(np.int64)


def split_rows(order: Rows, valfrac: float, names: Iterable[object] | None = None) -> tuple[Rows, Rows]:
    """Rows for training and validation: the first (1 - valfrac) of the permutation train, at least one.

    names: of the particle of every row; copies that stand together in ``order`` are then not parted, so a few rows more
    are held out (or none, where there is one particle).
    """
    count = max(1, math.ceil(len(order) * (1.0 - valfrac)))
    if names is not None:
        number = particle_numbers(names)[order]
        begins = np.flatnonzero(np.diff(number, prepend=-1, append=-1))  # of each particle, and the end
        count = int(begins[max(1, int(np.searchsorted(begins, count, "right")) - 1)])
    return order[:count], order[count:]


def parted(names: NDArray[np.object_], train: Rows, held: Rows) -> int:
    """How many particles have copies on both sides: none in a split of ``make_split``."""
    return len(set(names[train]) & set(names[held]))
