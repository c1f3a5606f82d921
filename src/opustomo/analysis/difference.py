"""What differs between two classes, voxel by voxel, and what of it the noise of the data cannot explain.

Owns: the difference map of two sets of particles, its null distribution by permutation, and the mask of significant
voxels.  No decoder is involved.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, t
from torch import Tensor

from opustomo.analysis import plots
from opustomo.analysis.made_from import open_rows
from opustomo.analysis.surface import FRONT, SIDE, contour, render
from opustomo.data.atomic import write_csv
from opustomo.data.mrc import write_volume
from opustomo.errors import UserError
from opustomo.monitor import progress
from opustomo.physics.grid import Grid
from opustomo.physics.observation import band_volume, model_band
from opustomo.reconstruct import Rows, mean_volume, own_precision, solve_masked, totals

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
PERMUTATIONS = 100
FEWEST = 8  # particles of a class: of fewer there are hardly any permutations
DIFFERENT = 0.05  # of the average's power: the prior of a difference, which only smooths
INSIDE = 0.5  # of the mask: voxels that are judged
STEPS = 12  # of the solver


@dataclass(frozen=True)
class Difference:
    """Maps (C, C, C) of A minus B on the working grid."""

    density: NDArray[np.float32]  # shrunk towards no difference where there is little data
    z: NDArray[np.float32]  # in standard deviations of the null distribution, 0 outside the mask
    significant: NDArray[np.bool_]  # at the false discovery rate asked for
    largest: float  # |z| of the map
    largest_null: Floats  # (R,) the same of every permutation
    voxels: int  # judged

    @property
    def p_value(self) -> float:
        """Of no difference anywhere: how often a permutation has as large a maximum; exact, at least 1 / (R + 1)."""
        return float((1 + (self.largest_null >= self.largest).sum()) / (1 + len(self.largest_null)))


def difference(
    rows: Rows,
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    mask: Tensor,
    grid: Grid,
    false_rate: float = 0.05,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Difference:
    """The masked difference map of two disjoint sets of particles and its significance.

    first, second: (P,) members; mask: (C, C, C).  With a = n_A / (n_A + n_B) and V the average of both, the right side
    of the solve is ``(1 - a) sum_A (B - W V) - a sum_B (B - W V)`` and its system ``(1 - a)^2 W_A + a^2 W_B``: where
    all particles are alike its expectation is zero, whatever V and its prior are, else the system times A - B.

    Null distribution: the same from the same particles with A and B dealt out anew.  Its standard deviation at each
    voxel is theirs, its tails are those of Student's t with as many degrees of freedom.  The mask of significant
    voxels is controlled by Benjamini and Yekutieli's procedure, which holds for any dependence between voxels.
    """
    members = np.flatnonzero(first | second)
    share = float(first.sum()) / len(members)
    own = np.where(first[members], 1 - share, -share)
    rng = np.random.default_rng(seed)
    signs = np.stack([own, *(rng.permutation(own) for _ in range(permutations))])
    plain = np.stack([np.ones(len(members)), own**2])
    weights, numerators = totals(
        rows, torch.from_numpy(members), torch.from_numpy(np.concatenate([plain, signs])).float(), grid
    )
    average, power = mean_volume(weights[0], numerators[0], mask, grid)
    band = model_band(average, grid.working_box)
    system, precision = weights[1][:, None, None], own_precision(DIFFERENT * power, grid)
    inside, density = mask.numpy() > INSIDE, np.zeros(0, np.float32)
    solved: list[NDArray[np.float32]] = []
    pairs = zip(weights[2:], numerators[2:], strict=True)
    for weight, numerator in progress(pairs, len(signs), "difference and permutations", "maps"):
        seen = band_volume(weight * band, grid.working_box, grid.crop)
        right = (numerator - seen)[None]
        volume = solve_masked(system, right, precision, mask, grid, torch.zeros_like(right), STEPS)[0].numpy()
        density = density if solved else volume
        solved.append(volume[inside])  # the rest would take most of the memory
    z, found = judged(np.stack(solved).astype(np.float64), false_rate)
    score, significant = np.zeros(inside.shape, np.float32), np.zeros(inside.shape, bool)
    score[inside], significant[inside] = z[0], found
    largest = np.abs(z).max(1)
    return Difference(density.astype(np.float32), score, significant, float(largest[0]), largest[1:], len(found))


def judged(maps: Floats, false_rate: float) -> tuple[Floats, NDArray[np.bool_]]:
    """z scores (1 + R, voxels) of a map and of its R permutations, and the voxels where that of the map is significant.

    Each is in standard deviations of all the others, the permutations alike: their maxima are exchangeable.
    """
    permutations, square = len(maps) - 1, np.square(maps)
    z = maps / np.sqrt(np.maximum(square.sum(0) - square, 1e-30) / permutations)
    chance = 2 * t.sf(np.abs(z[0]), permutations)
    return z, false_discovery_control(chance, method="by") <= false_rate


def write_difference(
    run: Run, labels: NDArray[np.integer], classes: tuple[int, ...], folder: Path, false_rate: float, seed: int = 0
) -> Difference:
    """Write differenceA-B.mrc, _z.mrc, _mask.mrc, .png and .csv of two classes of ``labels`` (P,) into ``folder``.

    UserError: not two different classes, one with fewer than 8 particles, a rate outside (0, 1), no cache.
    """
    if len(classes) != 2 or classes[0] == classes[1]:
        raise UserError(f"--difference {' '.join(map(str, classes))}: give two different classes")
    if not 0 < false_rate < 1:
        raise UserError(f"--false-rate {false_rate:g}: give a rate between 0 and 1, e.g. 0.05")
    sides = [(labels == number) & run.typical for number in classes]
    for number, side in zip(classes, sides, strict=True):
        if side.sum() < FEWEST:
            raise UserError(f"--difference: class {number} has {int(side.sum())} particles (classes are 0 to "
                            f"{int(labels.max())}); {FEWEST} are needed")  # fmt: skip
    grid, name = run.grid, f"difference{classes[0]}-{classes[1]}"
    found = difference(open_rows(run), sides[0], sides[1], run.mask, grid, false_rate, seed=seed)
    place = (grid.working_pixel, grid.start(grid.working_pixel, grid.crop))
    for kind, values in (("", found.density), ("_z", found.z), ("_mask", found.significant.astype(np.float32))):
        write_volume(folder / f"{name}{kind}.mrc", values, *place)
    row = {
        "class_a": classes[0], "class_b": classes[1], "particles_a": int(sides[0].sum()),
        "particles_b": int(sides[1].sum()), "voxels": found.voxels, "false_rate": f"{false_rate:g}",
        "significant": int(found.significant.sum()), "largest_z": f"{found.largest:.2f}",
        "largest_z_null": f"{float(np.quantile(found.largest_null, 0.95)):.2f}", "p_value": f"{found.p_value:.4f}",
    }  # fmt: skip
    write_csv(folder / f"{name}.csv", list(row), [list(row.values())])
    plots.save(picture(found, name), folder / f"{name}.png")
    log.info("%s minus %s: %d of %d voxels differ (false discovery rate %g); largest |z| %.1f, p %.2g of no difference",
             *classes, found.significant.sum(), found.voxels, false_rate, found.largest, found.p_value)  # fmt: skip
    log.info("classes that were made from these very data differ by their noise too: see distinct in quality.csv")
    return found


def picture(found: Difference, title: str) -> Figure:
    """Slices of z through the middle of what is significant, outlined, and surfaces: more (purple), less (orange)."""
    fig = Figure(figsize=(9.0, 3.2), layout="constrained")
    reach = max(4.0, 0.8 * found.largest)
    score = np.abs(found.z) * (found.significant if found.significant.any() else 1)
    middle = np.unravel_index(int(score.argmax()), score.shape)
    for number, (axis, names) in enumerate((("z", "xy"), ("y", "xz"), ("x", "yz")), 1):
        axes = plots.panel(fig, f"z scores, {axis} = {middle[number - 1]}", names[0], names[1], (1, 4, number))
        image = axes.imshow(found.z.take(middle[number - 1], number - 1), cmap="PuOr", vmin=-reach, vmax=reach,
                            origin="lower")  # fmt: skip
        part = found.significant.take(middle[number - 1], number - 1)
        if part.any() and not part.all():
            axes.contour(part, levels=[0.5], colors=plots.INK, linewidths=0.8)
        axes.grid(False)
    fig.colorbar(image, ax=fig.axes, location="bottom", shrink=0.4, label="standard deviations of noise")
    axes = plots.panel(fig, title, place=(1, 4, 4))
    axes.set_axis_off()
    if not found.significant.any():
        axes.set_title(f"{title}: nothing significant", fontsize=8, color=plots.INK, loc="left")
        return fig
    shown = found.significant * np.abs(found.density)
    level = float(np.quantile(shown[shown > 0], 0.1))
    reach = contour(shown[None].astype(np.float32))[1]
    purple, orange = (tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in ("#5e3c99", plots.ORANGE))
    rows = []
    for view in (FRONT, SIDE):
        layers = [render(sign * found.significant * found.density, level, reach, colour, view, 200)  # type: ignore[arg-type]
                  for sign, colour in ((1, purple), (-1, orange))]  # fmt: skip
        alpha = [layer[..., 3:] for layer in layers]
        total = np.maximum(alpha[0] + alpha[1], 1e-6)
        mixed = (layers[0][..., :3] * alpha[0] + layers[1][..., :3] * alpha[1]) / total
        rows.append(np.concatenate([mixed, np.minimum(total, 1)], axis=-1))
    axes.imshow(np.concatenate(rows))
    return fig
