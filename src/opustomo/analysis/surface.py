"""Iso-surface pictures of small density maps: a depth renderer in numpy, no graphics stack needed.

Owns: the common contour level and frame of a set of maps, and the shaded view of one map from one direction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

Image = NDArray[np.float32]  # (h, w, 3) or (h, w, 4), values 0..1
LIGHT = np.array([-0.65, -0.5, -0.57])  # unit vector towards the lamp: (depth, row, column), from the upper left
FRONT: NDArray[np.float64] = np.eye(3)  # the viewer looks along -z: x to the right, y up
SIDE: NDArray[np.float64] = np.array([[0, 0, -1.0], [0, 1, 0], [1, 0, 0]])  # a quarter turn about y: z to the left
DEPTHS_PER_VOXEL = 2.0


def contour(volumes: NDArray[np.float32], weights: NDArray[np.integer] | None = None) -> tuple[float, float]:
    """One (level, reach) for all ``volumes`` (n, C, C, C), so that their surfaces can be compared.

    level: Otsu's threshold of the positive densities of the mean map (the zeros outside the mask say nothing
    about it); of the weighted mean with ``weights`` (n,).  reach: distance in voxels from the centre voxel C//2 to
    the farthest density above the level.
    """
    mean = np.average(np.asarray(volumes, np.float32), axis=0, weights=weights).astype(np.float32)
    positive = mean[mean > 0.02 * mean.max()] if mean.max() > 0 else mean[:0]
    flat = positive.size < 2 or float(np.ptp(positive)) == 0.0
    level = (float(mean.max()) or 1.0) if flat else float(threshold_otsu(positive))
    place = np.argwhere((np.asarray(volumes) > level).any(axis=0)) - mean.shape[0] // 2
    reach = float(np.linalg.norm(place, axis=1).max()) if place.size else mean.shape[0] / 2
    return level, min(reach + 1.5, mean.shape[0] * 0.87)


def render(
    volume: NDArray[np.float32],
    level: float,
    reach: float,
    colour: tuple[float, float, float] = (0.45, 0.6, 0.8),
    view: NDArray[np.float64] = FRONT,
    size: int = 160,
) -> Image:
    """Shaded view of the surface ``volume == level``: RGBA (size, size, 4), transparent background.

    ``volume`` (C, C, C) in (z, y, x); ``view`` (3, 3) turns (x, y, z) vectors of the map into screen vectors
    (right, up, towards the viewer).  Orthographic; the frame shows ``reach`` voxels around voxel C//2.
    """
    fine = 2 * size  # two samples a pixel in each direction smooth the outline
    smooth = ndimage.gaussian_filter(np.asarray(volume, np.float32), 0.5)
    canvas = np.zeros((fine, fine, 4))
    window = _window(smooth, level, reach, view, fine)
    if window is not None:
        field, pitch, place = _turned(smooth, view, reach, fine, window)
        depth, hit = _first_crossing(field, level)
        shade = _shading(field, depth, hit, pitch)[..., None]
        tone = np.asarray(colour) * np.minimum(shade, 1) + 0.6 * np.clip(shade - 0.9, 0, 1)
        canvas[place] = np.concatenate([np.clip(tone, 0, 1) * hit[..., None], hit[..., None]], axis=-1)
    pixels = canvas.reshape(size, 2, size, 2, 4).mean(axis=(1, 3))
    alpha = pixels[..., 3:]
    return np.concatenate([pixels[..., :3] / np.maximum(alpha, 1e-6), alpha], axis=-1).astype(np.float32)


def _screen_axes(view: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3): (z, y, x) offsets of the map to (depth away from the viewer, row down, column right)."""
    axes: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0]) @ np.asarray(view, np.float64)[::-1, ::-1]
    return axes


