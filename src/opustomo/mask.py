"""The verb ``mask``: a soft solvent mask from a map; ``average`` proposes its mask by the same steps.

Owns: how a map becomes a mask (smoothed, thresholded, the largest part, holes filled, grown, soft edge), and what is
told about the result before it decides a run's crop.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from opustomo.analysis import plots
from opustomo.config import MaskConfig
from opustomo.data.inputs import LEAST_MASK
from opustomo.data.mrc import LARGEST, read_volume, write_volume
from opustomo.data.readers.sampling import differ, is_set
from opustomo.errors import UserError
from opustomo.physics.fourier import fourier_resize
from opustomo.physics.grid import crop_size
from opustomo.physics.volume import cosine_edge

log = logging.getLogger("opustomo")

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Recipe:
    """How a map becomes a mask; lengths in voxels.  Of the three thresholds one at most; none: Otsu's."""

    threshold: float | None = None
    sigma: float | None = None
    percentile: float | None = None
    smooth: float = 0.0
    largest: bool = True
    fill: bool = True
    opening: int = 0
    closing: int = 0
    dilate: float = 0.0
    edge: float = 0.0
    radius: float | None = None  # None: the whole box


def automatic(pixel_size: float, size: int) -> Recipe:
    """What ``average`` does on voxels of ``pixel_size`` Angstrom in a box of ``size``."""
    smooth, dilate, edge = max(1.0, 12.0 / pixel_size), max(2.0, 10.0 / pixel_size), max(3.0, 20.0 / pixel_size)
    return Recipe(smooth=smooth, dilate=dilate, edge=edge, radius=0.48 * size)


class Body(NamedTuple):
    """The molecule before it is grown, and how it was found."""

    voxels: Bools  # (z, y, x), all False where nothing is above the threshold
    level: float  # the threshold
    parts: int
    kept: float  # fraction of what is above the threshold


