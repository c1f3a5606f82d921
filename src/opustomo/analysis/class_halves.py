"""How far the halves of a class agree, without any template: half maps, difference maps and their controls.

Owns: what is compared with what.  Every subset of the particles, a class or a control, is treated the same way: two
disjoint halves, a masked solve of each by itself, FSC with noise substituted, and the difference from the average of
the same half.  Nothing here reads or writes files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opustomo.data.particles import particle_numbers, turn_of_each
from opustomo.physics.fourier import band_multiplicity, radial, shell_mean
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band, quadratic_form, seen_through
from opustomo.physics.volume import (
    fourier_shell_correlation,
    randomise_phases,
    shell_counts,
    substituted_fsc,
)
from opustomo.reconstruct import Rows, mean_volume, own_precision, solve_masked, totals, wiener

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
MEMORY = 2e9  # bytes of sums held at a time; more subsets than fit need another pass over the rows
FEWEST = 4  # particles of a class that can be halved, copies of one (``expand``) counted once
LIMIT = 0.8  # of the FSC without a mask: the noise is substituted where it falls below


@dataclass(frozen=True)
class Sums:
    """Rows of a subset summed in its two halves: weight (2, n) and numerator (2, C, C, C) of ``count`` particles."""

    weight: Tensor
    numerator: Tensor
    count: int


@dataclass(frozen=True)
class Agreement:
    """What the two halves of a subset say about each other; arrays are per shell of the crop, (C//2+1,)."""

    fsc: Floats  # of the half maps, corrected for the mask
    difference_fsc: Floats  # of the two difference maps, subset minus the average of the same half
    correlation: float  # of the two difference maps over all frequencies
    nats: float  # per particle: what the other half's difference map adds to the average's log-likelihood
    nats_error: float  # its standard error from the noise of the data


def deal(labels: NDArray[np.integer], particle: NDArray[np.int64], rng: np.random.Generator) -> Bools:
    """(P,) which half each row is in: the particles of every class are dealt out evenly, at random.

    particle: (P,) which one each row is of (``particle_numbers``); its copies share their noise, and so their half.
    """
    half, dealt = np.zeros((2, int(particle.max(initial=-1)) + 1), bool)
    for label in np.unique(labels):
        members = np.unique(particle[labels == label])
        new, known = rng.permutation(members[~dealt[members]]), half[members[dealt[members]]]
        lead = 2 * int(known.sum()) - len(known)  # of the second half, by copies in the classes before
        half[new[: abs(lead)]] = lead < 0
        half[new[abs(lead) :][int(label) % 2 :: 2]] = True  # odd ones do not all go to the same half
        dealt[new] = True
    return half[particle]


def draw(copies: NDArray[np.int64], half: Bools, particle: NDArray[np.int64], order: NDArray[np.integer]) -> Bools:
    """(P,) rows of random particles, of the halves in turn: ``copies[i]`` (or what there is) of the i-th.

    order: row numbers, the earlier the sooner taken.
    """
    chosen = np.zeros(len(half), bool)
    for side, wanted in ((False, copies[0::2]), (True, copies[1::2])):
        rows = order[half[order] == side]
        number = particle_numbers(particle[rows])
        most = np.zeros(int(number.max(initial=-1)) + 1, np.int64)
        most[: len(wanted)] = wanted[: len(most)]
        chosen[rows[turn_of_each(number) < most[number]]] = True
    return chosen


def half_sums(rows: Rows, subsets: list[Bools], half: Bools, grid: Grid) -> Iterator[Sums]:
    """Sums of every subset (P,) in the two halves; as few passes over the rows as the memory allows."""
    at_once = max(1, int(MEMORY / (8 * (grid.crop**3 + grid.working_box**3 / 2))))
    for start in range(0, len(subsets), at_once):
        part = subsets[start : start + at_once]
        share = torch.from_numpy(np.stack([subset & side for subset in part for side in (~half, half)])).float()
        index = torch.nonzero(share.amax(0) > 0)[:, 0]
        weight, numerator = totals(rows, index, share[:, index], grid)
        for i, subset in enumerate(part):
            yield Sums(weight[2 * i : 2 * i + 2], numerator[2 * i : 2 * i + 2], int(subset.sum()))


def averages(sums: Sums, mask: Tensor, grid: Grid) -> Tensor:
    """Masked average of each half, (2, C, C, C): what differences are taken from."""
    return torch.stack([mean_volume(w, b, mask, grid)[0] for w, b in zip(sums.weight, sums.numerator, strict=True)])


def half_map_fsc(sums: Sums, mask: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """FSC (C//2+1,) of the masked half maps, corrected for the mask.

    The mask is part of the solve, so noise is substituted in the *numerators*: beyond the shell where the maps without
    a mask agree to less than ``LIMIT``, their phases become random, and the same solves with the same priors tell how
    much of the FSC the mask makes out of the shells that were kept.
    """
    pairs = list(zip(sums.weight, sums.numerator, strict=True))
    solved = [mean_volume(w, b, mask, grid) for w, b in pairs]
    total = fourier_shell_correlation(solved[0][0], solved[1][0])
    plain = fourier_shell_correlation(*(_without_mask(w, b, grid) for w, b in pairs))
    below = torch.nonzero(plain[1:] < LIMIT)
    first = 1 + int(below[0]) if len(below) else len(plain)
    if first in (1, len(plain)):
        return total  # nothing is kept that could reach beyond, or nothing lies beyond
    noise = [
        solve_masked(
            w[:, None, None], randomise_phases(b, first, generator)[None], own_precision(power, grid), mask, grid,
            torch.zeros_like(b)[None], 12,
        )[0]
        for (w, b), (_, power) in zip(pairs, solved, strict=True)
    ]  # fmt: skip
    return substituted_fsc(total, fourier_shell_correlation(noise[0], noise[1]), first)


def _without_mask(weight: Tensor, numerator: Tensor, grid: Grid) -> Tensor:
    """Numerator over weight with a light regularisation, (C, C, C): a half map that knows no mask."""
    size = grid.working_box
    return wiener(numerator, weight, size, radial(0.02 * shell_mean(weight, size), size).clamp(min=1e-12))


def agreement(sums: Sums, average: Tensor, mask: Tensor, grid: Grid, generator: torch.Generator) -> Agreement:
    """Half maps and difference maps of one subset, and how far they agree; average: (2, C, C, C) from ``averages``.

    A difference map is the masked solve of what the average of the same half leaves of the subset's numerator.  That is
    a constant times the difference from the rest, but shrinks towards no difference where there is little data.
    """
    size = grid.working_box
    halves = list(zip(sums.weight, sums.numerator, average, strict=True))
    # no posterior variance in the prior: it would keep the noise of shells without a difference
    maps = [mean_volume(w, _residual(w, b, a, grid), mask, grid, variance=0.0)[0] for w, b, a in halves]
    bands = [model_band(volume, size) for volume in maps]
    gain, energy = 0.0, 0.0
    for h, other in ((0, 1), (1, 0)):  # a half is explained by what the other half has seen
        residual = _residual(sums.weight[h], sums.numerator[h], average[other], grid)
        quadratic = float(quadratic_form(bands[other], sums.weight[h], size))
        gain += float((maps[other] * residual).sum()) - 0.5 * quadratic
        energy += quadratic
    unit = torch.ones_like(sums.weight[0])
    power = [float(quadratic_form(band, unit, size)) for band in bands]
    cross = float(((bands[0].conj() * bands[1]).real * band_multiplicity(size)).sum())
    return Agreement(
        fsc=half_map_fsc(sums, mask, grid, generator).double().numpy(),
        difference_fsc=fourier_shell_correlation(maps[0], maps[1]).double().numpy(),
        correlation=cross / max((power[0] * power[1]) ** 0.5, 1e-30),
        nats=gain / sums.count,
        nats_error=energy**0.5 / sums.count,
    )


def _residual(weight: Tensor, numerator: Tensor, volume: Tensor, grid: Grid) -> Tensor:
    """``B - W V``, (C, C, C)."""
    return numerator - seen_through(volume, weight, grid.working_box)


def independent_voxels(mask: Tensor) -> Floats:
    """(C//2+1,) independent numbers in each shell of a masked map: its voxels times the mask's share of the crop."""
    square = mask.double().square()
    share = float(square.sum() ** 2 / square.square().sum()) / mask.numel()
    counts = shell_counts(mask.shape[-1]).double().numpy()
    counts[0] = 0.0  # the mean is not determined by the data
    return np.asarray(counts * min(share, 1.0))