def _window(
    volume: NDArray[np.float32], level: float, reach: float, view: NDArray[np.float64], fine: int
) -> NDArray[np.float64] | None:
    """(3, 2) bounds in voxels of what can be seen, along depth, row and column; None when nothing is."""
    place = np.argwhere(volume > level)
    if place.size == 0:
        return None
    screen = (place - volume.shape[0] // 2) @ _screen_axes(view).T
    bounds = np.stack([screen.min(axis=0) - 1.5, screen.max(axis=0) + 1.5], axis=1)
    bounds[1:] = np.clip(bounds[1:], -reach, reach)
    return bounds if (bounds[:, 1] - bounds[:, 0] > 2 * reach / fine).all() else None


def _turned(
    volume: NDArray[np.float32], view: NDArray[np.float64], reach: float, fine: int, window: NDArray[np.float64]
) -> tuple[NDArray[np.float32], float, tuple[slice, slice]]:
    """(depth, row, column) samples inside ``window``, pixels per depth sample, and their place on the canvas."""
    pixel = 2 * reach / fine
    first = np.floor((window[1:, 0] + reach) / pixel).astype(int).clip(0, fine)
    last = np.ceil((window[1:, 1] + reach) / pixel).astype(int).clip(0, fine)
    depths = max(int(np.ceil((window[0, 1] - window[0, 0]) * DEPTHS_PER_VOXEL)), 2)
    start = np.concatenate([window[:1, 0], (first + 0.5) * pixel - reach])
    to_map = _screen_axes(view).T
    scale = np.array([1 / DEPTHS_PER_VOXEL, pixel, pixel])
    offset = volume.shape[0] // 2 + to_map @ start
    shape = (depths, *(int(n) for n in last - first))
    field = ndimage.affine_transform(volume, to_map * scale, offset, shape, order=1, mode="constant")
    return field, 1 / DEPTHS_PER_VOXEL / pixel, (slice(first[0], last[0]), slice(first[1], last[1]))


def _first_crossing(field: NDArray[np.float32], level: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Depth (in samples, interpolated) at which each ray first rises through ``level``, and whether it does."""
    above = field > level
    hit: NDArray[np.bool_] = np.any(above, axis=0)
    first = above.argmax(axis=0)
    high = np.take_along_axis(field, first[None], 0)[0]
    low = np.take_along_axis(field, np.maximum(first - 1, 0)[None], 0)[0]
    step = np.where(high > low, (high - level) / np.maximum(high - low, 1e-12), 0.0)
    return np.asarray(first - np.clip(step, 0, 1), np.float32), hit


def _shading(
    field: NDArray[np.float32], depth: NDArray[np.float32], hit: NDArray[np.bool_], pitch: float
) -> NDArray[np.float32]:
    """Brightness (rows, columns): Lambert light on the density gradient, darker in crevices and far away."""
    place = np.stack([depth, *np.indices(depth.shape)]).astype(np.float32)
    normal = np.zeros((3, *depth.shape), np.float32)
    for axis, reach in enumerate((1.0, pitch, pitch)):  # one depth sample in every direction
        shift = np.zeros((3, 1, 1), np.float32)
        shift[axis] = reach
        ahead = ndimage.map_coordinates(field, place + shift, order=1, mode="nearest")
        behind = ndimage.map_coordinates(field, place - shift, order=1, mode="nearest")
        normal[axis] = behind - ahead
    normal /= np.maximum(np.linalg.norm(normal, axis=0), 1e-12)
    lambert = np.clip(np.tensordot(LIGHT, normal, axes=1), 0, 1)
    far = np.where(hit, depth, field.shape[0])
    crevice = np.clip((far - ndimage.gaussian_filter(far, 2 * pitch)) / (0.3 * field.shape[0]), 0, 1)
    dim = 1 - 0.25 * np.where(hit, depth / field.shape[0], 0)
    shade: NDArray[np.float32] = (0.4 + 0.75 * lambert) * (1 - 0.6 * crevice) * dim
    return shade