def distances(shape: tuple[int, ...], centre: tuple[float, ...] | None = None) -> NDArray[np.float64]:
    """Distance of every voxel (z, y, x) from ``centre`` (z, y, x; default: voxel N//2)."""
    middle = [n // 2 for n in shape] if centre is None else centre
    return np.sqrt(sum((np.arange(n) - c).reshape([-1 if i == a else 1 for i in range(3)]) ** 2
                       for a, (n, c) in enumerate(zip(shape, middle, strict=True))))  # fmt: skip


def level_of(smooth: NDArray[np.floating], inside: Bools, recipe: Recipe) -> float:
    """The threshold, of the smoothed map; all but the absolute one look inside the sphere alone."""
    values = smooth[inside]
    if recipe.threshold is not None:
        return recipe.threshold
    if recipe.sigma is not None:
        return float(values.mean() + recipe.sigma * values.std())
    if recipe.percentile is not None:
        return float(np.percentile(values, recipe.percentile))
    return float(threshold_otsu(values))


def body_of(volume: NDArray[np.floating], recipe: Recipe) -> Body:
    """What of a map (z, y, x) is molecule."""
    smooth = ndimage.gaussian_filter(volume, recipe.smooth) if recipe.smooth > 0 else volume
    inside = np.ones(volume.shape, bool) if recipe.radius is None else distances(volume.shape) < recipe.radius
    level = level_of(smooth, inside, recipe)
    body = (smooth > level) & inside
    if recipe.opening:
        body = ndimage.binary_opening(body, iterations=recipe.opening)
    if recipe.closing:  # padded: a closing eats from what touches the edge of the box
        wide = np.pad(body, recipe.closing)
        body = ndimage.binary_closing(wide, iterations=recipe.closing)[(slice(recipe.closing, -recipe.closing),) * 3]
    labels, count = ndimage.label(body)
    kept = 1.0
    if recipe.largest and count > 1:
        sizes = ndimage.sum_labels(np.ones_like(labels), labels, np.arange(1, count + 1))
        body, kept = labels == 1 + int(np.argmax(sizes)), float(sizes.max() / sizes.sum())
    return Body(ndimage.binary_fill_holes(body) if recipe.fill else body, level, count, kept)


def grown(body: Bools, dilate: float, edge: float) -> Tensor:
    """Soft mask (z, y, x) of a body: 1 up to ``dilate`` voxels around it (below 0: shrunk), then a cosine edge."""
    distance = ndimage.distance_transform_edt(~body)
    if dilate < 0:
        distance = np.where(body, 1.0 - ndimage.distance_transform_edt(body), distance)
    return cosine_edge(torch.from_numpy(distance).float() - dilate, edge)


def solvent_mask(volume: Tensor, recipe: Recipe) -> Tensor:
    """Soft mask (z, y, x) in [0, 1] of a map; a sphere of the recipe's radius where the map shows nothing."""
    body = body_of(volume.numpy(), recipe)
    if body.parts == 0 and recipe.radius is not None:
        return torch.from_numpy((distances(tuple(volume.shape)) < recipe.radius).astype(np.float32))
    return grown(body.voxels, recipe.dilate, recipe.edge)


def main(config: MaskConfig) -> int:
    """``opustomo mask``.  UserError rather than replace a mask, and for one that no run could use."""
    path = config.output / "mask.mrc"
    if path.exists():
        raise UserError(f"-o {config.output}: holds mask.mrc already; choose another folder")
    data, pixel_size = read_map(config)
    size = len(data)
    recipe = recipe_of(config, pixel_size, size)
    body = body_of(data, recipe)
    if (voxels := int(body.voxels.sum())) < LEAST_MASK:
        raise UserError(
            f"{config.map}: only {voxels} voxels are above {body.level:.4g} ({tell_threshold(config)}) in a map of "
            f"{data.min():.3g} to {data.max():.3g}; lower the threshold, or give --invert if protein is dark"
        )
    mask = grown(body.voxels, recipe.dilate, recipe.edge)
    box = config.box or size
    final = mask if box == size else fourier_resize(mask, box).clamp(0.0, 1.0)
    write_volume(path, final.numpy(), pixel_size * size / box)
    shown = np.stack([data, data * mask.numpy(), mask.numpy() * np.abs(data).max()])
    plots.save(plots.montage(shown, ["map", "masked map", "mask"]), config.output / "mask.png")
    log.info("threshold %.4g (%s): %d voxels kept, %d connected parts found; look at %s before you use %s", body.level,
             tell_threshold(config), voxels, body.parts, config.output / "mask.png", path)  # fmt: skip
    judge(config, final, pixel_size * size / box, body.kept, data)
    return 0


def read_map(config: MaskConfig) -> tuple[NDArray[np.float32], float]:
    """The map (N, N, N), protein bright, and its pixel size in Angstrom; UserError for a map that is none."""
    data, header = read_volume(config.map)
    if len(set(data.shape)) > 1 or len(data) % 2:
        raise UserError(f"{config.map}: (z, y, x) = {data.shape} is not an even cube; give a map, e.g. average.mrc")
    if not (np.abs(data) < LARGEST).all() or data.min() == data.max():
        raise UserError(f"{config.map}: has NaN, infinite or absurdly large voxels, or one grey value; make it again")
    if config.box is not None and (config.box < 4 or config.box % 2):
        raise UserError(f"--box {config.box}: must be an even number of voxels, that of the subtomograms")
    stated = is_set(header, config.angpix)
    if not stated and config.angpix is None:
        raise UserError(f"{config.map}: its header does not state the pixel size; give it with --angpix")
    if config.angpix is not None and (not config.angpix > 0 or (stated and differ(config.angpix, header))):
        raise UserError(f"--angpix {config.angpix:g}: the header of {config.map} says {header:g} A; leave it out")
    return (-data if config.invert else data), header if stated else float(config.angpix or 0.0)


def recipe_of(config: MaskConfig, pixel_size: float, size: int) -> Recipe:
    """The options in voxels; UserError for values that make no sense."""
    thresholds = [name for name in ("threshold", "sigma", "percentile") if getattr(config, name) is not None]
    if len(thresholds) > 1:
        raise UserError(f"--{thresholds[0]} and --{thresholds[1]} are both thresholds; give one")
    if config.percentile is not None and not 0 < config.percentile < 100:
        raise UserError(f"--percentile {config.percentile:g}: must be between 0 and 100")
    given = {name: getattr(config, name) for name in ("smooth", "dilate", "edge", "radius")}
    for name, value in given.items():
        if value is not None and ((value < 0 and name != "dilate") or not abs(value) < size * pixel_size):
            raise UserError(
                f"--{name} {value:g}: must be a length in Angstrom inside the box ({size * pixel_size:g} A)"
            )
    usual = automatic(pixel_size, size)
    lengths = {k: getattr(usual, k) if value is None else value / pixel_size for k, value in given.items()}
    return Recipe(
        config.threshold, config.sigma, config.percentile, largest=config.largest, fill=config.fill, **lengths
    )


def tell_threshold(config: MaskConfig) -> str:
    """The threshold in the words it was given in."""
    for name in ("threshold", "sigma", "percentile"):
        if (value := getattr(config, name)) is not None:
            return f"--{name} {value:g}"
    return "automatic"


def judge(config: MaskConfig, mask: Tensor, pixel_size: float, kept: float, data: NDArray[np.float32]) -> None:
    """Log how large the mask is and what it makes of a run, and warn of what is likely a mistake."""
    size, fraction = len(mask), float(mask.mean())
    inside = torch.nonzero(mask > 1e-3)
    reach = int((inside - size // 2).abs().max())
    away = int((inside.float().mean(0) - size // 2).norm())
    log.info("mask: %.1f %% of the box, reaches %.0f A from its centre; a run crops to %d of %d voxels",
             100 * fraction, reach * pixel_size, crop_size(reach, 4.0, size), size)  # fmt: skip
    if reach >= size // 2 - 1:
        log.warning("the mask touches the edge of the box: raise the threshold, lower --radius, --dilate or --edge, or "
                    "extract a larger box")  # fmt: skip
    if fraction > 0.4:
        log.warning("the mask fills %.0f %% of the box, solvent included: raise the threshold", 100 * fraction)
    if away > size / 8:
        log.warning("the mask's middle is %.0f A from that of the box: is this the molecule?", away * pixel_size)
    if config.largest and kept < 0.7:
        log.warning("%.0f %% of what is above the threshold is in other parts, left out: look at mask.png; "
                    "--no-largest keeps them", 100 * (1 - kept))  # fmt: skip
    centred = data - data.mean()
    if float((centred**3).mean()) < 0:
        log.warning("the map's dark tail is the longer one: if protein is dark, give %s --invert",
                    "the map without" if config.invert else "the map with")  # fmt: skip


def voxel_mask(
    source: Path, output: Path, recipe: Recipe, *, absolute: bool, erode: int, centre: tuple[float, ...] | None
) -> str:
    """Write a mask of a map of any shape (``dsdsh create_mask``); returns a line about it.

    The recipe's ``dilate`` and then ``erode`` are so many dilations and erosions by a voxel, after the largest part and
    the holes; its radius: a sphere about ``centre`` (z, y, x) instead of all that.  absolute: of the map's absolute
    values.  UserError: a map that is none, a mask of nothing.
    """
    data, pixel_size = read_volume(source)
    if recipe.radius is not None:
        mask = cosine_edge(torch.from_numpy(distances(data.shape, centre)).float() - recipe.radius, recipe.edge)
        words = f"sphere of {recipe.radius:g} voxels"
    else:
        if not (np.abs(data) < LARGEST).all() or data.min() == data.max():
            raise UserError(f"{source}: has NaN, infinite or absurdly large voxels, or one grey value; make it again")
        body = body_of(np.abs(data) if absolute else data, recipe)
        voxels = body.voxels
        if recipe.dilate:
            voxels = ndimage.binary_dilation(voxels, iterations=int(recipe.dilate))
        if erode:
            voxels = ndimage.binary_erosion(voxels, iterations=erode)
        mask, words = grown(voxels, 0.0, recipe.edge), f"threshold {body.level:.4g}, {body.parts} connected parts found"
    if float(mask.max()) == 0:
        mend = "move its middle into the box" if recipe.radius else "lower the threshold, or erode and open less"
        raise UserError(f"{source}: the mask is empty ({words}); {mend}")
    write_volume(output, mask.numpy(), pixel_size or 1.0)
    unset = "" if pixel_size else f"; the header of {source} states no pixel size, so the mask has 1 A"
    return f"{words}: {100 * float(mask.mean()):.1f} % of the box written to {output}{unset}"
