"""Pictures of codes: where they are dense, ways through them, what else they tell and how they settle.

Owns: the figures of ``paths``, ``controls`` and ``convergence``; style and colours are those of ``plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import ndimage

from opustomo.analysis.plots import INK, MUTED, ORANGE, SERIES, Array, figure, panel

SMALL = 4  # pictures in a row
DRAWN = 5_000  # particles of each small picture


def density(xy: Array, names: tuple[str, str] = ("PC1", "PC2"), title: str = "") -> Figure:
    """Where the particles are dense: kernel density of ``xy`` (P, 2) with contours that enclose 10 to 90 % of them."""
    fig = figure()
    axes = panel(fig, title, *names)
    _density(fig, axes, xy)
    return fig


def _density(fig: Figure, axes: Axes, xy: Array) -> None:
    edges = [np.linspace(*_padded(*np.percentile(column, [0.2, 99.8])), 129) for column in np.asarray(xy).T]
    counts = np.histogram2d(xy[:, 0], xy[:, 1], edges)[0].T
    # half of Scott's rule in two dimensions, which is for one group; in cells
    rule = 0.5 * len(xy) ** (-1 / 6)
    width = [rule * float(np.std(c)) / float(e[1] - e[0]) for c, e in zip(xy.T, edges, strict=True)]
    smooth = ndimage.gaussian_filter(counts, width[::-1], mode="constant")
    smooth /= max(float(smooth.sum()), 1e-30)
    falling = np.sort(smooth.ravel())[::-1]
    enclosed = np.cumsum(falling)
    levels = np.unique([falling[min(int(np.searchsorted(enclosed, share)), falling.size - 1)]
                        for share in (0.9, 0.7, 0.5, 0.3, 0.1)])  # fmt: skip
    area = (edges[0][1] - edges[0][0]) * (edges[1][1] - edges[1][0])
    image = axes.pcolormesh(*edges, smooth / area, cmap="GnBu", rasterized=True)
    middle = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    if smooth.max() > levels[0]:
        axes.contour(*middle, smooth, levels=levels, colors=INK, linewidths=0.6, alpha=0.7)
    bar = fig.colorbar(image, ax=axes, label="density of particles", pad=0.01)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    bar.outline.set_visible(False)


def _padded(low: float, high: float) -> tuple[float, float]:
    reach = max(high - low, 1e-9)
    return low - 0.15 * reach, high + 0.15 * reach


def path_picture(codes: Array, way: Array, anchors: Sequence[int], names: Sequence[int]) -> Figure:
    """``way`` (n, zdim) over the density of ``codes`` (P, zdim), in the plane of their first two components.

    The particles ``anchors`` (rows) are marked with their ``names``.
    """
    mean = codes.mean(0)
    plane = np.linalg.svd(codes - mean, full_matrices=False)[2][:2].T
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    fig = figure()
    axes = panel(fig, "Path through the codes", "PC1", "PC2")
    _density(fig, axes, (codes - mean) @ plane)
    line = (way - mean) @ plane
    axes.plot(line[:, 0], line[:, 1], color=ORANGE, marker="o", markersize=4, linewidth=1.4)
    for row, name in zip(anchors, names, strict=True):
        place = (codes[row] - mean) @ plane
        axes.annotate(str(name), place, xytext=(5, 5), textcoords="offset points", fontsize=9, color=INK, weight="bold")
    return fig


def controls(xy: Array, columns: Mapping[str, Array], explained: Mapping[str, float], names: tuple[str, str]) -> Figure:
    """``xy`` (P, 2) coloured by every column (P,) of numbers, ranks spread over the colours; titles tell R^2."""
    rows = -(-len(columns) // SMALL)
    wide = min(SMALL, len(columns))
    fig = Figure(figsize=(2.9 * wide, 2.6 * rows), layout="constrained")
    some = np.random.default_rng(0).permutation(len(xy))[:DRAWN]
    for place, (name, value) in enumerate(columns.items(), 1):
        axes = panel(fig, f"{name}, R² {explained[name]:.2f}", *names, place=(rows, wide, place))
        axes.title.set_fontsize(8)
        axes.title.set_parse_math(False)
        low, high = np.percentile(value, [2, 98])
        dots = axes.scatter(xy[some, 0], xy[some, 1], s=float(np.clip(3000 / len(some), 0.6, 8)), c=value[some],
                            vmin=low, vmax=high if high > low else low + 1, cmap="viridis", linewidths=0)  # fmt: skip
        bar = fig.colorbar(dots, ax=axes, pad=0.01)
        bar.ax.tick_params(labelsize=6, colors=MUTED, length=0)
        bar.outline.set_visible(False)
        axes.tick_params(labelsize=6)
    return fig


def convergence(epochs: Array, columns: Mapping[str, Array]) -> Figure:
    """One line for each column (n,) over the epochs (n,), NaN where there is nothing to compare with."""
    fig = figure(6.4, 3.4)
    axes = panel(fig, "Codes and classes from epoch to epoch", "epoch", "agreement (1: nothing changes)")
    for (name, value), colour in zip(columns.items(), SERIES, strict=False):
        axes.plot(epochs, value, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=name)
    axes.set_ylim(min(0.0, float(np.nanmin([*map(np.nanmin, columns.values())]))) - 0.02, 1.04)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return fig
